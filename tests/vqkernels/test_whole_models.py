"""A Hugging Face model filled from files computes what its dequantised weights say.

For a model whose linear layers are quantised, three things are shown on the same tokens:

1. Each VQLinear's output is within the oracle's bound of the float64 product of its exact decode
   with the input that it met.
2. All else is the same model: a dense model with the decoded weights, whose linear layers give
   what the quantised model's gave, has the same logits bit by bit.
3. So logits differ from the dense model's by what the products' errors grow to. To first order an
   error is carried by the slope of the logit in that output, and errors add up as independent ones
   do (the oracle's own assumption): the bound is the root of the sum of squares of slope times
   oracle's bound, over all outputs of all products of both models. The roundings of other
   operations, an ulp or two of a value, aren't counted: a product is allowed some 60.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.cli import cli
from vqkernels import oracle
from vqkernels.container import save
from vqkernels.formats import aqlm, vptq
from vqkernels.formats.aqlm.scheme import Scheme
from vqkernels.models import load_dense, without_weights
from vqkernels.nn import VQLinear, replace_linears
from vqkernels.presets import parse_format
from vqkernels.quantize import quantize
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[3, 17, 31]])


@dataclasses.dataclass
class Case:
    """A model: its config, its quantised matrices, and the dense model of their values."""

    folder: str
    config: object
    tensors: dict[str, QuantizedTensor]
    dense: nn.Module

    def empty(self) -> nn.Module:
        with without_weights():
            return transformers.AutoModelForCausalLM.from_config(self.config).eval()


def tiny(**options) -> object:
    return transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
        attn_implementation="eager",  # its gradient is taken of all logits at once
        **options,
    )


def with_dense(model: nn.Module, tensors: dict[str, QuantizedTensor]) -> nn.Module:
    """The model with the decoded weights, rounded to float32 once."""
    for name, tensor in tensors.items():
        linear = model.get_submodule(name)
        linear.weight.data = tensor.decode().to(linear.weight.dtype)
    return model


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | VQLinear) and name != "lm_head"
    }


# What a folder is, its model's options, and the format of its matrices.
FOLDERS = {
    "container": ({"attention_bias": True}, parse_format("rq-2x16x4")),
    "vptq": (
        {"tie_word_embeddings": True},
        CodebookSpec(method="vptq", vector_length=4, stages=(16, 8), vector_axis="out"),
    ),
    "imported": ({}, Scheme(2, 4, 1, 4).spec(torch.float16)),
}


def permuted(tensor: QuantizedTensor) -> QuantizedTensor:
    """The tensor with its columns elsewhere: no good one, but as good as any for its own logits."""
    order = torch.randperm(tensor.k).to(torch.uint16)
    spec = dataclasses.replace(tensor.spec, permuted=True)
    return QuantizedTensor(spec, tensor.n, tensor.k, {**tensor.parts, "permutation": order})


@pytest.fixture(scope="module", params=FOLDERS)
def case(request) -> Case:
    torch.manual_seed(0)
    options, spec = FOLDERS[request.param]
    config = tiny(**options)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)  # not all ones and zeros
    tensors = {name: quantize(one.weight.detach(), spec) for name, one in linears(model).items()}
    if request.param == "vptq":
        tensors = {name: permuted(tensor) for name, tensor in tensors.items()}
    return Case(request.param, config, tensors, with_dense(model, tensors))


def write(case: Case, folder: Path) -> Path:
    """The model's files; what holds the matrices."""
    kept = {
        name: value
        for name, value in case.dense.state_dict().items()
        if name.removesuffix(".weight") not in case.tensors
    }
    if case.config.tie_word_embeddings:
        del kept["lm_head.weight"]
    if case.folder == "container":
        folder.mkdir()
        save(folder / "model.vq.safetensors", case.tensors)
        save_file(kept, folder / "dense.safetensors")
        return folder / "model.vq.safetensors"
    export = vptq.export if case.folder == "vptq" else aqlm.export
    checkpoint = folder.with_name("checkpoint") if case.folder == "imported" else folder
    export(checkpoint, case.tensors, config=case.config.to_dict(), dense=kept)
    if case.folder == "imported":
        done = CliRunner().invoke(cli, ["import", str(checkpoint), "-o", str(folder)])
        assert done.exit_code == 0, done.output
        shutil.rmtree(checkpoint)
    return folder


@pytest.fixture(scope="module")
def filled(case, tmp_path_factory) -> nn.Module:
    folder = tmp_path_factory.mktemp("model") / "folder"
    matrices = write(case, folder)
    model = case.empty()
    replace_linears(model, matrices)
    load_dense(model, folder)
    return model


def run(model: nn.Module) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Logits `[tokens, vocabulary]`, and what each linear layer was given and gave."""
    met: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor], gave: Tensor) -> None:
            met[name] = given[0], gave

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in linears(model).items()]
    logits = model(TOKENS).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, met


def expected(case: Case, name: str, x: Tensor) -> oracle.Reference:
    """The product that a layer was asked for, with the dense model's bias in x's dtype."""
    bias = case.dense.get_submodule(name).bias
    tensor = case.tensors[name]
    if bias is not None and tensor.bias is None:
        tensor = tensor.replace_parts(bias=bias.detach().to(x.dtype).float())
    return oracle.reference(tensor, x.detach().reshape(-1, x.shape[-1]))


def misfits(case: Case, met: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """The layers whose output isn't within the oracle's bound."""
    return [
        name
        for name, (x, y) in met.items()
        if not oracle.check(y.detach().reshape(-1, y.shape[-1]), expected(case, name, x)).passed
    ]


def same_elsewhere(case: Case, logits: Tensor, met: dict[str, tuple[Tensor, Tensor]]) -> bool:
    """Whether the dense model, its linear layers giving what is in `met`, gives them the same.

    Bit by bit, and has the same logits.
    """
    alike = []

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, given: tuple[Tensor], gave: Tensor) -> Tensor:
            alike.append(torch.equal(given[0], met[name][0]))
            return met[name][1]

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in linears(case.dense).items()]
    alike.append(torch.equal(case.dense(TOKENS).logits[0], logits))
    for hook in hooks:
        hook.remove()
    return all(alike)


def farthest(case: Case, logits: Tensor) -> float:
    """The largest |difference| of logits over what the products' bounds grow to."""
    right, met = run(case.dense)
    bounds = []
    for name, (x, _) in met.items():
        of = expected(case, name, x)
        size = oracle.FACTOR * of.depth**0.5 * (of.y.abs() + 2 * of.spread) + of.y.abs()
        bounds.append(oracle.UNIT_ROUNDOFF["float32"] * size)
    count = right.numel()
    slopes = torch.autograd.grad(  # of every logit at once
        right,
        [y for _, y in met.values()],
        torch.eye(count).reshape(count, *right.shape),
        is_grads_batched=True,
    )
    squares = torch.stack(
        [
            (slope.double().reshape(count, -1) * bound.reshape(1, -1)).square().sum(dim=1)
            for slope, bound in zip(slopes, bounds, strict=True)
        ]
    ).sum(dim=0)
    error = (logits.detach().double() - right.detach().double()).abs().flatten()
    return float((error / (2 * squares).sqrt()).max())


def test_logits_are_the_dequantised_models(case, filled):
    logits, met = run(filled)
    assert set(met) == set(case.tensors)
    assert {type(module) for module in linears(filled).values()} == {VQLinear}
    assert misfits(case, met) == []
    assert same_elsewhere(case, logits, met)
    assert farthest(case, logits) < 1


def test_one_wrong_code_is_seen(case):
    name = "model.layers.0.mlp.up_proj"
    codes = case.tensors[name].parts["codes"].clone()
    codes[5, 3, 0] = (codes[5, 3, 0] + 1) % 16
    wrong = case.tensors | {name: case.tensors[name].replace_parts(codes=codes)}
    model = case.empty()
    replace_linears(model, wrong)
    load_dense(model, case.dense.state_dict(), strict=False)
    logits, met = run(model)
    assert misfits(case, met) == [name]
    assert farthest(case, logits) > 1


def test_one_wrong_dense_value_is_seen(case):
    kept = {name: value.clone() for name, value in case.dense.state_dict().items()}
    kept["model.layers.1.input_layernorm.weight"][7] *= 1.001
    model = case.empty()
    replace_linears(model, case.tensors)
    load_dense(model, kept, strict=False)
    logits, met = run(model)
    assert misfits(case, met) == []
    assert not same_elsewhere(case, logits, met)


def test_in_half_precision_each_product_is_right(case):
    model = case.empty()
    replace_linears(model, case.tensors)
    load_dense(model, case.dense.state_dict(), dtype=torch.bfloat16, strict=False)
    with torch.no_grad():  # a bias that may be trained is added after the product is rounded
        logits, met = run(model)
    assert {logits.dtype, *(y.dtype for _, y in met.values())} == {torch.bfloat16}
    assert misfits(case, met) == []
