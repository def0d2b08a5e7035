"""A kernel that is slower by a share of its own time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from autotune.evaluate import evaluate
from autotune.subject import make_subject
from bench.gate import slowed as module
from bench.gate.slowed import slowed
from tests.autotune import fake_cuda
from tests.autotune.zoo import BUDGET, DEVICE, make_kernel, right, tensor


def test_a_call_is_as_much_longer_on_a_clock_that_only_it_moves(monkeypatch):
    now = 0

    def clock() -> int:
        nonlocal now
        now += 1  # so that a loop that waits comes to its end
        return now

    def busy(packed, x, out) -> None:
        nonlocal now
        now += 100_000

    monkeypatch.setattr(module.time, "perf_counter_ns", clock)
    run = slowed(make_kernel(busy), 0.25).compile(None, None, DEVICE)
    run(None, None, None)
    assert now == pytest.approx(125_000, abs=5)


def test_it_is_still_right():
    subject = make_subject(tensor(), 3, DEVICE)
    assert evaluate(slowed(make_kernel(right), 0.1), subject, budget=BUDGET).status == "ok"


def test_on_a_gpu_a_spin_follows_each_call(monkeypatch):
    gpu = fake_cuda.install(monkeypatch)
    device = dataclasses.replace(DEVICE, kind="cuda")
    kernel = make_kernel(lambda packed, x, out: gpu.launch(1e-3))
    run = slowed(kernel, 0.2).compile(None, None, device)
    run(None, None, None)  # finds how long
    torch.cuda.synchronize()
    start = gpu.now
    for _ in range(10):
        run(None, None, None)
    torch.cuda.synchronize()
    assert gpu.now - start == pytest.approx(10 * 1.2e-3, rel=0.01)
