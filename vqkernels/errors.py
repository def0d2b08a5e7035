"""What vqbench raises, and when.

    VqError                    base: catch this to catch everything below
    ├── SpecError              a CodebookSpec, preset or format name that contradicts itself
    │   └── UnsupportedError   a valid format that this layer, kernel or device can't hold
    ├── TensorError            parts that don't fit their spec: shape, dtype, range, NaN
    ├── ContainerError         a file that can't be read or written as it should be
    ├── ConfigError            a tuning config outside its kernel's space
    └── BackendError           a package, driver or device that is missing

Every message is one line that names the thing, what is wrong with it, and what to do.
A config that fails while it is being tuned is a status in its record, never an exception.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "ConfigError",
    "ContainerError",
    "SpecError",
    "TensorError",
    "UnsupportedError",
    "VqError",
]


class VqError(Exception):
    """Base of every error that vqbench raises on purpose."""


class SpecError(VqError):
    """A format description that contradicts itself."""


class UnsupportedError(SpecError):
    """A valid format that this layer, kernel or device can't hold."""


class TensorError(VqError):
    """Parts of a quantised tensor that don't fit its spec."""


class ContainerError(VqError):
    """A container file that can't be read or written as it should be."""


class ConfigError(VqError):
    """A tuning config outside its kernel's space."""


class BackendError(VqError):
    """A package, driver or device that is missing."""
