"""Quantised matrices over several machines or GPUs: cut by row or column, and whole again."""

from vqkernels.parallel.folder import ParallelSource, open_parallel, open_rank, save_parallel
from vqkernels.parallel.mapping import MAPPING
from vqkernels.parallel.plan import axis_of
from vqkernels.parallel.slices import Slice, SplitAxis, merge, split

__all__ = [
    "MAPPING",
    "ParallelSource",
    "Slice",
    "SplitAxis",
    "axis_of",
    "merge",
    "open_parallel",
    "open_rank",
    "save_parallel",
    "split",
]
