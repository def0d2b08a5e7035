"""Load machine code and launch it on torch's current stream: the one file that asks the driver.

Launches go through the driver's own call: its arguments are one struct, filled in place, where
cuda-core's `launch` converts and checks a list of them each time.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from vqkernels.device import Device
from vqkernels.errors import BackendError

if TYPE_CHECKING:
    from vqkernels.kernels.cuda.program import Program

__all__ = ["Launcher"]

# More dynamic shared memory than this a kernel has to ask for.
_UNASKED_SHARED_BYTES = 48 << 10


class Launcher:
    """A program on one device: compiled now, loaded when it is first launched.

    Raises BackendError where there is no driver, one that is older than the compiler, or one that
    refuses the launch.
    """

    def __init__(self, program: Program, device: Device) -> None:
        self.program = program
        self._device = device
        arch = int(device.arch.removeprefix("sm_"))
        self._code = program.compile(arch).cubin
        self._lock = threading.Lock()
        self._arguments = program.arguments({})
        # one argument, the struct: the driver takes the address of a list of addresses
        self._list = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self._address = ctypes.addressof(self._list)
        self._function: Any = None
        self._config: Any = None
        self._attributes: list[Any] = []  # what every launch of the program asks

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Launch on the current stream of the device; returns before the kernel has run."""
        index = self._device.index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                self(tensors)
            return
        stream = torch.cuda.current_stream(index).cuda_stream
        # the driver copies the arguments before it returns; until then they are this thread's
        with self._lock:
            if self._function is None:
                self._load()
            for name, tensor in tensors.items():
                setattr(self._arguments, name, tensor.data_ptr())
            self._config.hStream = stream
            if self.program.resident:
                self._keep_in_l2(tensors[self.program.resident])
            (status,) = _driver().cuLaunchKernelEx(self._config, self._function, self._address, 0)
        if status:
            one = self.program
            raise BackendError(
                f"cuda/{one.kernel}: the driver refused the launch: {status.name}; a grid of "
                f"{one.grid} blocks of {one.threads} threads with {one.shared_bytes:,} bytes of "
                f"shared memory"
            )

    def _load(self) -> None:
        program = self.program
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = program.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = program.threads, 1, 1
        config.sharedMemBytes = program.shared_bytes
        self._config = config
        self._attributes = _attributes(program)
        config.attrs, config.numAttrs = self._attributes, len(self._attributes)
        self._function = _function(self._code, self._device.index, program.shared_bytes)

    def _keep_in_l2(self, tensor: Tensor) -> None:
        """Ask that this launch's reads of `tensor` stay in L2, and what else it reads does not."""
        index = self._device.index
        nbytes = min(tensor.nbytes, _set_aside(index, tensor.nbytes))
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
        window = attribute.value.accessPolicyWindow
        window.base_ptr, window.num_bytes, window.hitRatio = tensor.data_ptr(), nbytes, 1.0
        window.hitProp = driver.CUaccessProperty.CU_ACCESS_PROPERTY_PERSISTING
        window.missProp = driver.CUaccessProperty.CU_ACCESS_PROPERTY_STREAMING
        asked = [*self._attributes, attribute]
        self._config.attrs, self._config.numAttrs = asked, len(asked)


def _attributes(program: Program) -> list[Any]:
    """Of a launch: the size of its clusters, and whether it may begin early."""
    names, found = driver.CUlaunchAttributeID, []
    if program.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = program.cluster, 1, 1
        found.append(attribute)
    if program.dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        found.append(attribute)
    return found


@functools.cache
def _set_aside(index: int, nbytes: int) -> int:
    """Make L2 keep at least `nbytes` for such windows; the largest window that there may be."""
    place = _checked(_driver().cuDeviceGet(index), "find the device")
    names = driver.CUdevice_attribute
    most, window = (
        _checked(_driver().cuDeviceGetAttribute(name, place), "tell the size of its L2")
        for name in (
            names.CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE,
            names.CU_DEVICE_ATTRIBUTE_MAX_ACCESS_POLICY_WINDOW_SIZE,
        )
    )
    limit = driver.CUlimit.CU_LIMIT_PERSISTING_L2_CACHE_SIZE
    now = _checked(_driver().cuCtxGetLimit(limit), "tell its limits")
    if now < min(nbytes, most):
        _checked(_driver().cuCtxSetLimit(limit, min(nbytes, most)), "set L2 aside")
    return int(window)


@functools.cache
def _driver() -> Any:
    """The driver's functions. Raises BackendError where it is missing or too old."""
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # the bindings are there, the library they bind is not
        raise BackendError(
            f"CUDA kernels can't be launched: no NVIDIA driver answers ({error}); install one, or "
            f"use the CPU's kernels (--device cpu)"
        ) from error
    if status:
        raise BackendError(
            f"CUDA kernels can't be launched: {status.name}; check nvidia-smi, or use --device cpu"
        )
    _check_version()
    return driver


def _check_version() -> None:
    """Machine code of a newer major version than the driver's doesn't load."""
    _, version = driver.cuDriverGetVersion()
    _, major, minor = nvrtc.nvrtcVersion()
    if version // 1000 < major:
        raise BackendError(
            f"the NVIDIA driver is for CUDA {version // 1000}.{version % 1000 // 10}, too old for "
            f"what NVRTC {major}.{minor} compiles; update the driver, or install "
            f"nvidia-cuda-nvrtc-cu{version // 1000}"
        )


# Libraries that functions point into; unloaded only with the process, since graphs may hold them.
_LOADED: list[Any] = []


def _function(code: bytes, index: int, shared_bytes: int) -> Any:
    """The program's function, allowed the shared memory that it needs."""
    from vqkernels.kernels.cuda.program import ENTRY

    asks = _driver()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    library = _checked(asks.cuLibraryLoadData(code, [], [], 0, [], [], 0), "load the code")
    kernel = _checked(asks.cuLibraryGetKernel(library, ENTRY.encode()), "find the kernel")
    _LOADED.append(library)
    if shared_bytes > _UNASKED_SHARED_BYTES:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        place = _checked(asks.cuDeviceGet(index), "find the device")
        asked = asks.cuKernelSetAttribute(attribute, shared_bytes, kernel, place)
        _checked(asked, f"set {shared_bytes:,} bytes of shared memory aside")
    # a CUkernel stands for its function in the current context
    return driver.CUfunction(int(kernel))


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    status, *values = answer
    if status:
        raise BackendError(f"the NVIDIA driver can't {what}: {status.name}; see `vqbench doctor`")
    return values[0] if values else None
