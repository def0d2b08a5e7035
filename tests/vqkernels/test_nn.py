"""VQLinear as a module, and replace_linears: right layers, or no change at all."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from autotune import memory
from vqkernels import oracle
from vqkernels.container import save
from vqkernels.errors import ContainerError, TensorError, UnsupportedError
from vqkernels.formats import vptq
from vqkernels.nn import VQLinear, replace_linears
from vqkernels.presets import PRESETS, parse_format
from vqkernels.source import Outline, TensorSource, outline_of
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.testing import field_cases

RQ = PRESETS["rq-2x256x8"]
EVERYTHING = next(case for case in field_cases() if case.name == "everything-in")
HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))


def weight(n: int, k: int, spec=RQ, **options) -> QuantizedTensor:
    return random_tensor(spec, n, k, fit=False, **options)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def hold(out: torch.Tensor, tensor: QuantizedTensor, x: torch.Tensor) -> None:
    verdict = oracle.check(out.detach(), oracle.reference(tensor, x))
    assert verdict.passed, verdict


# ------------------------------------------------------------------------------------------------
# VQLinear


def test_a_layer_is_its_tensor():
    layer, x = VQLinear.from_quantized(EVERYTHING.tensor), inputs(7, EVERYTHING.k)
    hold(layer(x), EVERYTHING.tensor, x)
    assert (layer.in_features, layer.out_features) == (EVERYTHING.k, EVERYTHING.n)
    assert layer.spec == layer.quantized.spec == EVERYTHING.spec
    assert set(layer.quantized.parts) == set(EVERYTHING.tensor.parts) - {"bias"}
    assert list(layer.parameters()) == []


def test_its_repr_says_what_it_is():
    layer = VQLinear.from_quantized(weight(40, 64, bias=True))
    assert repr(layer).startswith(
        "VQLinear(in_features=64, out_features=40, bias=True, rq 256+256 x 8 along in, "
    )


def test_parts_are_checked():
    tensor = weight(40, 64, parse_format("vq-100x8"))
    with pytest.raises(TensorError, match="codebook has 100 entries"):
        VQLinear.from_quantized(tensor.replace_parts(codes=tensor.parts["codes"] + 200))
    with pytest.raises(TensorError, match=r"bias is \[41\], not \[40\]"):
        VQLinear.from_quantized(tensor, torch.zeros(41))
    with pytest.raises(TensorError, match="pass no other"):
        VQLinear.from_quantized(tensor.replace_parts(bias=torch.zeros(40)), torch.zeros(40))
    with pytest.raises(UnsupportedError):
        VQLinear(0, 40, RQ)


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(bias):
    tensor, x = weight(40, 64, bias=bias), inputs(7, 64)
    layer = VQLinear.from_quantized(tensor)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = VQLinear(64, 40, RQ, bias=bias)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), layer(x))
    assert {name: part.dtype for name, part in fresh.state_dict().items()} == {
        name: part.dtype for name, part in tensor.parts.items()
    }
    with pytest.raises(RuntimeError, match="bias"):
        VQLinear(64, 40, RQ, bias=not bias).load_state_dict(layer.state_dict())


def test_loading_other_values_changes_the_product():
    one, other, x = weight(40, 64), weight(40, 64, seed=5), inputs(7, 64)
    layer = VQLinear.from_quantized(one)
    hold(layer(x), one, x)
    layer.load_state_dict(VQLinear.from_quantized(other).state_dict())
    hold(layer(x), other, x)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_a_change_of_dtype_leaves_the_weight_alone(convert):
    layer, x = VQLinear.from_quantized(EVERYTHING.tensor), inputs(7, EVERYTHING.k)
    before, state = layer(x), {name: part.clone() for name, part in layer.state_dict().items()}
    model = getattr(nn.Sequential(layer, nn.Linear(EVERYTHING.n, 3)), convert)()
    assert model[1].weight.dtype != torch.float32
    for name, part in layer.state_dict().items():
        assert part.dtype == state[name].dtype, name
        assert torch.equal(part, state[name]), name
    assert torch.equal(layer(x), before)


def test_a_trained_bias_follows_the_models_dtype():
    bias = nn.Parameter(inputs(40))
    layer = VQLinear.from_quantized(weight(40, 64), bias).half()
    assert layer.bias.dtype == torch.float16
    assert layer.codebook_0.dtype == torch.float16
    y = layer(inputs(7, 64).half())
    y.sum().backward()
    assert y.dtype == layer.bias.grad.dtype == torch.float16


def test_a_move_takes_every_part():
    layer = VQLinear.from_quantized(weight(40, 64, bias=True)).to("meta", torch.float16)
    assert all(part.device.type == "meta" for part in layer.state_dict().values())
    assert layer.bias.dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_independent(copied):
    tensor, x = weight(40, 64, bias=True), inputs(7, 64)
    layer = VQLinear.from_quantized(tensor)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    other.codebook_0.zero_()
    assert not torch.equal(other(x), layer(x))
    hold(layer(x), tensor, x)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
        ),
    ],
)
# torch 2.13 decorates with its own deprecated torch.jit when inductor is imported
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_two_layers_compile_whole(backend):
    torch._dynamo.reset()
    first, second = weight(40, 64, bias=True), weight(16, 40, PRESETS["toy-16-4"])
    model = nn.Sequential(
        VQLinear.from_quantized(first),
        nn.ReLU(),
        VQLinear.from_quantized(second, nn.Parameter(inputs(16))),
    )
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = inputs(7, 64).requires_grad_()
    eager, traced = model(x), compiled(x)
    torch.testing.assert_close(traced, eager)
    assert eager.abs().max() > 1
    grads = [torch.autograd.grad(y.square().sum(), (x, model[2].bias)) for y in (eager, traced)]
    torch.testing.assert_close(grads[1], grads[0])
    with torch.no_grad():
        model[0].codebook_0.mul_(2)  # the graph takes the layer as it is
        torch.testing.assert_close(compiled(x), model(x))


def test_two_threads_share_a_layer():
    tensor, x = weight(40, 64, bias=True), inputs(2, 7, 64)
    layer, start, found = VQLinear.from_quantized(tensor), threading.Barrier(2), {}

    def call(which: int) -> None:
        start.wait(10)
        found[which] = [layer(x[which]) for _ in range(20)]

    threads = [threading.Thread(target=call, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for which in range(2):
        for y in found[which]:
            hold(y, tensor, x[which])


# ------------------------------------------------------------------------------------------------
# replace_linears


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 40)
        self.down = nn.Linear(40, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def model() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(64, 8)).eval()


def tensors() -> dict[str, QuantizedTensor]:
    return {"0.up.weight": weight(40, 64), "1.down": weight(64, 40, bias=True)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.vq.safetensors"


def untouched(changed: nn.Module) -> bool:
    return not any(isinstance(module, VQLinear) for module in changed.modules())


def test_a_container_replaces_what_it_names(path):
    changed, given = model(), tensors()
    bias = changed[0].up.bias
    save(path, given)
    assert replace_linears(changed, path) == ["0.up", "1.down"]
    assert {n for n, m in changed.named_modules() if type(m) is nn.Linear} == {
        "0.down",
        "1.up",
        "2",
    }
    assert changed[0].up.bias is bias
    assert torch.equal(changed[1].down.bias, given["1.down"].parts["bias"])
    assert not changed[0].up.training
    x = inputs(7, 64)
    whole = given["0.up.weight"].replace_parts(bias=bias.detach())
    hold(changed[0].up(x), whole, x)
    assert changed(x).shape == (7, 8)


def test_tensors_by_name_and_prefix():
    changed = model()
    given = {f"net.{name}": tensor for name, tensor in tensors().items()}
    given["other.0.up"] = weight(3, 5)
    assert replace_linears(changed, given, prefix="net.") == ["0.up", "1.down"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"2": (9, 64)}, r"tensor '2' is \[9, 64\], but module '2' is \[8, 64\]"),
        ({"3.up": (40, 64)}, "tensor '3.up' names no nn.Linear of the model"),
        ({"0": (40, 64)}, "tensor '0' names no nn.Linear of the model"),
        ({"0.up": (40, 64)}, "'0.up.weight' and '0.up' are both for module '0.up'"),
    ],
)
def test_one_misfit_and_nothing_is_replaced(path, extra, message):
    changed = model()
    save(path, tensors() | {name: weight(*shape) for name, shape in extra.items()})
    with pytest.raises(TensorError, match=message) as error:
        replace_linears(changed, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert untouched(changed)


def test_a_damaged_tensor_and_nothing_is_replaced(path):
    changed, given = model(), tensors()
    given["2"] = weight(8, 64)
    broken = given | {"2": given["2"].replace_parts(codebook_0=given["2"].parts["codebook_0"] / 0)}
    with pytest.raises(TensorError, match=r"tensor '2' for module '2': .*NaN or infinity"):
        replace_linears(changed, broken)
    save(path, given)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ContainerError, match=str(path)):
        replace_linears(changed, path)
    assert untouched(changed)


def test_not_strict_skips_what_finds_no_module():
    changed = model()
    given = tensors() | {"3.up": weight(40, 64)}
    assert replace_linears(changed, given, strict=False) == ["0.up", "1.down"]
    assert replace_linears(model(), given, prefix="none.", strict=False) == []
    with pytest.raises(TensorError, match="no tensor is for this model; check the prefix"):
        replace_linears(model(), given, prefix="none.")
    with pytest.raises(TensorError, match=r"is \[9, 64\]"):
        replace_linears(model(), {"2": weight(9, 64)}, strict=False)


def test_a_shared_module_is_replaced_everywhere():
    shared = nn.Linear(64, 64)
    changed = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert replace_linears(changed, {"b.0": weight(64, 64)}) == ["a", "b.0"]
    assert changed["a"] is changed["b"][0]
    again = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    with pytest.raises(
        TensorError, match=r"one layer under several names, with the tensors a, b.0"
    ):
        replace_linears(again, {"a": weight(64, 64), "b.0": weight(64, 64)})
    assert untouched(again)


def test_a_tied_weight_is_replaced_with_it():
    changed = nn.ModuleDict({"a": nn.Linear(64, 40), "b": nn.Linear(64, 40)})
    changed["b"].weight = changed["a"].weight
    biases = changed["a"].bias, changed["b"].bias
    assert replace_linears(changed, {"a": weight(40, 64)}) == ["a", "b"]
    assert changed["a"].codes is changed["b"].codes
    assert (changed["a"].bias, changed["b"].bias) == biases
    apart = nn.ModuleDict({"a": nn.Linear(64, 40), "b": nn.Linear(64, 40)})
    assert replace_linears(apart, {"a": weight(40, 64)}) == ["a"]


def test_what_would_be_lost_is_refused():
    attention = nn.MultiheadAttention(64, 2)
    with pytest.raises(TensorError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        replace_linears(attention, {"out_proj": weight(64, 64)})
    hooked = model()
    hooked[2].register_forward_hook(lambda *_: None)
    with pytest.raises(TensorError, match="'2' has forward hooks"):
        replace_linears(hooked, tensors() | {"2": weight(8, 64)})
    assert untouched(hooked)


def test_a_model_without_memory_gets_its_parts_on_the_cpu():
    with torch.device("meta"):
        changed = nn.Sequential(nn.Linear(64, 40, bias=False))
    replace_linears(changed, {"0": weight(40, 64)})
    x = inputs(7, 64)
    hold(changed(x), weight(40, 64), x)


def test_a_given_tensor_is_not_copied_and_keeps_its_spec():
    spec = dataclasses.replace(RQ, coefficients=(1.0, -0.25))
    tensor = weight(40, 64, spec)
    changed = nn.Sequential(nn.Linear(64, 40))
    replace_linears(changed, {"0": tensor})
    assert changed[0].codes is tensor.parts["codes"]
    assert changed[0].spec == spec


# ------------------------------------------------------------------------------------------------
# layer by layer


class Source(TensorSource):
    """Tensors by name that says what was read of it, and drops what it gave."""

    def __init__(self, given: dict[str, QuantizedTensor]) -> None:
        self.given, self.read = given, []

    def __getitem__(self, name: str) -> QuantizedTensor:
        self.read.append(name)
        return self.given[name]

    def __iter__(self):
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def outline(self, name: str) -> Outline:
        return outline_of(self.given, name)


def test_each_matrix_is_read_once_and_in_the_sources_order():
    source = Source({"1.down": weight(64, 40), "other": weight(3, 5), "0.up": weight(40, 64)})
    assert replace_linears(model(), source, strict=False) == ["0.up", "1.down"]
    assert source.read == ["1.down", "0.up"]
    tied = nn.ModuleDict({"a": nn.Linear(64, 40), "b": nn.Linear(64, 40)})
    tied["b"].weight = tied["a"].weight
    source = Source({"b": weight(40, 64)})
    assert replace_linears(tied, source) == ["a", "b"]
    assert source.read == ["b"]


@pytest.mark.parametrize(
    ("changed", "more"),
    [
        (model(), {"2": weight(9, 64)}),  # shape
        (model(), {"3": weight(8, 64)}),  # name
        (model(), {"0.up.weight": weight(40, 64)}),  # twice
        (nn.ModuleDict({"0": Block(), "2": nn.Bilinear(2, 2, 2)}), {"2": weight(8, 64)}),
    ],
)
def test_what_headers_show_is_said_before_anything_is_read(changed, more):
    source = Source({"0.up": weight(40, 64)} | more)
    with pytest.raises(TensorError):
        replace_linears(changed, source)
    assert source.read == []
    assert untouched(changed)


def test_a_matrix_that_is_not_as_its_outline_is_refused():
    class Liar(Source):
        def __getitem__(self, name: str) -> QuantizedTensor:
            return weight(41, 64)

    changed = model()
    with pytest.raises(TensorError, match=r"tensor '0.up' is \[41, 64\], but module '0.up' is"):
        replace_linears(changed, Liar({"0.up": weight(40, 64)}))
    assert untouched(changed)


# ------------------------------------------------------------------------------------------------
# memory


def grown_by(path: Path, given: dict[str, QuantizedTensor]) -> int | None:
    """Bytes by which memory grew, at the worst moment, while a model on meta got its matrices."""
    with torch.device("meta"):
        linears = [nn.Linear(one.k, one.n, bias=False) for one in given.values()]
    changed = nn.Sequential(*linears)
    return memory.peak_during(lambda: replace_linears(changed, path) and None, "cpu")


@pytest.mark.parametrize("kind", ["container", pytest.param("vptq", marks=pytest.mark.sweep)])
def test_a_model_takes_its_quantised_size_and_a_layer(tmp_path, kind):
    spec = CodebookSpec(method="vptq", vector_length=1, stages=(256, 256), vector_axis="out")
    tensor = weight(2048, 2048, spec)
    small, large = {"0": tensor.rows(0, 64)}, {str(number): tensor for number in range(6)}
    write = save if kind == "container" else vptq.export
    write(tmp_path / "small", small)
    write(tmp_path / "large", large)
    if grown_by(tmp_path / "small", small) is None:  # also what is loaded and made only once
        pytest.skip("this system doesn't tell a process's peak memory")
    one = sum(part.nbytes for part in tensor.parts.values())
    assert one > 2 * memory.SLACK
    # whatever else the process does may add to it, and can't take away
    grown = (grown_by(tmp_path / "large", large) - 6 * one for _ in range(3))
    assert any(0 <= more < one + memory.SLACK for more in grown)
