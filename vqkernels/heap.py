"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes

__all__ = ["release"]


def release() -> None:
    """Give the free pages of the C library's heap back, where it can be asked to (glibc).

    glibc keeps freed blocks of up to 32 MB, and doesn't use one again where an aligned block of
    its own size is asked for (2.36): a model of 20 matrices of 4 MB, read one by one with
    temporary tensors between those that stay, held 151 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
