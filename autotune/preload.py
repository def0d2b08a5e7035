"""What a fresh process needs imported before it can make an attempt; imported for that alone.

Kernel files are not: numba's start their threads when they are imported, and OpenMP ends a process
that is forked off after that. What is missing here is missing for the attempt too, which says so.
"""

from __future__ import annotations

import contextlib
import importlib

for name in ("autotune.evaluate", "numba", "triton.language"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
