"""Predicted times: by hand, by what must grow with what, and what the tuner makes of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune import arms
from autotune.candidates import enumerate_space
from autotune.predict import RESOURCES, best_configs, predict, predict_work, predictable
from tests.autotune import zoo
from vqkernels.device import Device, detect_cpu, known_device, known_devices
from vqkernels.errors import BackendError
from vqkernels.kernel import Footprint, Kernel, registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config, Param, Space
from vqkernels.work import Work

# Round numbers: 1 GHz, 10 multiprocessors, 1 TB/s, an L2 of 2 TB/s.
GPU = Device(
    kind="cuda",
    name="Round",
    arch="sm_90",
    units=10,
    llc_bytes=1 << 20,
    memory_bytes=1 << 30,
    shared_bytes=64 << 10,
    bandwidth=1e12,
    flops={"float16": 1e14},
    multiprocessor={
        "l1_bytes": 128 << 10,
        "shared_bytes": 100 << 10,
        "threads": 1024,
        "blocks": 8,
        "registers": 65536,
        "issue_slots": 4,
        "wavefront_bytes": 128,
    },
    rates={
        "clock_hz": 1e9,
        "l2_bandwidth": 2e12,
        "launch_s": 1e-6,
        "l1_latency_clocks": 30,
        "l2_latency_clocks": 200,
        "memory_latency_clocks": 500,
    },
)
IDLE = Work(hbm_bytes=0, l2_bytes=0, wavefronts=0, instructions=0, blocks=10, warps=4, hbm_trips=0)
PROBLEM = Problem(m=1, n=4096, k=4096, spec=PRESETS["rq-2x256x8"], dtype="float16")


def work(**counts: float) -> Work:
    return dataclasses.replace(IDLE, **counts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "binds", "microseconds"),
    [
        ({"hbm_bytes": 9e6}, "hbm", 10),  # 9 us at the peak, 0.9 of which is reached
        ({"l2_bytes": 14e6}, "l2", 10),  # 7 us, 0.7
        ({"wavefronts": 90_000}, "shared", 10),  # 9,000 clocks in each of ten, 0.9
        ({"instructions": 320_000}, "issue", 10),  # 32,000 in each, four a clock, 0.8
        ({"tensor_flops": 7.5e8}, "tensor", 10),  # 7.5 us, 0.75
        ({"hbm_trips": 20}, "latency", 10),
        ({"l2_trips": 50}, "latency", 10),
        ({"shared_trips": 1000 / 3}, "latency", 10),
    ],
)
def test_each_resource_by_hand(counts: dict[str, float], binds: str, microseconds: float) -> None:
    found = predict_work([work(**counts)], GPU)
    assert found.binds == binds
    assert found.by_resource[binds] == pytest.approx(microseconds * 1e-6)
    assert found.seconds == pytest.approx((microseconds + 1) * 1e-6)
    assert found.fixed_s == pytest.approx(1e-6)


def test_a_launch_takes_its_slowest_resource_and_launches_add_up() -> None:
    one, other = work(hbm_bytes=9e6, l2_bytes=7e6), work(instructions=320_000)
    assert predict_work([one], GPU).seconds == pytest.approx(11e-6)
    both = predict_work([one, other, IDLE], GPU)
    assert both.seconds == pytest.approx(23e-6)
    assert both.fixed_s == pytest.approx(3e-6)
    assert set(both.by_resource) == set(RESOURCES)


def test_small_launches_cost_what_a_launch_costs() -> None:
    assert predict_work([IDLE], GPU).binds == "fixed"


def test_the_busiest_multiprocessor_decides() -> None:
    """Eleven blocks on ten: one has two, twice what ten blocks of that size take."""
    ten = predict_work([work(wavefronts=90_000)], GPU).by_resource["shared"]
    eleven = predict_work([work(wavefronts=99_000, blocks=11)], GPU).by_resource["shared"]
    assert eleven == pytest.approx(2 * ten)
    # main memory is everyone's
    assert predict_work([work(hbm_bytes=9e6, blocks=11)], GPU).by_resource["hbm"] == 1e-5


@pytest.mark.parametrize(
    ("changes", "waves"),
    [
        ({"blocks": 80}, 1),  # eight blocks of 128 threads a multiprocessor
        ({"blocks": 81}, 2),
        ({"blocks": 80, "warps": 8}, 2),  # 1,024 threads
        ({"blocks": 80, "shared_bytes": 50 << 10}, 8),  # 51 KB of 100
        ({"blocks": 80, "shared_bytes": 49 << 10}, 4),
        ({"blocks": 80, "registers": 128}, 2),  # four of 16,384 registers
        ({"blocks": 10, "shared_bytes": 200 << 10}, 1),  # at least one, whatever the counts say
    ],
)
def test_latency_takes_a_turn_a_wave(changes: dict[str, int], waves: int) -> None:
    one = work(hbm_trips=2, **changes)
    assert predict_work([one], GPU).by_resource["latency"] == pytest.approx(waves * 1e-6)


def test_few_warps_do_not_hide_what_they_wait_for() -> None:
    """Ten microseconds of accesses and eight of waits: by four warps 10.5, by 16 the accesses."""
    one = {"wavefronts": 90_000, "hbm_trips": 16}
    four, many = (predict_work([work(**one, warps=warps)], GPU) for warps in (4, 16))
    assert (four.binds, many.binds) == ("latency", "shared")
    assert four.seconds == pytest.approx((8 + 10 / 4 + 1) * 1e-6)
    assert many.seconds == pytest.approx(11e-6)


def test_one_warp_issues_once_a_clock() -> None:
    """And has a quarter of the tensor cores to itself."""
    for name, count in (("issue", "instructions"), ("tensor", "tensor_flops")):
        one, four = (predict_work([work(**{count: 1e6}, warps=warps)], GPU) for warps in (1, 4))
        assert one.by_resource[name] == pytest.approx(4 * four.by_resource[name])
        # nothing to wait for: its own work is all that it does
        assert one.by_resource["latency"] == pytest.approx(one.by_resource[name])


counts = st.fixed_dictionaries(
    {
        "hbm_bytes": st.floats(0, 1e9),
        "l2_bytes": st.floats(0, 1e9),
        "wavefronts": st.floats(0, 1e7),
        "instructions": st.floats(0, 1e8),
        "tensor_flops": st.floats(0, 1e12),
        "hbm_trips": st.floats(0, 100),
    }
)


@given(counts, st.sampled_from(["hbm_bytes", "l2_bytes", "wavefronts", "instructions"]))
def test_more_of_anything_is_never_faster(given: dict[str, float], name: str) -> None:
    more = work(**{**given, name: 2 * given[name] + 1})
    assert predict_work([more], GPU).seconds >= predict_work([work(**given)], GPU).seconds


@given(counts)
def test_a_faster_device_is_never_slower(given: dict[str, float]) -> None:
    faster = dataclasses.replace(GPU, bandwidth=2e12, rates={**GPU.rates, "clock_hz": 2e9})
    one = [work(**given)]
    assert predict_work(one, faster).seconds <= predict_work(one, GPU).seconds


# ------------------------------------------------------------------------------------------------
# kernels

COUNTING = [kernel for kernel in registry().kernels.values() if kernel.work is not None]
SPACES = {kernel.id: enumerate_space(kernel.space) for kernel in COUNTING}


def test_every_kernel_that_launches_gpu_programs_counts_its_work() -> None:
    launching = [kernel for kernel in registry().kernels.values() if kernel.programs is not None]
    assert launching == COUNTING
    assert len(COUNTING) >= 11


@pytest.mark.parametrize("kernel", COUNTING, ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("name", known_devices())
def test_defaults_are_slower_than_memory(kernel: Kernel, name: str) -> None:
    """Nothing beats the time in which memory moves what is stored; more tokens take longer."""
    device, before = known_device(name), 0.0
    for m in (1, 16, 256):
        problem = dataclasses.replace(PROBLEM, m=m)
        if kernel.supports(problem, device):
            continue
        found = predict(kernel, kernel.default(PROBLEM, device), problem, device)
        assert device.bandwidth is not None
        assert found.seconds > problem.bytes / device.bandwidth
        assert found.seconds >= before
        before = found.seconds


@pytest.mark.parametrize("kernel", COUNTING, ids=lambda kernel: kernel.id)
@given(st.integers(10, 15), st.integers(10, 15), st.integers(0, 10**6))
def test_more_rows_are_never_faster(kernel: Kernel, one: int, other: int, number: int) -> None:
    """In any config. Of whole blocks, and rows of codes that always lie a multiple of 128 apart."""
    h100, candidates = known_device("h100"), SPACES[kernel.id]
    config = candidates[number % len(candidates)]
    fewer, more = (
        predict(kernel, config, dataclasses.replace(PROBLEM, n=1 << bits), h100)
        for bits in sorted((one, other))
    )
    assert fewer.seconds <= more.seconds * (1 + 1e-9)


@pytest.mark.parametrize("kernel", COUNTING, ids=lambda kernel: kernel.id)
def test_every_format_and_some_configs_can_be_predicted(kernel: Kernel) -> None:
    """Finite, above the fixed cost, and never fewer launches than one."""
    device, candidates = known_device("h100"), SPACES[kernel.id]
    configs = candidates[:: max(1, len(candidates) // 5)]
    taken = 0
    for spec in PRESETS.values():
        problem = dataclasses.replace(PROBLEM, spec=spec, n=1024, k=1024)
        if kernel.supports(problem, device):
            continue
        taken += 1
        for config in configs:
            found = predict(kernel, config, problem, device)
            assert found.fixed_s < found.seconds < math.inf
    assert taken


def test_what_cant_be_predicted_says_why() -> None:
    h100 = known_device("h100")
    dense, naive = registry()["torch/dense"], registry()["cuda/naive"]
    assert predictable(dense, h100) == "torch/dense doesn't say what its configs do"
    assert "rates are unknown" in str(predictable(naive, dataclasses.replace(h100, rates={})))
    assert "rates are unknown" in str(predictable(naive, detect_cpu()))
    for call in (
        lambda: predict(dense, Config(), PROBLEM, h100),
        lambda: best_configs(dense, enumerate_space(dense.space), PROBLEM, h100, 1),
    ):
        with pytest.raises(BackendError, match="doesn't say"):
            call()


# ------------------------------------------------------------------------------------------------
# what the tuner makes of them

SIDES = Space(tuple(Param(name, tuple(range(40)), "") for name in ("a", "b", "c")))


def bowl(config: Config, _: Problem, __: Device) -> tuple[Work, ...]:
    """Fastest at a = 31, b = 5, c = 20; a block of b = 7 has more shared memory than there is."""
    a, b, c = (config.number(name) for name in ("a", "b", "c"))
    hbm = 1e6 * (1 + (a - 31) ** 2 + (b - 5) ** 2 + (c - 20) ** 2)
    return (work(hbm_bytes=hbm, shared_bytes=1 << 20 if b == 7 else 0),)


def bowls(**fields: object) -> Kernel:
    return zoo.make_kernel(
        space=SIDES,
        default=lambda problem, device: Config(a=0, b=0, c=20),
        footprint=lambda config, problem, device: Footprint(1, 0, 1),
        reads="codes",
        **{"work": bowl, **fields},
    )


def test_the_best_of_a_large_space_is_found_without_looking_at_all() -> None:
    seen: list[Config] = []

    def counting(config: Config, problem: Problem, device: Device) -> tuple[Work, ...]:
        seen.append(config)
        return bowl(config, problem, device)

    kernel, candidates = bowls(work=counting), enumerate_space(SIDES)
    found = best_configs(kernel, candidates, PROBLEM, GPU, 4)
    assert found[0][0] == Config(a=31, b=5, c=20)
    times = [prediction.seconds for _, prediction in found]
    assert times == sorted(times)
    assert len(set(seen)) < len(candidates) / 20
    assert not any(
        config["b"] == 7 for config, _ in best_configs(kernel, candidates, PROBLEM, GPU, 99)
    )


def test_the_best_is_no_slower_than_the_default_and_none_is_there_twice() -> None:
    """Where all is alike but the default, which a sample of 400 in 64,000 misses."""

    def flat(config: Config, _: Problem, __: Device) -> tuple[Work, ...]:
        default = config == Config(a=0, b=0, c=20)
        return (work(hbm_bytes=1e6 if default else 2e6),)

    found = best_configs(bowls(work=flat), enumerate_space(SIDES), PROBLEM, GPU, 9)
    assert found[0][0] == Config(a=0, b=0, c=20)
    assert len(found) == 2


def test_an_arm_begins_with_what_is_predicted_to_be_fastest() -> None:
    (arm,) = arms.arms([bowls()], PROBLEM, GPU, None)
    assert arm.first[0] == Config(a=31, b=5, c=20)
    assert len(arm.first) == 2


def test_a_hopeless_config_is_pruned_with_its_reason() -> None:
    (arm,) = arms.arms([bowls()], PROBLEM, GPU, None)
    best = 2e-6
    assert arm.prune(Config(a=0, b=0, c=20), None) is None
    assert arm.prune(Config(a=31, b=5, c=20), best) is None
    # 9 MB: 10 us and the launch
    assert (
        arm.prune(Config(a=29, b=3, c=20), best)
        == "predicted to take more than 5 times the best time"
    )
    assert arm.prune(Config(a=29, b=3, c=20), 2.3e-6) is None


@pytest.mark.parametrize(
    ("kernel", "device"), [(bowls(work=None), GPU), (bowls(), dataclasses.replace(GPU, rates={}))]
)
def test_nothing_changes_where_nothing_is_predicted(kernel: Kernel, device: Device) -> None:
    (arm,) = arms.arms([kernel], PROBLEM, device, None)
    assert arm.first == ()
    assert arm.prune(Config(a=0, b=0, c=20), 1e-12) is None


def test_a_kernel_that_fails_to_count_is_searched_without() -> None:
    (arm,) = arms.arms([bowls(work=zoo.raising)], PROBLEM, GPU, None)
    assert arm.first == ()
    assert arm.prune(Config(a=0, b=0, c=20), 1e-12) is None
