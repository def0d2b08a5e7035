"""Models made without weights, and filled with what isn't quantised: all of it, or nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vqkernels.dense import DenseFile
from vqkernels.errors import ContainerError, TensorError
from vqkernels.models import load_dense, without_weights
from vqkernels.nn import VQLinear, replace_linears
from vqkernels.presets import PRESETS
from vqkernels.tensor import random_tensor


class Model(nn.Module):
    """Embedding, a linear layer that is quantised, a norm with buffers, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.up = nn.Linear(16, 24)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(16, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(4.0), persistent=False)


def empty() -> Model:
    with without_weights():
        made = Model()
    replace_linears(made, {"up": random_tensor(PRESETS["rq-2x256x8"], 24, 16, fit=False)})
    return made


def dense() -> dict[str, torch.Tensor]:
    """What isn't quantised of a model; the tied weight once."""
    state = Model().state_dict()
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in state.items()
        if name not in ("up.weight", "head.weight")
    }


def is_empty(model: nn.Module) -> bool:
    return model.embed.weight.is_meta and model.norm.weight.is_meta and model.up.bias.is_meta


def test_what_is_made_without_weights_has_its_buffers():
    with without_weights():
        made = Model()
    assert all(parameter.is_meta for parameter in made.parameters())
    assert torch.equal(made.angles, torch.arange(4.0))
    assert not made.norm.running_var.is_meta
    assert made.head.weight is made.embed.weight
    assert not nn.Linear(2, 2).weight.is_meta, "it ends"


def test_a_parameter_of_two_modules_stays_one_and_keeps_whether_it_is_trained():
    shared = nn.Parameter(torch.zeros(3), requires_grad=False)
    with without_weights():
        one, other = nn.Module(), nn.Module()
        one.weight, other.weight = shared, shared
        other.bias = None
    assert one.weight is other.weight
    assert one.weight.is_meta
    assert not one.weight.requires_grad


def test_an_error_inside_ends_it_too():
    with pytest.raises(ValueError, match="inside"), without_weights():
        raise ValueError("inside")
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("stored", ["given", "folder"])
def test_every_place_is_filled_under_all_its_names(tmp_path, stored):
    model, values = empty(), dense()
    save_file(values, tmp_path / "dense.safetensors")
    names = load_dense(model, values if stored == "given" else tmp_path)
    assert set(names) == {*values, "head.weight"}
    assert model.head.weight is model.embed.weight
    state = model.state_dict()
    assert not any(value.is_meta for value in state.values())
    for name, value in values.items():
        assert torch.equal(state[name], value), name
    assert isinstance(model.up, VQLinear)
    assert isinstance(model.up.bias, nn.Parameter)
    assert model.embed.weight.requires_grad
    assert model.norm.num_batches_tracked.dtype == torch.int64


def test_values_keep_their_dtype_or_get_the_one_asked_for():
    stored = {
        name: value.half() if value.is_floating_point() else value
        for name, value in dense().items()
    }
    for dtype, wanted in ((None, torch.float16), (torch.bfloat16, torch.bfloat16)):
        model = empty()
        load_dense(model, stored, dtype=dtype)
        assert model.norm.running_mean.dtype == model.embed.weight.dtype == wanted
        assert model.norm.num_batches_tracked.dtype == torch.int64
        assert model.up.codebook_0.dtype == torch.float16, "of the format, whatever is asked for"


def test_what_is_not_trained_stays_so():
    model = empty()
    model.norm.requires_grad_(False)
    load_dense(model, dense())
    assert [parameter.requires_grad for parameter in model.norm.parameters()] == [False, False]
    assert model.embed.weight.requires_grad


def test_a_model_with_memory_gets_other_values():
    model, values = Model(), dense()
    assert set(load_dense(model, {"net.norm.bias": values["norm.bias"]}, prefix="net.")) == {
        "norm.bias"
    }
    assert torch.equal(model.norm.bias, values["norm.bias"])
    assert not torch.equal(model.norm.weight, values["norm.weight"])


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in dense().items() if key != name}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (without("norm.weight"), "holds no 'norm.weight', which would stay on the meta device"),
        (without("up.bias"), "holds no 'up.bias'"),
        (without("embed.weight"), "holds no 'embed.weight'"),
        (dense() | {"other": torch.zeros(2)}, "'other' .* names no parameter or buffer"),
        (dense() | {"up.codes": torch.zeros(2)}, "'up.codes' .* names no parameter or buffer"),
        (dense() | {"angles": torch.zeros(4)}, "'angles' .* names no parameter or buffer"),
        (
            dense() | {"norm.bias": torch.zeros(25)},
            r"tensor 'norm.bias' for 'norm.bias' is \[25\], but the model's is \[24\]; it was made",
        ),
        (
            dense() | {"head.weight": torch.zeros(9, 16)},
            "'head.weight' is tied to another in the model, but is stored with other values",
        ),
    ],
)
def test_one_misfit_and_nothing_is_changed(values, message):
    model = empty()
    with pytest.raises(TensorError, match=message) as error:
        load_dense(model, values)
    assert "\n" not in str(error.value)
    assert is_empty(model)


def test_a_tied_weight_may_be_stored_twice():
    model, values = empty(), dense()
    load_dense(model, values | {"head.weight": values["embed.weight"].clone()})
    assert model.head.weight is model.embed.weight


def test_not_strict_skips_what_finds_no_place():
    model = empty()
    load_dense(model, dense() | {"rotary.inv_freq": torch.zeros(2)}, strict=False)
    assert not is_empty(model)
    with pytest.raises(TensorError, match=r"holds no 'norm\.weight'"):
        load_dense(empty(), without("norm.weight"), strict=False)


def test_a_computed_buffer_on_the_meta_device_names_the_way_out():
    with torch.device("meta"):
        model = Model()
    replace_linears(model, {"up": random_tensor(PRESETS["rq-2x256x8"], 24, 16, fit=False)})
    with pytest.raises(TensorError, match=r"no buffer 'angles'.*inside.*without_weights\(\)"):
        load_dense(model, dense())


def test_a_linear_layer_that_is_not_replaced_yet_names_the_order():
    with without_weights():
        model = Model()
    with pytest.raises(TensorError, match=r"holds no 'up.weight'.*replace_linears comes first"):
        load_dense(model, dense())


@pytest.mark.parametrize("damage", ["gone", "truncated", "later"])
def test_a_damaged_file_is_one_line_and_nothing_is_changed(tmp_path, monkeypatch, damage):
    model, path = empty(), tmp_path / "dense.safetensors"
    save_file(dense(), path)
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        whole, short = DenseFile.__getitem__, path.read_bytes()[:-1]

        def read(self, key):
            path.unlink()
            path.write_bytes(short)
            return whole(self, key)

        monkeypatch.setattr(DenseFile, "__getitem__", read)
    with pytest.raises(ContainerError, match=str(tmp_path)) as error:
        load_dense(model, tmp_path)
    assert "\n" not in str(error.value)
    assert is_empty(model)
