import pytest
import torch

from autotune import memory

MIB = 1 << 20


@pytest.fixture
def known():
    if memory.peak_during(lambda: None, "cpu") is None:
        pytest.skip("this system doesn't tell a process's peak memory")


def test_the_worst_moment_of_a_call_counts_though_it_is_over(known):
    def call():
        torch.ones(16 * MIB)  # 64 MiB, freed at once

    assert 60 * MIB < memory.peak_during(call, "cpu") < 80 * MIB


def test_what_was_allocated_before_does_not_count(known):
    held = torch.ones(16 * MIB)
    assert memory.peak_during(lambda: None, "cpu") <= memory.SLACK
    del held
    assert memory.peak_during(lambda: None, "cpu") <= memory.SLACK


def test_memory_that_the_allocator_had_kept_counts(known):
    def call():
        return [bytearray(50_000) for _ in range(1000)]

    held = call()
    top = bytearray(50_000)  # keeps the heap from shrinking
    del held
    assert memory.peak_during(call, "cpu") > 40 * MIB
    assert top


def test_what_stays_counts_and_what_is_freed_does_not(known):
    kept, nbytes = memory.kept_by(lambda: torch.ones(16 * MIB), "cpu")
    assert kept.numel() == 16 * MIB
    assert 60 * MIB < nbytes < 80 * MIB
    _, nbytes = memory.kept_by(lambda: [torch.ones(16 * MIB) for _ in range(2)] and None, "cpu")
    assert nbytes < memory.SLACK


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError])
def test_an_error_of_the_call_is_not_mistaken_for_the_systems(error):
    calls = []

    def call():
        calls.append(1)
        raise error("the call's own")

    with pytest.raises(error, match="the call's own"):
        memory.peak_during(call, "cpu")
    assert len(calls) == 1


def test_a_system_that_tells_nothing_gives_none_after_one_call(monkeypatch):
    def unreadable(field):
        raise KeyError(field)

    monkeypatch.setattr(memory, "_status_bytes", unreadable)
    calls = []
    assert memory.peak_during(lambda: calls.append(1), "cpu") is None
    assert memory.resident_peak() is None
    assert calls == [1]
    assert memory.kept_by(lambda: "made", "cpu") == ("made", None)


def test_the_processs_peak_is_what_the_system_says(known):
    assert 50 * MIB < memory.resident_peak() < 1 << 40


def test_a_gpu_tells_by_its_allocator(monkeypatch):
    steps = []
    for name, value in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 100),
        ("max_memory_allocated", 130),
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda index, name=name, value=value: steps.append(name) or value
        )
    assert memory.peak_during(lambda: steps.append("call"), "cuda:0") == 30
    assert steps.index("reset_peak_memory_stats") < steps.index("call")
    assert steps[steps.index("call") + 1] == "synchronize"
    assert memory.kept_by(lambda: "made", "cuda:0") == ("made", 0)
