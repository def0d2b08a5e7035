"""What a model's linear layers are given: second moments of their inputs, by module.

`collect` runs a torch module over batches, `Calibration.from_activations` takes inputs that a run
recorded, `save_calibration` and `load_calibration` keep them in a safetensors file. A layer's
`gram`, or its `diagonal`, is the Hessian of its output's squared error: `quantize(hessian=...)`.
"""

from vqkernels.calibration.collect import collect
from vqkernels.calibration.moments import Calibration, CalibrationWarning, Moments
from vqkernels.calibration.store import load_calibration, save_calibration

__all__ = [
    "Calibration",
    "CalibrationWarning",
    "Moments",
    "collect",
    "load_calibration",
    "save_calibration",
]
