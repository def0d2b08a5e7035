"""Optimized product quantization: the rotation that a format's codebooks serve best.

Ge, He, Ke and Sun 2013 ("Optimized product quantization"), in turns: for fixed codes, the
orthogonal R with the least `|X - coded R|` is a Procrustes problem (Schönemann 1966); for fixed R,
codes and codebooks take one step of k-means. A few turns from the identity and from the principal
axes, dealt out so that every vector gets the same product of variances ("parametric"), tell which
of the two to go on from.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vqkernels.quantize import beam
from vqkernels.quantize.kmeans import kmeans
from vqkernels.quantize.layout import Vectors, block
from vqkernels.quantize.recipe import Recipe
from vqkernels.quantize.refit import decode, refit, revive
from vqkernels.quantize.target import Target
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import row_step, unblock
from vqkernels.threads import one_thread

__all__ = ["rotation"]

# Vectors of a codebook that the rotation is found with, where the recipe has no sample: 64 for each
# of 256 entries, and a rotation has few numbers beside them.
SAMPLE = 16384
# Iterations of the first k-means; each turn is another.
FIRST = 8
# Turns from either start, before one is chosen.
TRIAL = 5


def rotation(target: Target, spec: CodebookSpec, recipe: Recipe, *, seed: int) -> Tensor:
    """An orthogonal `[size, size]` float64 with `matrix = coded @ R` in each block of columns.

    It takes `recipe.iterations` turns. Errors count by the mean weight of a row in its block:
    weights of single columns say nothing once columns are mixed.
    """
    some = _sampled(target, spec, recipe)
    size = spec.rotation_size
    starts = [torch.eye(size, dtype=torch.float64), _parametric(some, spec)]
    tried = [_learned(some, spec, start, TRIAL, seed) for start in starts]
    best = min(tried, key=lambda learned: learned[1])[0]
    return _learned(some, spec, best, recipe.iterations, seed)[0]


def _sampled(target: Target, spec: CodebookSpec, recipe: Recipe) -> Target:
    """Stretches of rows that hold whole vectors and groups, evenly spread over the matrix."""
    n, main = target.matrix.shape
    step = row_step(spec)
    vectors = step * main // (spec.vector_size * spec.subspaces) or 1
    wanted = max(recipe.sample or SAMPLE, max(spec.stages))
    pieces = math.ceil(n / step)
    kept = min(pieces, math.ceil(wanted / vectors))
    numbers = torch.arange(kept) * pieces // kept
    rows = (numbers[:, None] * step + torch.arange(step)).reshape(-1)
    rows = rows[rows < n]
    matrix, weights = target.matrix[rows], None
    if target.weights is not None:
        each = target.weights[rows].reshape(len(rows), -1, spec.rotation_size).double()
        weights = each.mean(-1, keepdim=True).expand(each.shape).reshape(matrix.shape).float()
    return Target(matrix, weights)


def _parametric(target: Target, spec: CodebookSpec) -> Tensor:
    """Principal axes as rows, dealt out to the block's vectors by the product of variances."""
    size = spec.rotation_size
    with one_thread():
        each, weights = _runs(target, size)
        total = weights.sum().clamp(min=1e-300)
        spread = each - (each * weights).sum(0) / total
        values, axes = torch.linalg.eigh(spread.T @ (spread * weights) / total)
    length = spec.vector_length * spec.stride
    along = spec.vector_axis == "in" and size % length == 0
    buckets: list[list[int]] = [[] for _ in range(size // length if along else 1)]
    room = size // len(buckets)
    logs = values.clamp(min=1e-30 * float(values[-1]) + 1e-300).log().tolist()
    products = [0.0] * len(buckets)
    for axis in reversed(range(size)):
        open_ones = [bucket for bucket in range(len(buckets)) if len(buckets[bucket]) < room]
        bucket = min(open_ones, key=lambda number: products[number])
        buckets[bucket].append(axis)
        products[bucket] += logs[axis] - logs[0]
    order = [axis for bucket in buckets for axis in bucket]
    dealt: Tensor = axes.T[order].contiguous()
    return dealt


def _learned(
    target: Target, spec: CodebookSpec, start: Tensor, turns: int, seed: int
) -> tuple[Tensor, float]:
    """The rotation after `turns`, and the weighted squared error that it leaves."""
    found, books, error = start, list[Tensor](), math.inf
    for _ in range(turns):
        with one_thread():
            each, _ = _runs(target, spec.rotation_size)
            coded = (each @ found.T).reshape(target.matrix.shape).float()
        vectors = dataclasses.replace(target, matrix=coded).vectors(spec)
        books = books or _first_books(vectors, spec, seed)
        codes = beam.encode(vectors.points, books, weights=vectors.weights, beam=1)
        books = refit(vectors.points, codes, books, weights=vectors.weights)
        books = revive(vectors.points, codes, books, weights=vectors.weights)
        decoded = _matrix(decode(codes, books), vectors.cells, coded, spec)
        found, error = _procrustes(target, decoded, spec.rotation_size)
    return found, error


def _first_books(vectors: Vectors, spec: CodebookSpec, seed: int) -> list[Tensor]:
    books = list[Tensor]()
    for stage, entries in enumerate(spec.stages):
        found = kmeans(
            vectors.points, entries, weights=vectors.weights, seed=(seed, stage), iterations=FIRST
        )
        books.append(found.centroids)
        vectors = vectors.minus(decode([found.codes], [found.centroids]))
    return books


def _matrix(decoded: Tensor, cells: Tensor, like: Tensor, spec: CodebookSpec) -> Tensor:
    """Decoded vectors `[books, count, length]` as the matrix that they were cut from."""
    grid = torch.zeros_like(block(spec, like))
    grid.reshape(-1, grid.shape[-1])[cells[cells >= 0]] = decoded[cells >= 0]
    return unblock(spec, grid)[: like.shape[0], : like.shape[1]]


def _procrustes(target: Target, decoded: Tensor, size: int) -> tuple[Tensor, float]:
    """The orthogonal R with the least weighted `|matrix - decoded R|^2`, and that error."""
    with one_thread():
        each, weights = _runs(target, size)
        coded = decoded.double().reshape(-1, size)
        left, _, right = torch.linalg.svd(coded.T @ (each * weights))
        found = left @ right
        error = float(((each - coded @ found).square() * weights).sum())
    return found, error


def _runs(target: Target, size: int) -> tuple[Tensor, Tensor]:
    """Each row of each block, `[runs, size]`, and its weight, `[runs, 1]`, in float64."""
    each = target.matrix.double().reshape(-1, size)
    if target.weights is None:
        return each, torch.ones(len(each), 1, dtype=torch.float64)
    return each, target.weights.double().reshape(-1, size)[:, :1]
