"""The reference quantizer: a dense weight in, a QuantizedTensor out.

Every method minimises `sum weights * (W - decoded W)^2`, also where it codes a scaled W. A method
is a file with a `fit`: from the vectors of each codebook to its stored stages. The k-means under
all of them is `vqkernels.quantize.kmeans`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vqkernels.errors import TensorError, UnsupportedError
from vqkernels.parts import check_fit, part_table
from vqkernels.quantize import pq, rq, vq
from vqkernels.quantize.codebook import Stage, code_stage, round_to
from vqkernels.quantize.layout import Vectors, join, split
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, scaled_codebook

__all__ = ["encode", "quantize", "relative_error"]

# What no method fills yet, and the value that asks for nothing.
_NOT_YET = (
    ("rotation_size", 0),
    ("outlier_columns", 0),
    ("uniform_columns", 0),
    ("permuted", False),
    ("zero_axis", "none"),
    ("distance", "l2"),
)


class Method(Protocol):
    """A method's `fit`: stages in order, each with codes for all of `vectors`."""

    def __call__(
        self, vectors: Vectors, spec: CodebookSpec, *, seed: int, iterations: int
    ) -> list[Stage]: ...


def quantize(
    weight: Tensor,
    spec: CodebookSpec,
    *,
    seed: int = 0,
    weights: Tensor | None = None,
    iterations: int = 25,
    bias: Tensor | None = None,
) -> QuantizedTensor:
    """`weight: [n, k]` in the format `spec`, on the CPU; the same `seed` gives the same bits.

    weights: importance of each squared error, `[n, k]` or anything that broadcasts to it (`[k]`:
        one an input feature, as the diagonal of a Hessian).
    iterations: of each k-means.
    bias: `[n]`, stored beside the weight as it is.

    `additive` (AQLM) and `vptq` are coded greedily, as residual quantization: main codebook first,
    then what it left. Raises TensorError for a weight that is no finite matrix, UnsupportedError
    where the layer can't hold the format or no method here fills a part of it yet.
    """
    matrix, importance = _checked(weight, weights)
    n, k = matrix.shape
    method = _method(spec)
    check_fit(spec, n, k)
    scale = _scale(spec, matrix)
    vectors = _vectors(spec, matrix, importance, scale)
    stages = method(vectors, spec, seed=seed, iterations=iterations)
    found = {"codes": join(spec, n, k, vectors.cells, [stage.codes for stage in stages])}
    found |= {f"codebook_{number}": stage.values for number, stage in enumerate(stages)}
    scales = [stage.scale for stage in stages if stage.scale is not None]
    if scales:
        found["codebook_scale"] = torch.stack(scales, dim=-1)
    if scale is not None:
        found["scale"] = scale
    if bias is not None:
        found["bias"] = _bias(bias, n)
    table = part_table(spec, n, k, bias=bias is not None)
    parts = {name: found[name].reshape(part.shape) for name, part in table.items()}
    return QuantizedTensor(spec, n, k, parts)


def encode(
    weight: Tensor, tensor: QuantizedTensor, *, weights: Tensor | None = None
) -> QuantizedTensor:
    """`tensor` with the codes of `weight`: codebooks and scales stay, each stage's code is nearest.

    Errors as for `quantize`; TensorError too where the shapes differ.
    """
    matrix, importance = _checked(weight, weights)
    tensor = tensor.to("cpu")
    spec = tensor.spec
    if tuple(matrix.shape) != (tensor.n, tensor.k):
        raise TensorError(
            f"weight: shape {list(matrix.shape)}, but the tensor is {tensor.n} x {tensor.k}"
        )
    _method(spec)
    vectors = _vectors(spec, matrix, importance, tensor.parts.get("scale"))
    cells, codes = vectors.cells, []
    for stage in range(len(spec.stages)):
        book = scaled_codebook(spec, tensor.parts, stage, torch.float32).flatten(0, 1)
        codes.append(code_stage(vectors, book))
        vectors = vectors.minus(book[torch.arange(len(book))[:, None], codes[-1]])
    return tensor.replace_parts(codes=join(spec, tensor.n, tensor.k, cells, codes))


def relative_error(weight: Tensor, tensor: QuantizedTensor) -> float:
    """`sum (W - decoded W)^2 / sum W^2`; of an all-zero W, 0 if it is exact and inf if not."""
    exact = weight.detach().cpu().double()
    lost = float((exact - tensor.to("cpu").decode()).square().sum())
    total = float(exact.square().sum())
    return lost / total if total else (float("inf") if lost else 0.0)


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


def _checked(weight: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise TensorError(
            f"weight: {weight.dtype} {list(weight.shape)}; give a matrix of floating-point numbers"
        )
    matrix = weight.detach().cpu().float()
    if not bool(torch.isfinite(matrix).all()):
        raise TensorError("weight: holds NaN or infinity (as float32); repair the checkpoint")
    if weights is None:
        return matrix, None
    try:
        importance = weights.detach().cpu().float().expand(matrix.shape)
    except RuntimeError as error:
        raise TensorError(
            f"weights: shape {list(weights.shape)} doesn't broadcast to {list(matrix.shape)}"
        ) from error
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise TensorError("weights: must be finite and not below 0")
    return matrix, importance


def _bias(bias: Tensor, n: int) -> Tensor:
    value = bias.detach().cpu().float()
    if tuple(value.shape) != (n,) or not bool(torch.isfinite(value).all()):
        raise TensorError(f"bias: shape {list(value.shape)}; give {n} finite numbers")
    return value


def _scale(spec: CodebookSpec, matrix: Tensor) -> Tensor | None:
    """Root mean square of each row or column, or of all, as it is stored; 1 where that is 0."""
    if spec.scale_axis == "none":
        return None
    # numpy: torch's sum of a whole tensor rounds differently with the number of threads
    squares = matrix.double().square().numpy()
    axis = {"tensor": None, "row": 1, "column": 0}[spec.scale_axis]
    rms = torch.from_numpy(squares.mean(axis=axis).reshape(-1)).sqrt()
    stored = round_to(rms, spec.side_dtype, "side_dtype")
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _vectors(
    spec: CodebookSpec, matrix: Tensor, importance: Tensor | None, scale: Tensor | None
) -> Vectors:
    if scale is None:
        return split(spec, matrix, importance)
    factor = scale.double()[:, None] if spec.scale_axis == "row" else scale.double()
    if spec.scale_axis != "tensor":
        # an error of the scaled weight counts in the weight's own units
        # (relative to the largest: squares of small scales would underflow in float32)
        squares = (factor / factor.max()).square().expand(matrix.shape)
        importance = (squares if importance is None else squares * importance).float()
    return split(spec, (matrix / factor).float(), importance)
