"""Which kernel serves what, and vq_linear as an operator: values, gradients, tracing, packing."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from vqkernels import dispatch, oracle
from vqkernels.device import detect_cpu
from vqkernels.dispatch import ORDER, select, spec_text, vq_linear
from vqkernels.errors import BackendError, TensorError, UnsupportedError
from vqkernels.kernel import Registry, registry
from vqkernels.presets import PRESETS, parse_format
from vqkernels.problem import Problem
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.testing import field_cases

CPU = detect_cpu()
GPU = dataclasses.replace(CPU, kind="cuda", name="H100", arch="sm_90", units=132)
RQ = PRESETS["rq-2x256x8"]
FIELDS = {case.name: case for case in field_cases()}

# torch 2.13's inductor and opcheck use torch.jit and old numpy names of their own when imported
torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def weight(spec: CodebookSpec = RQ, n: int = 40, k: int = 64, **options) -> QuantizedTensor:
    return random_tensor(spec, n, k, fit=False, **options)


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hold(out: torch.Tensor, tensor: QuantizedTensor, x: torch.Tensor) -> None:
    expected = oracle.reference(tensor, x.detach().reshape(-1, tensor.k))
    verdict = oracle.check(out.detach().reshape(-1, tensor.n), expected)
    assert verdict.passed, verdict


def torch_only() -> Registry:
    kernels = {name: one for name, one in registry().kernels.items() if one.backend == "torch"}
    return Registry(kernels, {"numba.table": "ImportError: no numba"})


def chosen(name: str, m: int, device=CPU, dtype="float32", found=None) -> str:
    problem = Problem(m=m, n=64, k=256, spec=parse_format(name), dtype=dtype)
    return select(problem, device, found).kernel.id


# ------------------------------------------------------------------------------------------------
# select


@pytest.mark.parametrize(
    ("name", "m", "expected"),
    [
        ("rq-2x256x8", 1, "numba/table"),
        ("vq-256x8", 8, "numba/table"),
        ("vq-256x8-channel", 1, "numba/vectorized"),
        ("vq-512x8", 1, "numba/vectorized"),
        ("aqlm-2x10", 1, "numba/fused_rq"),
        ("toy-16-4", 1, "numba/fused_rq"),
        ("vq-256x128", 16, "numba/dequant"),
        ("rq-2x256x8", 9, "numba/fused_rq"),
        ("rq-2x256x8", 33, "numba/dequant"),
    ],
)
def test_the_order_on_a_cpu(name, m, expected):
    assert chosen(name, m) == expected


@pytest.mark.parametrize(
    ("name", "m", "dtype", "expected"),
    [
        ("rq-2x256x8", 1, "float16", "triton/fused_rq"),
        ("vq-256x8", 7, "float16", "triton/vectorized"),
        ("vq-256x8", 8, "float16", "triton/mma"),
        ("vq-256x8", 128, "bfloat16", "triton/mma"),
        ("vq-256x8", 16, "float32", "triton/dequant"),
        ("vq-256x8", 129, "float16", "triton/dequant"),
        ("vq-256x12", 1, "float16", "cuda/vectorized"),
        ("vq-256x12", 4096, "float16", "cuda/dequant"),
        ("vq-256x40", 4096, "float16", "torch/dequant"),
    ],
)
def test_the_order_on_a_gpu(name, m, dtype, expected):
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings")
    assert chosen(name, m, GPU, dtype) == expected


@pytest.mark.parametrize(
    ("name", "m", "expected"),
    [
        ("rq-2x256x8", 1, "torch/table"),
        ("toy-16-4", 1, "torch/dequant"),
        ("rq-2x256x8", 9, "torch/dequant"),
        ("rq-2x256x8", 999, "torch/dequant"),
    ],
)
def test_without_numba_and_triton_torch_serves(name, m, expected):
    assert chosen(name, m, found=torch_only()) == expected
    assert chosen("vq-256x8", m, GPU, "float16", torch_only()) == "torch/dequant"


def test_the_reason_names_what_was_passed_over():
    problem = Problem(m=1, n=64, k=256, spec=RQ)
    why = select(problem, CPU, torch_only()).why
    assert why.startswith("default order (cpu, m <= 8)")
    assert "not numba/table (ImportError: no numba)" in why
    assert "not numba/fused_rq (not installed)" in why


def test_where_nothing_serves_each_refusal_is_told():
    problem = Problem(m=1, n=64, k=256, spec=RQ, dtype="float16")
    with pytest.raises(BackendError) as error:
        select(problem, CPU)
    for name in ORDER[0].kernels:
        assert f"{name} (CPU kernels take float32 activations, not float16)" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_order_names_kernels_that_exist():
    folder = Path(dispatch.__file__).parent / "kernels"
    for name in {name for regime in ORDER for name in regime.kernels}:
        assert (folder / f"{name}.py").exists(), name


def test_a_choice_is_valid_and_made_once():
    problem = Problem(m=4, n=64, k=256, spec=RQ)
    choice = select(problem, CPU)
    choice.kernel.space.check(choice.config)
    assert select(dataclasses.replace(problem), dataclasses.replace(CPU)) is choice
    assert select(problem, dataclasses.replace(CPU, units=CPU.units + 1)) is not choice


# ------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize(
    "name", ["aqlm-2x8", "toy-16-4", "everything-in", "everything-out", "wide-everything"]
)
def test_products_are_within_the_oracles_bound(name):
    case = FIELDS.get(name)
    tensor = case.tensor if case else weight(PRESETS[name], 83, 104, bias=True)
    x = inputs(2, 3, tensor.k)
    y = vq_linear(x, tensor)
    assert y.shape == (2, 3, tensor.n)
    hold(y, tensor, x)
    with pytest.raises(AssertionError):  # the bound sees a wrong bias
        hold(y, tensor.replace_parts(bias=tensor.parts["bias"] + 0.01), x)


def test_any_leading_shape_and_stride():
    tensor = weight()
    x = inputs(64, 7).T
    assert not x.is_contiguous()
    hold(vq_linear(x, tensor), tensor, x)
    assert torch.equal(vq_linear(x[None, :, None], tensor)[0, :, 0], vq_linear(x, tensor))
    assert vq_linear(x[0], tensor).shape == (40,)
    hold(vq_linear(x[0], tensor), tensor, x[0])
    for shape in ((0, 64), (3, 0, 64)):
        assert vq_linear(torch.empty(shape), tensor).shape == (*shape[:-1], 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_cpu_is_rounded_once(dtype):
    tensor, x = weight(), inputs(7, 64).to(dtype)
    y = vq_linear(x, tensor)
    assert y.dtype == dtype
    assert torch.equal(y, vq_linear(x.float(), tensor).to(dtype))
    hold(y, tensor, x)


def test_a_bias_may_come_beside_the_weight_in_any_dtype():
    tensor, x, bias = weight(), inputs(7, 64), inputs(40, seed=1).half()
    whole = tensor.replace_parts(bias=bias.float())
    hold(vq_linear(x, tensor, bias), whole, x)
    with pytest.raises(TensorError, match="a bias of its own"):
        vq_linear(x, whole, bias)


def test_what_does_not_fit_is_refused():
    tensor = weight()
    with pytest.raises(TensorError, match=r"x is \[2, 65\], but the weight takes \[..., 64\]"):
        vq_linear(inputs(2, 65), tensor)
    with pytest.raises(UnsupportedError, match=r"x is torch\.float64; convert it"):
        vq_linear(inputs(2, 64).double(), tensor)
    cut = {name: part for name, part in tensor.parts.items() if name != "codebook_1"}
    with pytest.raises(TensorError, match="'codebook_1' is missing"):
        vq_linear(inputs(2, 64), dataclasses.replace(tensor, parts=cut))


def test_a_code_out_of_range_never_reaches_a_kernel():
    tensor = weight(parse_format("vq-100x8"))
    vq_linear(inputs(7, 64), tensor)
    tensor.parts["codes"][3, 2] = 100
    with pytest.raises(TensorError, match="reach 100, but the codebook has 100 entries"):
        vq_linear(inputs(7, 64), tensor)


# ------------------------------------------------------------------------------------------------
# the operator


def arguments(tensor: QuantizedTensor, x: torch.Tensor) -> tuple:
    return x, list(tensor.parts.values()), spec_text(tensor.spec), tensor.n, tensor.k


@pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS)
def test_the_spec_travels_as_json(spec):
    changed = dataclasses.replace(spec, coefficients=(0.1,) * len(spec.stages), permuted=True)
    for one in (spec, changed):
        assert CodebookSpec.from_dict(json.loads(spec_text(one))) == one


@torchs_own
def test_opcheck():
    tensor = weight(bias=True)
    x, grad = inputs(2, 3, 64).requires_grad_(), inputs(2, 3, 40).requires_grad_()
    torch.library.opcheck(torch.ops.vqbench.vq_linear.default, arguments(tensor, x))
    torch.library.opcheck(torch.ops.vqbench.vq_linear_gradient.default, arguments(tensor, grad))


@pytest.mark.parametrize("name", ["rq-2x256x8", "everything-in", "everything-out"])
def test_gradients_of_x_match_the_dense_layer(name):
    tensor = FIELDS[name].tensor if name in FIELDS else weight(bias=True)
    dense = tensor.decode()
    x = inputs(2, 3, tensor.k).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = vq_linear(x, tensor)
    expected = torch.nn.functional.linear(wide, dense, tensor.parts["bias"].double())
    grad = inputs(*y.shape, seed=2)
    (found,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (right,) = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-4)
    assert torch.linalg.vector_norm(right) > 1


def test_the_gradient_has_a_gradient():
    tensor = weight()
    x, grad = inputs(2, 64).requires_grad_(), inputs(2, 40, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(vq_linear(x, tensor), x, grad, create_graph=True)
    direction = inputs(2, 64, seed=2)
    (second,) = torch.autograd.grad(first, grad, direction)
    hold(second, tensor, direction)


def test_half_gradients_keep_their_dtype():
    tensor, x = weight(), inputs(3, 64).half().requires_grad_()
    (grad,) = torch.autograd.grad(vq_linear(x, tensor).sum(), x)
    assert grad.dtype == torch.float16
    right = tensor.decode().sum(dim=0).expand(3, -1)
    torch.testing.assert_close(grad.double(), right, rtol=2e-3, atol=2e-3)


def test_a_part_changed_before_the_backward_pass_is_an_error():
    tensor, x = weight(), inputs(3, 64).requires_grad_()
    y = vq_linear(x, tensor)
    tensor.parts["codebook_0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@torchs_own
def test_a_traced_call_knows_specs_apart():
    compiled = torch.compile(vq_linear, fullgraph=True, backend="aot_eager")
    plain = weight(bias=True)
    spec = dataclasses.replace(plain.spec, coefficients=(1.0, -0.25))
    other, x = dataclasses.replace(plain, spec=spec), inputs(7, 64)
    for tensor in (plain, other):
        assert torch.equal(compiled(x, tensor), vq_linear(x, tensor))
        hold(compiled(x, tensor), tensor, x)


# ------------------------------------------------------------------------------------------------
# packing


@pytest.fixture
def packed(monkeypatch):
    """Arrays of each pack made, weakly; by torch/dequant, which compiles nothing."""
    made: list[dict[str, weakref.ref]] = []
    kernel = registry()["torch/dequant"]

    def pack(tensor, config, problem):
        time.sleep(0.02)  # so that threads that don't wait for each other are seen
        result = kernel.pack(tensor, config, problem)
        made.append({name: weakref.ref(array) for name, array in result.arrays.items()})
        return result

    def chosen(problem, device):
        slow = dataclasses.replace(kernel, pack=pack)
        return dispatch.Choice(slow, kernel.default(problem, device), "")

    monkeypatch.setattr(dispatch, "select", chosen)
    monkeypatch.setattr(dispatch, "_PACKS", dispatch.PackCache())
    dispatch._plan.cache_clear()
    yield made
    dispatch._plan.cache_clear()


def test_a_weight_is_packed_once(packed):
    tensor, x = weight(), inputs(7, 64)
    for m in (7, 3, 1):
        hold(vq_linear(x[:m], tensor), tensor, x[:m])
    again = QuantizedTensor(
        tensor.spec, tensor.n, tensor.k, {n: p.detach() for n, p in tensor.parts.items()}
    )
    vq_linear(x, again)  # other tensors on the same memory
    assert len(packed) == 1
    vq_linear(x, weight())
    assert len(packed) == 2


def test_a_packed_weight_goes_with_its_parts(packed):
    tensor, x = weight(bias=True), inputs(7, 64)
    vq_linear(x, tensor)
    kept = packed[0]["index"]
    assert kept() is not None
    assert len(dispatch._PACKS) == 1
    del tensor
    assert kept() is None
    assert len(dispatch._PACKS) == 0


def test_a_packed_weight_goes_with_any_one_part(packed):
    # an fp32 bias needs no conversion: a pack that kept it as it is would keep it alive
    tensor, x, bias = weight(), inputs(7, 64), inputs(40)
    vq_linear(x, tensor, bias)
    kept = packed[0]["index"]
    del bias
    assert kept() is None
    assert len(dispatch._PACKS) == 0


def test_a_part_changed_in_place_is_packed_again(packed):
    tensor, x = weight(bias=True), inputs(7, 64)
    for part in ("codebook_1", "bias"):
        before = vq_linear(x, tensor)
        old = packed[-1]["books"]
        tensor.parts[part].mul_(-3)
        hold(vq_linear(x, tensor), tensor, x)
        assert not torch.equal(vq_linear(x, tensor), before)
        assert old() is None
    assert len(packed) == 3
    assert len(dispatch._PACKS) == 1


def test_the_same_parts_in_another_sense_are_another_weight(packed):
    tensor, x = weight(), inputs(7, 64)
    vq_linear(x, tensor)
    spec = dataclasses.replace(tensor.spec, coefficients=(1.0, -0.25))
    other = dataclasses.replace(tensor, spec=spec)
    hold(vq_linear(x, other), other, x)
    square = weight(dataclasses.replace(RQ, rotation_size=64))
    turned = square.replace_parts(rotation=square.parts["rotation"].T)
    for one in (square, turned):  # one memory, two strides
        hold(vq_linear(x, one), one, x)


def test_a_bias_in_training_packs_nothing_again(packed):
    tensor, x = weight(), inputs(7, 64)
    bias = torch.nn.Parameter(inputs(40, seed=1))
    for _ in range(3):
        y = vq_linear(x, tensor, bias)
        hold(y, tensor.replace_parts(bias=bias.detach()), x)
        (grad,) = torch.autograd.grad(y.sum(), bias)
        assert torch.equal(grad, torch.full((40,), 7.0))
        with torch.no_grad():
            bias.sub_(grad)
    assert len(packed) == 1
    with torch.no_grad():
        hold(vq_linear(x, tensor, bias), tensor.replace_parts(bias=bias.detach()), x)


def test_configs_with_one_layout_share_its_memory(monkeypatch):
    cache = dispatch.PackCache()
    monkeypatch.setattr(dispatch, "_PACKS", cache)
    tensor, x = weight(), inputs(8, 64)
    for m in (1, 8):
        vq_linear(x[:m], tensor)
    (entry,) = cache._entries.values()
    first, second = entry.packs.values()
    assert first is not second
    assert all(first[name] is second[name] for name in first.arrays)


def test_tensors_of_inference_mode_serve(packed):
    with torch.inference_mode():
        tensor, x = weight(), inputs(7, 64)
        hold(vq_linear(x, tensor), tensor, x)
        vq_linear(x, tensor)
    assert len(packed) == 1


def test_two_threads_share_one_pack(packed):
    tensor, x = weight(bias=True), inputs(2, 7, 64)
    start, found, wrong = threading.Barrier(2), [[], []], []

    def call(which: int) -> None:
        try:
            start.wait(10)
            found[which] = [vq_linear(x[which], tensor) for _ in range(20)]
        except Exception as error:  # a thread's failure is the test's
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(packed) == 1
    for which in range(2):
        assert len(found[which]) == 20
        for y in found[which]:
            hold(y, tensor, x[which])


def test_a_copied_weight_is_packed_for_itself(packed):
    tensor, x = weight(), inputs(7, 64)
    other = copy.deepcopy(tensor)
    vq_linear(x, tensor)
    other.parts["codebook_0"].mul_(2)
    hold(vq_linear(x, other), other, x)
    hold(vq_linear(x, tensor), tensor, x)
    assert len(packed) == 2
