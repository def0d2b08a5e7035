"""Which entries of its codebooks the codes of a matrix use, and how evenly."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vqkernels.spec import min_bits
from vqkernels.tensor import QuantizedTensor, set_index

__all__ = ["SHARE_EDGES", "CodeUsage", "usage"]

SHARE_EDGES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Upper edges of `CodeUsage.histogram`, in uses of an entry over those it had if all were even."""


@dataclasses.dataclass(frozen=True)
class CodeUsage:
    """Use of the entries of one stage, over all its codebooks.

    stage: its number, or `outliers` for the codebook of outlier columns.
    entries, used: entries in all codebooks together, and those that some code names.
    code_bits: stored bits of a code.
    even_bits: `log2` of a codebook's entries: the entropy if all were used alike.
    entropy_bits: Shannon's, `-sum p log2 p` over a codebook's entries, p the share of its codes;
        of several codebooks, the mean weighted by their codes.
    top_share: largest share that one entry has of its codebook's codes.
    histogram: entries by how often they are used over the even share: never, then up to each of
        `SHARE_EDGES`, then more often.
    """

    stage: str
    entries: int
    used: int
    code_bits: int
    even_bits: float
    entropy_bits: float
    top_share: float
    histogram: tuple[int, ...]

    @property
    def dead(self) -> int:
        """Entries that no code names."""
        return self.entries - self.used

    @property
    def perplexity(self) -> float:
        """`2 ^ entropy`: so many entries, used evenly, would tell as much."""
        return math.exp2(self.entropy_bits)


def usage(tensor: QuantizedTensor) -> tuple[CodeUsage, ...]:
    """Use of each stage of `tensor` in order, then of its outlier codebook, if it has one.

    A cell that lies in the matrix in part is counted like any other.
    """
    spec, parts = tensor.spec, tensor.parts
    books = set_index(spec, tensor.n, tensor.k)
    found = []
    for stage, entries in enumerate(spec.stages):
        number = books * entries + parts["codes"][..., stage].cpu().long()
        count = parts[f"codebook_{stage}"].shape[:3].numel()
        counts = torch.bincount(number.flatten(), minlength=count).reshape(-1, entries)
        found.append(_usage(str(stage), counts, spec.code_bits[stage]))
    if "outlier_codes" in parts:
        entries, codes = spec.outlier_entries, parts["outlier_codes"].cpu().long().flatten()
        counts = torch.bincount(codes, minlength=entries).reshape(1, entries)
        found.append(_usage("outliers", counts, min_bits(entries)))
    return tuple(found)


def _usage(stage: str, counts: Tensor, code_bits: int) -> CodeUsage:
    """Of `counts: [books, entries]`."""
    entries = counts.shape[1]
    uses = counts.double()
    codes = uses.sum(dim=1, keepdim=True)
    shares = uses / codes.clamp(min=1)
    # an unused entry has a share of 0, and 0 log 0 = 0
    entropy = -(uses * shares.where(counts > 0, 1).log2()).sum() / codes.sum()
    edges = torch.tensor(SHARE_EDGES, dtype=torch.float64)
    place = torch.bucketize((shares * entries).flatten(), edges)
    return CodeUsage(
        stage=stage,
        entries=counts.numel(),
        used=int((counts > 0).sum()),
        code_bits=code_bits,
        even_bits=math.log2(entries),
        entropy_bits=abs(float(entropy)),  # of one entry -0.0
        top_share=float(shares.max()),
        histogram=tuple(torch.bincount(place, minlength=len(edges) + 1).tolist()),
    )
