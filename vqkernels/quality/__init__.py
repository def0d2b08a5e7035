"""How much a quantised matrix has lost: of its weights, of its layer's outputs, and in its codes.

Each measure is a function of the dense weight `W [n, k]` and the QuantizedTensor made from it,
whose exact decode is written W^ and the difference E = W - W^. All run in float64, some rows of
the matrix at a time, and give the same bits on any number of threads.
"""

from vqkernels.quality.distortion import Distortion, RunError, distortion, run_error
from vqkernels.quality.entries import rounding_cost, with_best_entries
from vqkernels.quality.outputs import OutputError, gaussian_inputs, output_error
from vqkernels.quality.usage import SHARE_EDGES, CodeUsage, usage

__all__ = [
    "SHARE_EDGES",
    "CodeUsage",
    "Distortion",
    "OutputError",
    "RunError",
    "distortion",
    "gaussian_inputs",
    "output_error",
    "rounding_cost",
    "run_error",
    "usage",
    "with_best_entries",
]
