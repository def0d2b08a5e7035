"""The reference quantizer: a dense weight in, a QuantizedTensor out.

`prepare` turns the weight into what its codebooks have to come near (scales, rotation, columns
left out); a method, a file with a `fit`, finds codes and codebooks for that. The clustering under
all of them is `vqkernels.quantize.kmeans`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.parts import check_fit, part_table
from vqkernels.quantize import beam, pq, rq, vq
from vqkernels.quantize.codebook import Stage
from vqkernels.quantize.layout import join
from vqkernels.quantize.prepare import prepare, target_of
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, scaled_codebook

__all__ = ["Recipe", "encode", "quantize", "relative_error", "squared_errors"]

# What no method fills yet, and the value that asks for nothing.
_NOT_YET = (
    ("rotation_size", 0),
    ("outlier_columns", 0),
    ("uniform_columns", 0),
    ("permuted", False),
    ("zero_axis", "none"),
    ("distance", "l2"),
)

_DEFAULT = Recipe()


class Method(Protocol):
    """A method's `fit`: the stages of `spec` in order, with codes for `target.vectors(spec)`."""

    def __call__(
        self, target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int
    ) -> list[Stage]: ...


def quantize(
    weight: Tensor,
    spec: CodebookSpec,
    *,
    seed: int = 0,
    weights: Tensor | None = None,
    hessian: Tensor | None = None,
    recipe: Recipe = _DEFAULT,
    bias: Tensor | None = None,
) -> QuantizedTensor:
    """`weight: [n, k]` in the format `spec`, on the CPU; the same `seed` gives the same bits.

    weights: importance of each squared error, `[n, k]` or anything that broadcasts to it.
    hessian: of the layer's output error, `[k, k]` (X^T X of its inputs), or its diagonal `[k]`,
        which is the same as `weights` of that shape. Give one of the two.
    recipe: how codes and codebooks are found.
    bias: `[n]`, stored beside the weight as it is.

    Raises TensorError for a weight that is no finite matrix, UnsupportedError where the layer
    can't hold the format or no method here fills a part of it yet.
    """
    matrix, importance, full = _checked(weight, weights, hessian)
    n, k = matrix.shape
    method = _method(spec)
    check_fit(spec, n, k)
    target, found = prepare(spec, matrix, importance, full)
    stages = method(target, spec, recipe, seed=seed)
    cells = target.vectors(spec).cells
    found["codes"] = join(spec, n, k, cells, [stage.codes for stage in stages])
    found |= {f"codebook_{number}": stage.values for number, stage in enumerate(stages)}
    scales = [stage.scale for stage in stages if stage.scale is not None]
    if scales:
        found["codebook_scale"] = torch.stack(scales, dim=-1)
    if bias is not None:
        found["bias"] = _bias(bias, n)
    table = part_table(spec, n, k, bias=bias is not None)
    parts = {name: found[name].reshape(part.shape) for name, part in table.items()}
    return QuantizedTensor(spec, n, k, parts)


def encode(
    weight: Tensor,
    tensor: QuantizedTensor,
    *,
    weights: Tensor | None = None,
    recipe: Recipe = _DEFAULT,
) -> QuantizedTensor:
    """`tensor` with the codes of `weight`: codebooks and scales stay.

    recipe: its beam is what several stages are searched with.

    Errors as for `quantize`; TensorError too where the shapes differ.
    """
    matrix, importance, _ = _checked(weight, weights, None)
    tensor = tensor.to("cpu")
    spec = tensor.spec
    if tuple(matrix.shape) != (tensor.n, tensor.k):
        raise TensorError(
            f"weight: shape {list(matrix.shape)}, but the tensor is {tensor.n} x {tensor.k}"
        )
    _method(spec)
    vectors = target_of(spec, matrix, importance, None, dict(tensor.parts)).vectors(spec)
    books = [
        scaled_codebook(spec, tensor.parts, stage, torch.float32).flatten(0, 1)
        for stage in range(len(spec.stages))
    ]
    codes = beam.encode(vectors.points, books, weights=vectors.weights, beam=recipe.beam)
    return tensor.replace_parts(codes=join(spec, tensor.n, tensor.k, vectors.cells, codes))


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


def _method(spec: CodebookSpec) -> Method:
    """What codes `spec`; UnsupportedError, naming the field, where nothing does."""
    for field, unused in _NOT_YET:
        if (value := getattr(spec, field)) != unused:
            raise UnsupportedError(
                f"quantize: {field} = {value!r} is not implemented yet; use a format without it"
            )
    if any(factor != 1 for factor in spec.coefficients):
        raise UnsupportedError(
            f"quantize: coefficients = {spec.coefficients} are not implemented yet; leave them out"
        )
    if spec.method == "opq":
        raise UnsupportedError("quantize: method = 'opq' is not implemented yet; use 'pq'")
    if spec.subspaces > 1:
        return pq.fit
    return rq.fit if len(spec.stages) > 1 else vq.fit


# ------------------------------------------------------------------------------------------------
# what is given


def _checked(
    weight: Tensor, weights: Tensor | None, hessian: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weight, the importance of each error and the full Hessian, on the CPU in float32."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TensorError(
            f"weight: {weight.dtype} {list(weight.shape)}; give a matrix of floating-point numbers"
        )
    matrix = weight.detach().cpu().float()
    if not bool(torch.isfinite(matrix).all()):
        raise TensorError("weight: holds NaN or infinity (as float32); repair the checkpoint")
    if hessian is None:
        return matrix, None if weights is None else _importance(weights, matrix), None
    if weights is not None:
        raise TensorError("weights and hessian both say how errors count; give one of them")
    full = _hessian(hessian, matrix.shape[1])
    diagonal = full if full.ndim == 1 else full.diagonal()
    return matrix, _importance(diagonal, matrix), None if full.ndim == 1 else full


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
