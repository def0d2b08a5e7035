"""VPTQ checkpoints (github.com/microsoft/VPTQ): read, dequantised as there, and written."""

from __future__ import annotations

from vqkernels.formats.vptq.read import VptqSource, dequantize
from vqkernels.formats.vptq.write import export

__all__ = ["VptqSource", "dequantize", "export"]
