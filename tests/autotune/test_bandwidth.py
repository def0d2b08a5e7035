import dataclasses

import pytest

from autotune import bandwidth
from autotune.bandwidth import measure_bandwidth
from autotune.timers import Samples
from tests.autotune import zoo


def test_a_rate_is_bytes_over_seconds(monkeypatch):
    read = []

    def fake(calls, device, budget, *, cold):
        calls[0]()
        read.append(cold)
        return Samples([4.0, 1.0, 2.0], None, None)

    monkeypatch.setattr(bandwidth, "take_samples", fake)
    device = dataclasses.replace(zoo.DEVICE, memory_bytes=64 << 20)
    measured = measure_bandwidth(device)
    assert measured.nbytes == (64 << 20) // 8  # no more than an eighth of memory
    assert measured.median == measured.nbytes / 2
    assert measured.best == measured.nbytes
    assert read == [True]


@pytest.mark.parametrize(("cache", "nbytes"), [(1 << 20, 256 << 20), (64 << 20, 512 << 20)])
def test_what_is_read_fits_no_cache(monkeypatch, cache, nbytes):
    monkeypatch.setattr(bandwidth, "take_samples", lambda *_, **__: Samples([1.0], None, None))
    device = dataclasses.replace(zoo.DEVICE, llc_bytes=cache, memory_bytes=1 << 40)
    assert measure_bandwidth(device).nbytes == nbytes


def test_a_measured_rate_is_sane():
    device = dataclasses.replace(zoo.DEVICE, memory_bytes=64 << 20)
    measured = measure_bandwidth(device)
    assert 0 < measured.median <= measured.best < 1e15
