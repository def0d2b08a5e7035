import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune import timers
from autotune.timers import Budget, cold_copies, pinned_threads, set_threads, take_samples
from tests.autotune import zoo

CPU = zoo.DEVICE
CORES = os.sched_getaffinity(0)  # while tests are collected: nothing has been pinned yet


@pytest.fixture
def threads():
    """Restores the number of threads, torch's and numba's."""
    before = torch.get_num_threads()
    yield
    set_threads(before)


def count(samples: int) -> Budget:
    """A budget of so many samples after one warm-up call."""
    return Budget(seconds=0, warmup_s=0, min_samples=samples, max_samples=samples)


def affinities() -> dict[int, set[int]]:
    return {
        int(task.name): os.sched_getaffinity(int(task.name))
        for task in Path("/proc/self/task").iterdir()
    }


def test_calls_take_turns():
    order = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    samples, timing = take_samples(calls, CPU, count(7), cold=True)
    assert "".join(order) == "abcabcab"  # one to warm up, then 7
    assert len(samples) == 7
    assert timing.copies == 3


@pytest.fixture
def clock(monkeypatch):
    """A clock that a call moves on: `clock[0] += seconds`."""
    now = [100.0]
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timers.time, "perf_counter_ns", lambda: round(now[0] * 1e9))
    return now


def ticking(clock, seconds):
    calls = []

    def call():
        calls.append(clock[0])
        clock[0] += seconds

    return calls, call


def test_warm_up_goes_on_for_its_time(clock):
    calls, call = ticking(clock, 0.001)
    budget = Budget(seconds=0, warmup_s=0.0195, min_samples=3, max_samples=3)
    samples, _ = take_samples([call], CPU, budget, cold=True)
    assert len(calls) == 20 + 3
    assert samples == pytest.approx([0.001] * 3)


def test_samples_are_seconds_of_one_call():
    samples, _ = take_samples([lambda: time.sleep(0.003)] * 2, CPU, count(4), cold=False)
    assert all(0.003 <= sample < 3 for sample in samples)


@pytest.mark.parametrize(
    ("seconds", "samples"), [(0.001, 4), (0.0175, 18), (60, 50)], ids=["least", "time", "most"]
)
def test_sampling_ends_by_time_between_its_least_and_most(clock, seconds, samples):
    _, call = ticking(clock, 0.001)
    budget = Budget(seconds=seconds, warmup_s=0, min_samples=4, max_samples=50)
    assert len(take_samples([call], CPU, budget, cold=True)[0]) == samples


@pytest.mark.parametrize(("cold", "state"), [(True, "cold"), (False, "hot")])
def test_how_it_was_timed_is_recorded(cold, state):
    budget = Budget(seconds=0.001, warmup_s=0.002, min_samples=3)
    _, timing = take_samples([lambda: None], CPU, budget, cold=cold)
    assert timing.timer == "perf_counter"
    assert timing.warmup_s == 0.002
    assert timing.threads == torch.get_num_threads()
    assert timing.pinned in (True, False)
    weight = {name: timing.cache[name] for name in ("codes", "codebooks", "sides")}
    assert set(weight.values()) == {state}
    assert timing.cache["x"] == timing.cache["out"] == "hot"


sizes = st.integers(1, 1 << 40)


@given(sizes, sizes, sizes)
def test_cold_copies_exceed_twice_the_cache_or_fill_their_share_of_memory(nbytes, cache, memory):
    device = dataclasses.replace(CPU, llc_bytes=cache, memory_bytes=memory)
    copies = cold_copies(nbytes, device)
    assert copies >= 1
    assert copies == 1 or copies * nbytes <= memory / 4
    assert copies >= 2 or 2 * nbytes > memory / 4
    if (copies + 1) * nbytes <= memory / 4:  # memory was no limit: exceeded, and by no more
        assert copies * nbytes > 2 * cache
        assert copies == 2 or (copies - 2) * nbytes < 2 * cache


def test_a_weight_of_nothing_needs_no_copies():
    assert cold_copies(0, CPU) == 1


def test_set_threads_is_for_torch_and_numba(threads):
    numba = pytest.importorskip("numba")
    for number in (1, 2):
        set_threads(number)
        assert torch.get_num_threads() == number
        assert numba.get_num_threads() == min(number, numba.config.NUMBA_NUM_THREADS)


def test_more_threads_than_numba_has_are_cut(threads):
    numba = pytest.importorskip("numba")
    set_threads(numba.config.NUMBA_NUM_THREADS + 3)
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS


@pytest.mark.parametrize("number", [1, 2])
def test_pinning_holds_each_thread_on_a_core_and_restores_all(threads, number):
    pytest.importorskip("numba")
    if len(CORES) < number:
        pytest.skip(f"needs {number} cores")
    set_threads(number)
    with pinned_threads():  # starts the pool
        pass
    before = affinities()
    assert all(cores == CORES for cores in before.values())
    with pinned_threads() as pinned:
        during = affinities()
    assert pinned
    held = [cores for task, cores in during.items() if cores != before.get(task)]
    assert len(held) == (number if len(CORES) > 1 else 0)
    assert all(len(cores) == 1 for cores in held)
    assert len(set().union(*held)) == len(held)  # a core each
    assert all(cores == CORES for cores in affinities().values())


def test_an_error_while_pinned_restores_the_cores():
    with pytest.raises(ZeroDivisionError), pinned_threads():
        raise ZeroDivisionError
    assert all(cores == CORES for cores in affinities().values())


def test_more_threads_than_cores_are_not_pinned(monkeypatch):
    pytest.importorskip("numba")
    from vqkernels.kernels.numba import threads as pool

    monkeypatch.setattr(pool.numba, "get_num_threads", lambda: len(CORES) + 1)
    _, timing = take_samples([lambda: None], CPU, count(3), cold=True)
    assert timing.pinned is False
    assert all(cores == CORES for cores in affinities().values())


class FakeEvent:
    """A CUDA event whose clock is the number of what was queued before it."""

    queue: list[str]

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = len(FakeEvent.queue)
        FakeEvent.queue.append("event")

    def elapsed_time(self, stop):
        return float(stop.at - self.at)  # ms


def test_gpu_calls_are_queued_between_events_and_never_waited_for(monkeypatch):
    queue = FakeEvent.queue = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: queue.append(f"wait {index}"))
    gpu = dataclasses.replace(CPU, kind="cuda", index=1)
    calls = [lambda name=name: queue.append(name) for name in "ab"]
    samples, timing = take_samples(calls, gpu, count(16), cold=True)
    turns = [step for name in "ba" * 8 for step in ("event", name, "event")]
    assert queue == ["a", "wait 1", *turns, "wait 1"]
    assert samples == pytest.approx([2e-3] * 16)
    assert (timing.timer, timing.threads, timing.pinned) == ("cuda_event", None, None)
    assert timing.cache["codes"] == "cold"


WITHOUT_NUMBA = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numba":
            raise ImportError("numba is blocked")
sys.meta_path.insert(0, Blocker())
import torch
from autotune.evaluate import evaluate, make_subject
from autotune.timers import set_threads
from tests.autotune import zoo
set_threads(1)
assert torch.get_num_threads() == 1
measured = evaluate(zoo.make_kernel(), make_subject(zoo.tensor(), 1, zoo.DEVICE), budget=zoo.BUDGET)
assert measured.status == "ok", measured
assert measured.timing.pinned is False
assert "numba" not in sys.modules
"""


def test_timing_works_without_numba():
    root = Path(timers.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_NUMBA],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
