"""Others' kernels behind the Kernel type, to compare with: one file a project, found by scanning.

A module ends in `KERNELS`; `supports` says what is missing where the project is not installed.
They serve no model: the dispatcher knows nothing of them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from vqkernels.kernel import Kernel

__all__ = ["peers"]


@functools.cache
def peers() -> Mapping[str, Kernel]:
    """Every peer's kernel by id."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return MappingProxyType({kernel.id: kernel for one in modules for kernel in one.KERNELS})
