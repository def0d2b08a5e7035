"""Quantised matrices over several machines or GPUs: cut by row or column, and whole again."""

from vqkernels.parallel.plan import axis_of
from vqkernels.parallel.slices import Slice, SplitAxis, merge, split

__all__ = ["Slice", "SplitAxis", "axis_of", "merge", "split"]
