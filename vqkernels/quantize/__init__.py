"""The reference quantizer: a dense weight in, a QuantizedTensor out.

`prepare` turns the weight into what its codebooks have to come near (`scales`, `sides` and
`rotation` taken off); a method, a file with a `fit`, finds codes and codebooks for that. The
clustering under all of them is `vqkernels.quantize.kmeans`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from vqkernels.errors import TensorError
from vqkernels.parts import Part, check_fit, part_table
from vqkernels.quantize import additive, fixed, pq, rq, vptq, vq
from vqkernels.quantize.codebook import Stage
from vqkernels.quantize.layout import join
from vqkernels.quantize.prepare import prepare, target_of
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.scales import clip_limits
from vqkernels.quantize.target import Target
from vqkernels.quantize.tune import tuned
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

__all__ = [
    "Recipe",
    "clip_limits",
    "encode",
    "quantize",
    "relative_error",
    "squared_errors",
]

_DEFAULT = Recipe()


class Method(Protocol):
    """A method's `fit`: the stages of `spec` in order, with codes for `target.vectors(spec)`."""

    def __call__(
        self, target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int
    ) -> list[Stage]: ...


_METHODS = MappingProxyType[str, Method]({"additive": additive.fit, "vptq": vptq.fit})


def quantize(
    weight: Tensor,
    spec: CodebookSpec,
    *,
    seed: int = 0,
    weights: Tensor | None = None,
    hessian: Tensor | None = None,
    recipe: Recipe = _DEFAULT,
    bias: Tensor | None = None,
    codebooks: Sequence[Tensor] | None = None,
) -> QuantizedTensor:
    """`weight: [n, k]` in the format `spec`, on the CPU; the same `seed` gives the same bits.

    weights: importance of each squared error, `[n, k]` or anything that broadcasts to it.
    hessian: of the layer's output error, `[k, k]` (X^T X of its inputs), or its diagonal `[k]`,
        which is the same as `weights` of that shape. Give one of the two.
    recipe: how codes and codebooks are found.
    bias: `[n]`, stored beside the weight as it is.
    codebooks: entries of each stage as they decode, `[sets, subspaces, entries, vector_size]`,
        which are rounded as the format stores them; codes, scales and sides alone are found. For
        codebooks that several layers share.

    Raises TensorError for a weight that is no finite matrix and for what doesn't go with it,
    UnsupportedError where the layer can't hold the format.
    """
    given = _checked(weight, weights, hessian)
    n, k = given.matrix.shape
    check_fit(spec, n, k)

    def errors() -> Tensor:
        plain = dataclasses.replace(
            spec, outlier_columns=0, outlier_entries=0, outlier_vector_length=0, uniform_columns=0,
            permuted=False, rotation_size=0,
        )  # fmt: skip
        coded = quantize(weight, plain, seed=seed, weights=weights, hessian=hessian, recipe=recipe)
        return given.matrix - coded.decode()

    target, found = prepare(spec, given, recipe, seed=seed, errors=errors)
    if codebooks is None:
        books, codes = _fit(target, spec, recipe, part_table(spec, n, k), seed)
    else:
        books = fixed.codebook_parts(codebooks, spec, n, k)
        codes = fixed.find_codes(target, spec, books, recipe)
    found |= books
    found["codes"] = join(spec, n, k, target.vectors(spec).cells, codes)
    if bias is not None:
        found["bias"] = _bias(bias, n)
    parts = {name: found[name] for name in part_table(spec, n, k, bias=bias is not None)}
    return QuantizedTensor(spec, n, k, parts)


def encode(
    weight: Tensor,
    tensor: QuantizedTensor,
    *,
    weights: Tensor | None = None,
    recipe: Recipe = _DEFAULT,
) -> QuantizedTensor:
    """`tensor` with the codes and side columns of `weight`; all else stays as it is.

    Codebooks, scales, zeros, permutation and rotation stay, the scales and zeros of uniform
    columns too. recipe: its beam is what several stages are searched with. Errors as for
    `quantize`; TensorError too where the shapes differ.
    """
    given = _checked(weight, weights, None)
    tensor = tensor.to("cpu")
    spec, n, k = tensor.spec, tensor.n, tensor.k
    if tuple(given.matrix.shape) != (n, k):
        raise TensorError(f"weight: shape {list(given.matrix.shape)}, but the tensor is {n} x {k}")
    target, found = target_of(tensor, given)
    codes = fixed.find_codes(target, spec, found, recipe)
    found["codes"] = join(spec, n, k, target.vectors(spec).cells, codes)
    return tensor.replace_parts(**found)


def relative_error(weight: Tensor, tensor: QuantizedTensor) -> float:
    """`sum (W - decoded W)^2 / sum W^2`; of an all-zero W, 0 if it is exact and inf if not."""
    lost, total = squared_errors(weight, tensor)
    return lost / total if total else (float("inf") if lost else 0.0)


def squared_errors(weight: Tensor, tensor: QuantizedTensor) -> tuple[float, float]:
    """`sum (W - decoded W)^2` and `sum W^2`, in float64, the same for any number of threads."""
    exact = weight.detach().cpu().double()
    # numpy: torch's sum of a whole tensor rounds differently with the number of threads
    lost = (exact - tensor.to("cpu").decode()).square().numpy().sum()
    return float(lost), float(exact.square().numpy().sum())


def _fit(
    target: Target, spec: CodebookSpec, recipe: Recipe, table: Mapping[str, Part], seed: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Codebooks as their parts of `table`, and each stage's codes of the unlimited weight."""
    training = target.training()
    stages = _method(spec)(training, spec, recipe, seed=seed)
    if recipe.tune:
        stages = tuned(training, spec, recipe, stages)
    found = {f"codebook_{number}": stage.values for number, stage in enumerate(stages)}
    scales = [stage.scale for stage in stages if stage.scale is not None]
    if scales:
        found["codebook_scale"] = torch.stack(scales, dim=-1)
    found = {name: part.reshape(table[name].shape) for name, part in found.items()}
    if target.limited is None:
        return found, [stage.codes for stage in stages]
    return found, fixed.find_codes(target, spec, found, recipe)


def _method(spec: CodebookSpec) -> Method:
    """What codes `spec`: what its method names, or else what its shape asks for."""
    if spec.method in _METHODS:
        return _METHODS[spec.method]
    if spec.subspaces > 1:
        return pq.fit
    return rq.fit if len(spec.stages) > 1 else vq.fit


# ------------------------------------------------------------------------------------------------
# what is given


def _checked(weight: Tensor, weights: Tensor | None, hessian: Tensor | None) -> Target:
    """The weight, the importance of each error and the full Hessian, on the CPU in float32."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TensorError(
            f"weight: {weight.dtype} {list(weight.shape)}; give a matrix of floating-point numbers"
        )
    matrix = weight.detach().cpu().float()
    if not bool(torch.isfinite(matrix).all()):
        raise TensorError("weight: holds NaN or infinity (as float32); repair the checkpoint")
    if hessian is None:
        return Target(matrix, None if weights is None else _importance(weights, matrix))
    if weights is not None:
        raise TensorError("weights and hessian both say how errors count; give one of them")
    full = _hessian(hessian, matrix.shape[1])
    diagonal = full if full.ndim == 1 else full.diagonal()
    return Target(matrix, _importance(diagonal, matrix), None if full.ndim == 1 else full)


def _importance(weights: Tensor, matrix: Tensor) -> Tensor:
    try:
        importance = weights.detach().cpu().float().expand(matrix.shape)
    except RuntimeError as error:
        raise TensorError(
            f"weights: shape {list(weights.shape)} doesn't broadcast to {list(matrix.shape)}"
        ) from error
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise TensorError("weights: must be finite and not below 0")
    return importance


def _hessian(hessian: Tensor, k: int) -> Tensor:
    value = hessian.detach().cpu().float()
    if tuple(value.shape) not in ((k,), (k, k)):
        raise TensorError(
            f"hessian: shape {list(value.shape)}, but the weight has {k} inputs; "
            f"give [{k}, {k}] or [{k}]"
        )
    if not bool(torch.isfinite(value).all()):
        raise TensorError("hessian: holds NaN or infinity; calibrate again")
    if value.ndim == 2 and not torch.allclose(value, value.T, rtol=1e-3, atol=1e-5):
        raise TensorError("hessian: is not symmetric; give X^T X of the layer's inputs")
    return value


def _bias(bias: Tensor, n: int) -> Tensor:
    value = bias.detach().cpu().float()
    if tuple(value.shape) != (n,) or not bool(torch.isfinite(value).all()):
        raise TensorError(f"bias: shape {list(value.shape)}; give {n} finite numbers")
    return value
