"""How much a call allocates, beyond what it was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from vqkernels import heap

__all__ = ["SLACK", "kept_by", "peak_during", "resident_peak"]

# Resident memory comes in pages, thread stacks and allocator arenas; what a call needs is told
# apart from nothing only above this.
SLACK = 4 << 20

T = TypeVar("T")


def peak_during(call: Callable[[], None], place: str) -> int | None:
    """Bytes by which memory in use on `place` rose, at the worst moment of `call`; None if unknown.

    place: as torch names a device. On a GPU what torch's allocator knows of.
    On a CPU the kernel's high-water mark of resident memory, reset just before; pages that the
    allocator already held count only if it gave them back first, so it is asked to.
    """
    if place.startswith("cuda"):
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        call()
        torch.cuda.synchronize(place)
        return int(torch.cuda.max_memory_allocated(place) - before)
    heap.release()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS")
    except (OSError, ValueError, KeyError):
        call()
        return None
    call()
    return max(0, _status_bytes("VmHWM") - before)


def kept_by(action: Callable[[], T], place: str) -> tuple[T, int | None]:
    """What `action` gives, and bytes by which memory in use on `place` has risen when it is over.

    None where the system can't tell. What `action` gives counts too, if it is on `place`.
    """
    before = _in_use(place)
    result = action()
    after = _in_use(place)
    return result, None if before is None or after is None else after - before


def resident_peak() -> int | None:
    """The most memory that this process has held, in bytes."""
    try:
        return _status_bytes("VmHWM")
    except (OSError, ValueError, KeyError):
        return None


def _in_use(place: str) -> int | None:
    if place.startswith("cuda"):
        torch.cuda.synchronize(place)
        return int(torch.cuda.memory_allocated(place))
    heap.release()
    try:
        return _status_bytes("VmRSS")
    except (OSError, ValueError, KeyError):
        return None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[field].split()[0]) * 1024
