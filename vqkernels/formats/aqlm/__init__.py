"""AQLM checkpoints (github.com/Vahe1994/AQLM): read, dequantised as there, and written."""

from __future__ import annotations

from vqkernels.formats.aqlm.read import AqlmSource, dequantize
from vqkernels.formats.aqlm.write import export

__all__ = ["AqlmSource", "dequantize", "export"]
