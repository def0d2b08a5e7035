"""Calibrations in files: what is written is read, and damage is found."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from vqkernels import container
from vqkernels.calibration import Calibration, Moments, load_calibration, save_calibration
from vqkernels.container.layout import lay_out
from vqkernels.container.signed import TEXT, sign
from vqkernels.errors import ContainerError, TensorError
from vqkernels.quantize import quantize
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(full=True, holdout=0.25):
    inputs = {"a.b": normal(80, 6), "c": normal(3, 20, 5, seed=1)}
    calibration = Calibration.from_activations(inputs, full=full, holdout=holdout)
    return Calibration(dict(calibration), {"model": "tiny", "tokens": "80"})


def same(one, other):
    assert list(one) == list(other)
    assert one.provenance == other.provenance
    for name, moments in one.items():
        for field in dataclasses.fields(Moments):
            ours, theirs = getattr(moments, field.name), getattr(other[name], field.name)
            if isinstance(ours, torch.Tensor):
                assert torch.equal(ours, theirs)
                assert ours.dtype == theirs.dtype
            else:
                assert ours == theirs


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("holdout", [0, 0.25])
def test_what_is_saved_is_loaded(tmp_path, full, holdout):
    path, calibration = tmp_path / "c.safetensors", made(full, holdout)
    save_calibration(path, calibration)
    loaded = load_calibration(path)
    same(calibration, loaded)
    assert loaded.of_weight("a.b.weight").count == calibration["a.b"].count
    assert loaded.of_weight("a.weight") is None
    save_calibration(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert {one.name for one in tmp_path.iterdir()} == {"c.safetensors", "again"}


def test_a_layer_is_read_when_it_is_looked_up(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save_calibration(path, made())
    read = []
    check = Moments.check
    monkeypatch.setattr(
        Moments, "check", lambda self, where: read.append(where) or check(self, where)
    )
    loaded = load_calibration(path)
    assert len(loaded) == 2
    assert "c" in loaded
    assert "d" not in loaded
    assert list(loaded) == ["a.b", "c"]
    assert read == []
    assert loaded["c"].gram.shape == (5, 5)
    assert read == ["layer 'c'"]


def test_it_is_a_plain_safetensors_file_too(tmp_path):
    save_calibration(tmp_path / "c", made())
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert torch.equal(file.get_tensor("a.b/gram"), made()["a.b"].gram)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "c"
    save_calibration(path, made())
    return path, path.read_bytes()


@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
@settings(max_examples=80)
def test_no_flipped_bit_goes_unseen(at, bit, whole):
    path, content = whole
    flipped = bytearray(content)
    flipped[at % len(content)] ^= 1 << bit
    (damaged := path.with_name("damaged")).write_bytes(flipped)
    failed = []
    try:
        same(load_calibration(path), load_calibration(damaged))  # padding, which says nothing
    except (ContainerError, TensorError) as error:
        failed.append(str(error))
    assert all(text.startswith(str(damaged)) and "\n" not in text for text in failed)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "c"
    save_calibration(path, made())
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ContainerError, match="truncated, damaged or no safetensors file"):
            load_calibration(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other"
    with pytest.raises(ContainerError, match="is not a file"):
        load_calibration(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ContainerError, match="is no calibration; make one with `vqbench calib"):
        load_calibration(path)
    spec = CodebookSpec(vector_length=4, stages=(4,))
    container.save(path, {"a": quantize(normal(8, 8), spec)})
    with pytest.raises(ContainerError, match="is no calibration; make one with `vqbench calib"):
        load_calibration(path)


def forged(path, **changes):
    """A file whose description and checksums are right, of a calibration that isn't."""
    save_calibration(path, made())
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[TEXT])
        parts = {key: file.get_tensor(key) for key in file.keys() if "~" not in key}  # noqa: SIM118
    from vqkernels.container.checksums import sha256

    for key, value in changes.pop("parts", {}).items():
        module, part = key.rsplit("/", 1)
        layer = next(one for one in content["layers"] if one["module"] == module)
        if value is None:
            del parts[key]
        else:
            parts[key] = value
            layer["sha256"][part] = sha256(value)
    for name, value in changes.items():
        content[name] = value(content[name])
    path.write_bytes(b"".join(bytes(one) for one in lay_out(sign(content), parts)))
    return path


def without(name):
    def change(layers):
        return [{key: value for key, value in one.items() if key != name} for one in layers]

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_version": lambda _: 2}, "calibration_version is 2, but this build reads 1"),
        ({"layers": without("count")}, "layer 'a.b': count should be a JSON int"),
        ({"layers": without("module")}, "a layer: module should be a JSON str"),
        ({"layers": without("sha256")}, "layer 'a.b': sha256 should be a JSON dict"),
        ({"parts": {"c/gram": None}}, "layer 'c': there is no gram"),
        ({"parts": {"c/odd": torch.ones(2)}}, "layer 'c': there is no odd"),
        ({"parts": {"c/gram": torch.eye(4)}}, r"gram is \[4, 4\], not \[5, 5\]"),
        ({"parts": {"c/inputs": torch.ones(2, 4)}}, r"inputs is \[2, 4\], not \[2, 5\]"),
        ({"parts": {"c/inputs": torch.ones(5)}}, r"inputs is \[5\], not \[5, 5\]"),
        ({"parts": {"c/diagonal": torch.ones(1, 5)}}, r"diagonal is \[1, 5\], not \[5\]"),
        ({"parts": {"c/inputs": torch.ones(2, 5).half()}}, "inputs is not in float32"),
        ({"parts": {"c/inputs": torch.tensor(1.0)}}, r"inputs is \[\], not \[0, 5\]"),
    ],
)  # fmt: skip
def test_a_description_that_fits_nothing_is_refused_on_opening(tmp_path, changes, message):
    path = forged(tmp_path / "c", **changes)
    with pytest.raises(ContainerError, match=message) as caught:
        load_calibration(path)
    assert str(caught.value).startswith(str(path))


def moments(**changes):
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    fields = {"diagonal": torch.tensor([2.0, 3.0]), "gram": gram, "count": 9}
    return Moments(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gram": torch.tensor([[2.0, 1.0], [0.9, 3.0]])}, "gram is not symmetric"),
        ({"gram": torch.tensor([[2.0, 1.0], [1.0, 3.1]])}, "the diagonal is not gram's"),
        ({"gram": torch.tensor([[2.0, 2.5], [2.5, 3.0]])}, "larger than its diagonal allows"),
        ({"gram": torch.tensor([[2.0, math.nan], [1.0, 3.0]])}, "gram holds NaN or infinity"),
        ({"gram": torch.eye(3)}, r"gram is torch.float32 \[3, 3\], not float32 \[2, 2\]"),
        ({"diagonal": torch.tensor([2.0, -3.0]), "gram": None}, "a mean square below 0"),
        ({"diagonal": torch.tensor([2.0, 3.0]).double()}, "diagonal is torch.float64"),
        ({"diagonal": torch.empty(0), "gram": None}, "moments of 9 tokens"),
        ({"count": 0}, "moments of 0 tokens"),
        ({"inputs": torch.ones(3, 4)}, r"inputs is torch.float32 \[3, 4\], not float32 \[3, 2\]"),
        ({"inputs": torch.full((1, 2), math.inf)}, "inputs holds NaN or infinity"),
    ],
)
def test_what_are_no_moments_is_neither_saved_nor_loaded(tmp_path, monkeypatch, changes, message):
    path = tmp_path / "c"
    moments().check("here")
    with pytest.raises(TensorError, match=message) as caught:
        save_calibration(path, Calibration({"x": moments(**changes)}))
    assert str(caught.value).startswith(f"{path}: layer 'x': ")
    assert not path.exists()


def test_damage_that_the_checksums_agree_with_is_found_on_lookup(tmp_path):
    path = forged(tmp_path / "c", parts={"c/gram": made()["c"].gram.triu()})
    loaded = load_calibration(path)
    assert loaded["a.b"].count == 60
    with pytest.raises(TensorError, match=f"{path}: layer 'c': gram is not symmetric"):
        loaded["c"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ContainerError, match="a calibration of no layer"):
        save_calibration(tmp_path / "c", Calibration({}))
    with pytest.raises(ContainerError, match="can't name a tensor"):
        save_calibration(tmp_path / "c", Calibration({"a\nb": moments()}))
    with pytest.raises(ContainerError, match="make the folder first"):
        save_calibration(tmp_path / "none" / "c", made())
    save_calibration(tmp_path / "c", made())
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(TensorError):
        save_calibration(tmp_path / "c", Calibration({"x": moments(count=0)}))
    assert (tmp_path / "c").read_bytes() == before
