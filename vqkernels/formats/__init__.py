"""Others' checkpoint formats: quantised matrices read from their folders and written back."""

from __future__ import annotations

from vqkernels.formats.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
