"""The square block R of a format with a rotation: `main = coded @ R`, block after block of columns.

A codebook serves numbers that are alike best. An orthogonal R spreads a few large columns over
all of its block (Hadamard with random signs: Tseng et al. 2024, "QuIP#"; a random one: Chee et al.
2023, "QuIP"), or is learned together with the codebooks (OPQ, `opq.py`). Whitening makes the coded
columns uncorrelated with a variance of 1; its R is no orthogonal matrix, so an error counts
through it as through a scale.

R is rounded to `side_dtype` first, and its inverse taken of what is stored.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vqkernels.errors import UnsupportedError
from vqkernels.quantize import opq
from vqkernels.quantize.codebook import round_to
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.threads import one_thread

__all__ = ["fit_rotation", "hadamard", "random_rotation", "rotate", "whitening"]

_DRAW = 1 << 20  # beside the seed, so that k-means (seed, stage) draws other numbers

# Whitening divides a direction by its spread. Where a weight hardly varies that would make noise,
# and what is left of its mean, as large as all else: with fewer blocks than columns, 10^6 times.
_LEAST = 0.01

# R R^T is that near to 1 for an orthogonal R in bfloat16 (2^-9 of each entry, so twice that).
_NEAR = 0.01


def fit_rotation(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> Tensor:
    """R as it is stored, `[rotation_size, rotation_size]`, for a target that isn't rotated yet.

    Raises UnsupportedError where `side_dtype` can't hold it.
    """
    kind, size = recipe.rotation, spec.rotation_size
    if kind == "auto":
        kind = "learned" if spec.method == "opq" else "hadamard"
    if kind == "learned":
        found = opq.rotation(target.training(), spec, recipe, seed=seed)
    elif kind == "hadamard":
        found = hadamard(size, seed=seed)
    elif kind == "random":
        found = random_rotation(size, seed=seed)
    else:
        found = whitening(target.training().matrix, size, resolution=_roundoff(spec))
    return round_to(found, spec.side_dtype, "side_dtype")


def hadamard(size: int, *, seed: int) -> Tensor:
    """A Hadamard matrix over the root of its size, columns with random signs, float64.

    Of a size that is no power of two, the odd factor is a discrete cosine transform (the Kronecker
    product of both): orthogonal as well, and its entries are at most sqrt(2) larger than a Hadamard
    matrix's would be.
    """
    power = size & -size
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < power:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    signs = np.random.default_rng((seed, _DRAW)).choice([-1.0, 1.0], size)
    spread = torch.kron(found / math.sqrt(power), _cosines(size // power))
    signed: Tensor = spread * torch.from_numpy(signs)
    return signed


def random_rotation(size: int, *, seed: int) -> Tensor:
    """An orthogonal matrix, each as likely as any other (Haar), float64."""
    normal = np.random.default_rng((seed, _DRAW)).standard_normal((size, size))
    with one_thread():
        found, upper = torch.linalg.qr(torch.from_numpy(normal))
    even: Tensor = found * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return even


def whitening(matrix: Tensor, size: int, *, resolution: float) -> Tensor:
    """The root of the covariance of all blocks of `matrix: [n, main]`, symmetric, float64.

    resolution: of an entry once it is stored; the root's eigenvalues are kept so far above 0 that
    this rounding leaves it an inverse, and at `_LEAST` of the largest or of the mean's length at
    least. The identity where nothing varies.
    """
    blocks = matrix.double().reshape(-1, size)
    mean = torch.from_numpy(blocks.numpy().mean(axis=0))
    blocks = blocks - mean
    with one_thread():
        values, vectors = torch.linalg.eigh(blocks.T @ blocks / len(blocks))
    roots = values.clamp(min=0).sqrt()
    if float(roots[-1]) == 0:
        return torch.eye(size, dtype=torch.float64)
    # rounding moves R by resolution * |R|_F <= resolution * sqrt(size) * roots[-1] at most
    stored = 2 * resolution * math.sqrt(size) * float(roots[-1])
    largest = max(float(roots[-1]), float(np.linalg.norm(mean.numpy())))
    roots = roots.clamp(min=max(stored, _LEAST * largest))
    with one_thread():
        root: Tensor = (vectors * roots) @ vectors.T
    return root


def rotate(target: Target, stored: Tensor) -> Target:
    """The target that the codebooks come near: `coded = main @ R^-1`.

    A full Hessian becomes `R H R^T`, block by block. Of weights, the diagonal of that is kept.

    Raises UnsupportedError where the stored R has no inverse.
    """
    rotation = stored.double()
    with one_thread():
        inverse, failed = torch.linalg.inv_ex(rotation)
        if int(failed) or not bool(torch.isfinite(inverse).all()):
            raise UnsupportedError(
                "quantize: the rotation has no inverse as side_dtype holds it; use a scale_axis "
                "or side_dtype float32"
            )
        matrix = _times(target.matrix, inverse)
        limited = None if target.limited is None else _times(target.limited, inverse)
        if target.hessian is None:
            weights = _rotated_weights(target.weights, rotation, target.matrix.shape)
            return Target(matrix, weights, None, target.rows, limited)
        half = _times(target.hessian, rotation.T)
        hessian = _times(half.T, rotation.T)
    hessian = (hessian + hessian.T) / 2
    weights = hessian.diagonal().expand(matrix.shape)
    if target.rows is not None:
        weights = weights * target.rows[:, None]
    return Target(matrix, weights, hessian, target.rows, limited)


def _rotated_weights(weights: Tensor | None, rotation: Tensor, shape: torch.Size) -> Tensor | None:
    square = rotation @ rotation.T
    even = weights is None or bool((weights == weights[:, :1]).all())
    if even and float((square - torch.eye(len(square))).abs().max()) < _NEAR:
        return weights  # as they are: one weight a vector is coded faster than one a coordinate
    whole = torch.ones(shape) if weights is None else weights
    return _times(whole, rotation.square().T)


def _times(matrix: Tensor, block: Tensor) -> Tensor:
    """Each run of `len(block)` columns of `matrix` times `block`, in float64, as float32."""
    runs = matrix.double().reshape(len(matrix), -1, len(block))
    return (runs @ block).reshape(len(matrix), -1).float()


def _cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II)."""
    step = torch.arange(size, dtype=torch.float64)
    found = torch.cos(math.pi / size * step[:, None] * (step + 0.5)) * math.sqrt(2 / size)
    found[0] = 1 / math.sqrt(size)
    return found


def _roundoff(spec: CodebookSpec) -> float:
    dtype: torch.dtype = getattr(torch, spec.side_dtype)
    return torch.finfo(dtype).eps / 2
