"""A driver that answers without a GPU, below a torch that says it has one."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as bindings

from vqkernels.device import detect_cpu
from vqkernels.kernels.cuda import driver
from vqkernels.kernels.cuda.program import Arguments

GPU = dataclasses.replace(
    detect_cpu(), kind="cuda", name="H100", arch="sm_90", units=132, shared_bytes=227 << 10
)
OK = bindings.CUresult.CUDA_SUCCESS
STREAM = 0x5EED


class FakeDriver:
    """Answers as the driver does, and keeps what was asked; everything else is the real module."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.attributes: list[tuple[Any, ...]] = []
        self.limits: list[tuple[Any, int]] = []
        self.loaded: list[bytes] = []
        self.refusal = OK
        self.before_launch = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(bindings, name)

    def cuLibraryLoadData(self, code: bytes, *_: object) -> tuple[Any, ...]:  # noqa: N802
        self.loaded.append(code)
        return OK, bindings.CUlibrary(1)

    def cuLibraryGetKernel(self, library: Any, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        assert name == b"vq_kernel"
        return OK, bindings.CUkernel(2)

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, bindings.CUdevice(index)

    def cuKernelSetAttribute(self, *call: Any) -> tuple[Any, ...]:  # noqa: N802
        self.attributes.append(call)
        return (OK,)

    def cuDeviceGetAttribute(self, name: Any, device: Any) -> tuple[Any, ...]:  # noqa: N802
        return OK, 32 << 20

    def cuCtxGetLimit(self, limit: Any) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.limits[-1][1] if self.limits else 0

    def cuCtxSetLimit(self, limit: Any, value: int) -> tuple[Any, ...]:  # noqa: N802
        self.limits.append((limit, value))
        return (OK,)

    def cuLaunchKernelEx(self, config: Any, function: Any, address: int, extra: int) -> Any:  # noqa: N802
        self.before_launch()
        struct = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))[0]
        arguments = Arguments.from_buffer_copy(ctypes.string_at(struct, ctypes.sizeof(Arguments)))
        names = bindings.CUlaunchAttributeID
        given = {attribute.id: attribute.value for attribute in config.attrs[: config.numAttrs]}
        window, cluster = (
            getattr(given.get(name), field, None)
            for name, field in (
                (names.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW, "accessPolicyWindow"),
                (names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, "clusterDim"),
            )
        )
        early = given.get(names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        self.launches.append(
            {
                "arguments": arguments,
                "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                "block": (config.blockDimX, config.blockDimY, config.blockDimZ),
                "shared": config.sharedMemBytes,
                "stream": int(config.hStream),
                "function": int(function),
                "cluster": cluster and (cluster.x, cluster.y, cluster.z),
                "early": early and early.programmaticStreamSerializationAllowed,
                "window": window and (window.base_ptr, window.num_bytes, window.hitRatio),
            }
        )
        return (self.refusal,)


def installed(monkeypatch: pytest.MonkeyPatch, one: FakeDriver) -> Iterator[FakeDriver]:
    """`one` in the place of the driver; the body of a fixture."""
    monkeypatch.setattr(driver, "_driver", lambda: one)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    driver._set_aside.cache_clear()
    yield one
    driver._set_aside.cache_clear()
