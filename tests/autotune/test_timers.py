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
from autotune.timers import (
    Budget,
    cold_copies,
    default_timer,
    pinned_threads,
    set_threads,
    take_samples,
    taking_turns,
)
from tests.autotune import fake_cuda, zoo

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
    samples = take_samples(calls, CPU, count(7), cold=True)
    assert "".join(order) == "abcabcab"  # one to warm up, then 7
    assert len(samples.seconds) == 7
    assert samples.timing.copies == 3
    assert samples.replay is None


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
    samples = take_samples([call], CPU, budget, cold=True).seconds
    assert len(calls) == 20 + 3
    assert samples == pytest.approx([0.001] * 3)


def test_samples_are_seconds_of_one_call():
    samples = take_samples([lambda: time.sleep(0.003)] * 2, CPU, count(4), cold=False).seconds
    assert all(0.003 <= sample < 3 for sample in samples)


@pytest.mark.parametrize(
    ("seconds", "samples"), [(0.001, 4), (0.0175, 18), (60, 50)], ids=["least", "time", "most"]
)
def test_sampling_ends_by_time_between_its_least_and_most(clock, seconds, samples):
    _, call = ticking(clock, 0.001)
    budget = Budget(seconds=seconds, warmup_s=0, min_samples=4, max_samples=50)
    assert len(take_samples([call], CPU, budget, cold=True).seconds) == samples


@pytest.mark.parametrize(("cold", "state"), [(True, "cold"), (False, "hot")])
def test_how_it_was_timed_is_recorded(cold, state):
    budget = Budget(seconds=0.001, warmup_s=0.002, min_samples=3)
    timing = take_samples([lambda: None], CPU, budget, cold=cold).timing
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
    samples = take_samples([lambda: None], CPU, count(3), cold=True)
    assert samples.timing.pinned is False
    assert all(cores == CORES for cores in affinities().values())


@pytest.fixture
def gpu(monkeypatch):
    return fake_cuda.install(monkeypatch)


GPU = dataclasses.replace(CPU, kind="cuda", index=1)


def test_events_see_the_gpus_time_though_the_host_is_slower(gpu):
    order = []
    calls = [lambda name=name: (order.append(name), gpu.launch(5e-6, 1e-4)) for name in "abc"]
    samples = take_samples(calls, GPU, count(40), cold=True)
    assert len(samples.seconds) >= 40
    assert samples.seconds == pytest.approx([5e-6] * len(samples.seconds))
    turns = "".join(order)
    assert turns in "abc" * len(turns)  # in turns, also over batches that were taken again
    assert (samples.timing.timer, samples.timing.threads) == ("cuda_event", None)
    assert samples.timing.cache["codes"] == "cold"
    assert gpu.devices == {1}


def test_a_batch_that_the_host_queued_too_late_is_taken_again_behind_a_longer_spin(gpu):
    # 16 launches of 2 ms outlast the first spin; each batch that counts was queued in time
    samples = take_samples([lambda: gpu.launch(5e-6, 2e-3)], GPU, count(32), cold=True)
    assert samples.seconds == pytest.approx([5e-6] * len(samples.seconds))
    assert max(gpu.spins) > 16 * 2e-3 > gpu.spins[0]


def test_a_call_that_waits_for_the_gpu_can_not_be_timed(gpu):
    def waiting():
        gpu.launch(1e-5, 1e-5)
        gpu.synchronize()

    with pytest.raises(RuntimeError, match="waits for the GPU"):
        take_samples([waiting], GPU, count(3), cold=True)


def test_slow_calls_come_in_small_batches(gpu):
    calls = [lambda: gpu.launch(0.02, 1e-5)]
    samples = take_samples(calls, GPU, Budget(seconds=0.1, warmup_s=0), cold=True)
    assert len(samples.seconds) == 7  # the least, one by one: 0.14 s


def test_the_warm_up_is_waited_for_and_ends_by_time(gpu):
    calls = [lambda: gpu.launch(0.01, 1e-6)]
    take_samples(calls, GPU, Budget(seconds=0, warmup_s=0.1, min_samples=1), cold=True)
    assert gpu.now < 0.2  # ten calls to warm up, not the 100,000 that fit a queue


def test_a_graph_goes_round_all_copies_and_a_sample_is_a_call_of_it(gpu):
    order = []
    times = {"a": 1e-6, "b": 3e-6, "c": 5e-6}
    calls = [
        lambda name=name: (order.append(name), gpu.launch(times[name], 1e-4)) for name in times
    ]
    samples = take_samples(calls, GPU, count(8), cold=True, timer="cuda_graph")
    assert samples.timing.timer == "cuda_graph"
    assert samples.seconds == pytest.approx([3e-6] * len(samples.seconds))
    (graph,) = gpu.graphs
    # captured in order, and long enough that what comes before its first kernel is nothing
    assert graph.kernels[:3] == list(times.values())
    assert len(graph.kernels) % 3 == 0
    assert sum(graph.kernels) >= 1e-3
    assert graph.warmed_up_on_a_stream_of_its_own
    before = graph.replays
    samples.replay()
    assert graph.replays == before + 1


def test_a_graphs_replays_are_queued_behind_a_spin_too(gpu):
    samples = take_samples(
        [lambda: gpu.launch(1e-3, 1e-5)], GPU, count(4), cold=True, timer="cuda_graph"
    )
    assert samples.seconds == pytest.approx([1e-3] * 4)
    assert all(graph.replays_behind_work == graph.replays for graph in gpu.graphs)


def test_the_timer_of_a_device_is_events_or_the_clock():
    assert (default_timer(GPU), default_timer(CPU)) == ("cuda_event", "perf_counter")


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


class Asked:
    """Turns that are granted at once, and what was asked for between calls."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def wait(self) -> None:
        self.said.append("wait")

    def done(self) -> None:
        self.said.append("done")


def test_samples_are_taken_in_turns_that_share_the_budget() -> None:
    asked = Asked()
    budget = Budget(seconds=0.05, warmup_s=0, min_samples=10, max_samples=20)
    with taking_turns(asked):
        found = take_samples([lambda: asked.said.append("call")], CPU, budget, cold=True)
    turns = [len(turn.split()) for turn in " ".join(asked.said).split("wait")[1:]]
    assert asked.said[-1] == "done"
    assert len(turns) == 5, "of 10 ms each"
    # a warm-up call each, then 2 to 4 samples; the last turn ends with "done"
    assert all(3 <= calls <= 6 for calls in turns)
    assert 10 <= len(found.seconds) <= 20
    assert len(found.seconds) == asked.said.count("call") - 5
    asked.said.clear()
    take_samples([lambda: None], CPU, budget, cold=True)
    assert not asked.said, "outside nobody is asked"


def test_turns_of_a_gpu(monkeypatch) -> None:
    gpu, asked = fake_cuda.install(monkeypatch), Asked()
    budget = Budget(seconds=0.03, warmup_s=0, min_samples=3, max_samples=30)
    for timer in ("cuda_event", "cuda_graph"):
        asked.said.clear()
        with taking_turns(asked):
            found = take_samples(
                [lambda: gpu.launch(1e-3)] * 2, GPU, budget, cold=True, timer=timer
            )
        assert asked.said == ["wait"] * 3 + ["done"], timer
        assert found.seconds == pytest.approx([1e-3] * len(found.seconds))
