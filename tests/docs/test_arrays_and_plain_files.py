"""docs/arrays-and-plain-files.md: its examples run, and read what is written."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vqkernels.formats.damage import SPEC
from vqkernels.formats.npz import save_npz
from vqkernels.formats.plain import save_plain
from vqkernels.presets import PRESETS
from vqkernels.tensor import random_tensor

TEXT = (Path(__file__).parents[2] / "docs/arrays-and-plain-files.md").read_text()


def example(language: str) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(code)


def test_the_python_example(tmp_path: Path) -> None:
    tensor = random_tensor(SPEC, 6, 9)
    save_npz(tmp_path / "x.npz", {"layer": tensor})
    names: dict[str, Any] = {"path": tmp_path / "x.npz"}
    exec(compile(example("python"), "example", "exec"), names)
    assert np.array_equal(names["codes"], tensor.parts["codes"].numpy())
    assert np.array_equal(names["book"], tensor.parts["codebook_0"].float().numpy())


def test_the_c_example(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    assert compiler, "the tests of CUDA kernels need it too"
    (tmp_path / "example.cpp").write_text('extern "C" {\n' + example("c") + "}\n")
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", "example.so", "example.cpp"],
        cwd=tmp_path,
        check=True,
    )
    spec = dataclasses.replace(PRESETS["vq-256x8"], codebook_dtype="float32")
    tensor = random_tensor(spec, 40, 60, fit=False)
    save_plain(tmp_path / "set", {"Layer": tensor})
    x, y = np.random.default_rng(0).standard_normal(60).astype("f4"), np.zeros(40, "f4")
    pointer = ctypes.POINTER(ctypes.c_float)
    ctypes.CDLL(str(tmp_path / "example.so")).multiply(
        str(tmp_path / "set/%4cayer.idx.bin").encode(),
        str(tmp_path / "set/%4cayer.codebook.bin").encode(),
        40,
        60,
        x.ctypes.data_as(pointer),
        y.ctypes.data_as(pointer),
    )
    assert y == pytest.approx(tensor.decode().numpy() @ x, rel=1e-4, abs=1e-4)


def test_the_checksum_of_a_description(tmp_path: Path) -> None:
    save_plain(tmp_path / "set", {"слой": random_tensor(SPEC, 6, 9)})
    content = json.loads((tmp_path / "set/layers.json").read_text())
    digest = content.pop("sha256")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert digest == hashlib.sha256(text.encode("ascii")).hexdigest()


def test_the_name_of_a_file(tmp_path: Path) -> None:
    names = ["A.b/c", ".x", "y" * 200]
    save_plain(tmp_path / "set", {name: random_tensor(SPEC, 6, 9) for name in names})
    tail = hashlib.sha256(b"y" * 200).hexdigest()[:32]
    stems = ["%41.b%2fc", "%2ex", "y" * 117 + "~" + tail]
    files = {path.name for path in (tmp_path / "set").glob("*.idx.bin")}
    assert files == {f"{stem}.idx.bin" for stem in stems}
