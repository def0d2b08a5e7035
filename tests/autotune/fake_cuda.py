"""A GPU that only keeps time: what timers ask of torch.cuda, on a clock of its own.

`launch(gpu_s, host_s)` is a kernel: the host is at it for `host_s`, then the GPU runs it once it
is free. Nothing computes; `run` may be given to do so when the kernel's turn comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from autotune import timers


def install(monkeypatch: Any) -> FakeGpu:
    """Put a fake GPU in torch.cuda's place, and its clock in the timers'."""
    gpu = FakeGpu()
    for name in ("synchronize", "_sleep", "Stream", "stream", "current_stream", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name), raising=False)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(gpu, enable_timing))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(gpu))
    monkeypatch.setattr(timers.time, "perf_counter", lambda: gpu.now)
    return gpu


class FakeGpu:
    """The host's clock `now`, and `free`: when the GPU will have done all that is queued."""

    def __init__(self) -> None:
        self.now = self.free = self.beside_until = 0.0
        self.spins: list[float] = []
        self.graphs: list[Graph] = []
        self.devices: set[int] = set()
        self.capturing: Graph | None = None
        self.beside = False  # on another stream than the current one

    def launch(
        self, gpu_s: float, host_s: float = 1e-6, run: Callable[[], None] = lambda: None
    ) -> None:
        self.now += host_s
        if self.capturing is not None:
            self.capturing.kernels.append(gpu_s)
            self.capturing.runs.append(run)
            return
        self.last_beside = self.beside
        self.free = max(self.free, self.now) + gpu_s
        run()

    def launch_beside(self, gpu_s: float, run: Callable[[], None], host_s: float = 1e-6) -> None:
        """A kernel on another stream: it waits for nothing that is queued on the current one.

        So it comes before what was queued to write x and out, and what it writes is overwritten.
        """
        self.now += host_s
        if self.free <= self.now:
            run()
        self.beside_until = max(self.beside_until, self.now + gpu_s)

    def synchronize(self, _: object = None) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now = max(self.now, self.free, self.beside_until)

    def _sleep(self, cycles: int) -> None:
        self.spins.append(cycles / timers._SPIN_HZ)
        self.launch(self.spins[-1])

    def Stream(self) -> FakeStream:  # noqa: N802  # torch's name
        return FakeStream()

    def current_stream(self) -> FakeStream:
        return FakeStream()

    @contextlib.contextmanager
    def stream(self, _: FakeStream) -> Iterator[None]:
        self.beside = True
        yield
        self.beside = False

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        self.devices.add(index)
        yield

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        graph.warmed_up_on_a_stream_of_its_own = self.last_beside
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


class FakeStream:
    def wait_stream(self, _: FakeStream) -> None:
        pass


class Event:
    def __init__(self, gpu: FakeGpu, enable_timing: bool) -> None:
        assert enable_timing
        self.gpu = gpu

    def record(self) -> None:
        # an event is stamped when the GPU comes to it: at once, where it has nothing to do
        self.at = self.gpu.free = max(self.gpu.free, self.gpu.now)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def elapsed_time(self, stop: Event) -> float:
        return (stop.at - self.at) * 1e3


class Graph:
    def __init__(self, gpu: FakeGpu) -> None:
        gpu.graphs.append(self)
        self.gpu = gpu
        self.kernels: list[float] = []
        self.runs: list[Callable[[], None]] = []
        self.replays = self.replays_behind_work = 0

    def replay(self) -> None:
        self.replays += 1
        self.replays_behind_work += self.gpu.free > self.gpu.now
        self.gpu.launch(sum(self.kernels), 1e-5)
        for run in self.runs:
            run()
