import dataclasses
import itertools
import json
import math
import time

import pytest
import torch

from autotune import evaluate as evaluation
from autotune import memory
from autotune.bandwidth import Bandwidth
from autotune.evaluate import Step, check, evaluate, evaluate_steps, make_subject
from autotune.measurement import Measurement
from tests.autotune import fake_cuda, zoo
from vqkernels import oracle
from vqkernels.kernel import Footprint, Packed
from vqkernels.space import Config
from vqkernels.tensor import random_tensor

SLOW_MEMORY = Bandwidth(1.0, 1.0, 1)  # every time is impossible at a byte a second
FAST_MEMORY = Bandwidth(1e18, 1e18, 1)


@pytest.fixture
def subject():
    return make_subject(zoo.tensor(), 3, zoo.DEVICE)


def attempt(kernel, subject, **options) -> Measurement:
    return evaluate(kernel, subject, **{"budget": zoo.BUDGET} | options)


def assert_refused(measured: Measurement, status: str, words: str) -> None:
    assert measured.status == status, measured
    assert words in measured.reason
    assert "\n" not in measured.reason
    assert measured.samples_s == ()
    assert measured.timing is None


def test_a_right_kernel_is_ok_and_tells_everything(subject):
    measured = attempt(zoo.make_kernel(), subject, bandwidth=FAST_MEMORY)
    assert (measured.status, measured.reason) == ("ok", "")
    assert len(measured.samples_s) == zoo.BUDGET.max_samples
    assert 0 <= measured.correctness.worst <= 1
    assert measured.correctness.controls == subject.controls
    assert measured.weight_bytes == 4 * 37 * 22
    assert measured.moved_bytes == 4 * (37 * 22 + 3 * 22 + 3 * 37)
    assert measured.flops == 2 * 3 * 37 * 22
    assert measured.floor_s == pytest.approx(measured.weight_bytes / 1e18 / 1.25)
    assert measured.compile_s > 0
    assert json.loads(json.dumps(measured.to_dict(), allow_nan=False))


def test_each_negative_control_of_a_subject_is_caught(subject):
    assert len(subject.controls) == 7
    assert all(subject.controls.values()), subject.controls


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_bad_kernel_is_a_status_with_a_reason(name, subject):
    make, status, words = zoo.ZOO[name]
    assert_refused(attempt(make(), subject), status, words)


@pytest.mark.parametrize("m", [1, 2, 17])
def test_a_kernel_that_is_right_for_one_m_only_is_caught(m):
    def first_tokens(packed, x, out):
        zoo.right(packed, x, out)
        out[1:] = 0

    measured = attempt(zoo.make_kernel(first_tokens), make_subject(zoo.tensor(), m, zoo.DEVICE))
    assert measured.status == ("ok" if m == 1 else "incorrect")


# The check makes calls 1 and 2, another weight 3, the own one in its place 4; then one to warm up,
# 9 samples, and twice three with other contents.
CHECKED, AFTER = 4, 6
LAST_TIMED = CHECKED + 1 + 9


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 9])
def test_a_kernel_that_is_right_first_and_wrong_later_is_caught(subject, calls):
    kernel = zoo.make_kernel(zoo.after(calls, zoo.zeros))
    assert_refused(attempt(kernel, subject), "incorrect", "times its bound")


def test_a_kernel_that_is_wrong_only_while_it_is_timed_is_caught(subject):
    timed = zoo.after(CHECKED, zoo.zeros)
    done = []

    def run(packed, x, out):
        done.append(1)
        (timed if len(done) <= LAST_TIMED else zoo.right)(packed, x, out)

    measured = attempt(zoo.make_kernel(run), subject)
    assert_refused(measured, "incorrect", "times its bound")
    assert len(done) == LAST_TIMED


@pytest.mark.parametrize("calls", [1, 2, 3, 9, LAST_TIMED, LAST_TIMED + 1])
def test_a_kernel_that_fails_later_is_a_status(subject, calls):
    measured = attempt(zoo.make_kernel(zoo.after(calls, zoo.raising)), subject)
    assert_refused(measured, "runtime", "ZeroDivisionError: first line")


def test_a_kernel_that_stops_working_while_its_output_stands_is_caught(subject):
    kernel = zoo.make_kernel(zoo.after(9, zoo.lazy))
    assert_refused(attempt(kernel, subject), "incorrect", "times its bound")


def test_a_kernel_that_remembers_its_outputs_is_caught(subject):
    kernel = zoo.make_kernel(zoo.remembering())
    assert_refused(attempt(kernel, subject), "incorrect", "times its bound")


def test_the_guards_hold_while_timing_too(subject):
    kernel = zoo.make_kernel(zoo.after(6, zoo.writing_behind))
    assert_refused(attempt(kernel, subject), "incorrect", "writes outside its output")


def test_a_hidden_copy_is_found_and_a_declared_one_is_not(subject):
    if memory.peak_during(lambda: None, "cpu") is None:
        pytest.skip("this system doesn't tell a process's peak memory")
    assert_refused(attempt(zoo.make_kernel(zoo.greedy), subject), "incorrect", "a hidden copy")

    def declare(config, problem, device):
        return Footprint(4 * problem.n * problem.k, 64 << 20, problem.flops)

    declared = attempt(zoo.make_kernel(zoo.greedy, footprint=declare), subject)
    assert declared.status == "ok"
    assert declared.peak_bytes > 60 << 20


def test_an_unknown_peak_is_recorded_as_unknown(subject, monkeypatch):
    monkeypatch.setattr(memory, "peak_during", lambda call, place: call())
    measured = attempt(zoo.make_kernel(zoo.greedy), subject)
    assert (measured.status, measured.peak_bytes) == ("ok", None)


def test_an_impossible_time_is_no_record(subject, monkeypatch):
    monkeypatch.setattr(evaluation, "measure_bandwidth", lambda device: SLOW_MEMORY)
    measured = attempt(zoo.make_kernel(), subject, bandwidth=SLOW_MEMORY)
    assert_refused(measured, "incorrect", "below the floor")


def test_memory_that_was_read_at_a_bad_moment_refuses_nothing(subject, monkeypatch):
    """The floor is that of the faster reading of two; a plausible time asks for no second one."""
    monkeypatch.setattr(evaluation, "measure_bandwidth", lambda device: FAST_MEMORY)
    measured = attempt(zoo.make_kernel(), subject, bandwidth=SLOW_MEMORY)
    assert measured.status == "ok"
    assert measured.floor_s == pytest.approx(measured.weight_bytes / 1e18 / 1.25)
    monkeypatch.setattr(evaluation, "measure_bandwidth", lambda device: pytest.fail("not asked"))
    assert attempt(zoo.make_kernel(), subject, bandwidth=FAST_MEMORY).status == "ok"


def test_a_weight_in_cache_has_no_floor(subject):
    measured = attempt(zoo.make_kernel(), subject, bandwidth=SLOW_MEMORY, cold=False)
    assert (measured.status, measured.floor_s) == ("ok", None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(tile=9), "tile=9 is not one of"),
        (Config(), "tile is missing"),
        (Config(tile=8, depth=2), "no parameter 'depth'"),
    ],
)
def test_a_config_outside_the_space_is_a_constraint(subject, config, words):
    assert_refused(attempt(zoo.make_kernel(), subject, config=config), "constraint", words)


def test_the_config_that_is_given_is_the_one_that_runs(subject):
    seen = []

    def compile(config, problem, device):
        seen.append(config)
        return zoo.right

    kernel = zoo.make_kernel(compile=compile)
    attempt(kernel, subject, config=Config(tile=16))
    attempt(kernel, subject)
    assert seen == [Config(tile=16), Config(tile=8)]


def test_cold_rotates_over_copies_and_hot_keeps_one(subject):
    seen = {}

    def remember(packed, x, out):
        seen.setdefault(packed["weight"].data_ptr(), packed)
        zoo.right(packed, x, out)

    budget = dataclasses.replace(zoo.BUDGET, min_samples=200, max_samples=200)
    cold = attempt(zoo.make_kernel(remember), subject, budget=budget)
    assert cold.timing.cache["codes"] == "cold"
    assert cold.timing.copies == len(seen) - 2 > 2 * zoo.DEVICE.llc_bytes / cold.weight_bytes
    seen.clear()
    hot = attempt(zoo.make_kernel(remember), subject, budget=budget, cold=False)
    assert hot.timing.cache["codes"] == "hot"
    assert hot.timing.copies == len(seen) - 2 == 1  # beside those that were checked


def test_consecutive_timed_calls_see_other_activations(subject):
    seen = []

    def watch(packed, x, out):
        seen.append(float(x[0, 0]))
        zoo.right(packed, x, out)

    for cold in (True, False):
        seen.clear()
        attempt(zoo.make_kernel(watch), subject, cold=cold)
        timed = seen[CHECKED:LAST_TIMED]
        assert all(one != other for one, other in itertools.pairwise(timed))


@pytest.mark.parametrize("run", [zoo.spoiling_x, zoo.after(2, zoo.spoiling_x)])
def test_a_kernel_that_spoils_x_leaves_the_subject_whole(subject, run):
    before = [x.clone() for x in subject.xs]
    attempt(zoo.make_kernel(run), subject)
    assert all(torch.equal(one, other) for one, other in zip(before, subject.xs, strict=True))
    assert attempt(zoo.make_kernel(), subject).status == "ok"


def test_a_kernel_that_spoils_its_weight_leaves_the_subject_whole(subject):
    def run(packed, x, out):
        packed["codes"].zero_()

    big = zoo.make_kernel(run, pack=zoo.shared, footprint=lambda *_: Footprint(1 << 20, 0, 1))
    before = subject.tensor.decode()
    attempt(big, subject)
    assert torch.equal(subject.tensor.decode(), before)


def test_packed_words_of_any_type_are_compared(subject):
    def pack(tensor, config, problem):
        words = torch.arange(5, dtype=torch.int32).to(torch.uint16)
        nan = torch.tensor(math.nan)
        return Packed({"weight": tensor.decode(torch.float32), "words": words, "pad": nan})

    kernel = zoo.make_kernel(pack=pack, footprint=lambda *_: Footprint(1 << 20, 0, 1))
    assert attempt(kernel, subject).status == "ok"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_or_infinity_belongs_where_the_reference_has_it(subject, value):
    xs = tuple(x.clone() for x in subject.xs)
    for x in xs:
        x[1, 5] = value
    references = tuple(oracle.reference(subject.tensor, x) for x in xs)
    spoilt = dataclasses.replace(subject, xs=xs, references=references)
    assert attempt(zoo.make_kernel(), spoilt).status == "ok"
    hidden = attempt(zoo.make_kernel(zoo.hiding_nan), spoilt)
    assert_refused(hidden, "incorrect", "error inf times its bound")


def test_an_interrupt_is_not_swallowed(subject):
    def interrupted(packed, x, out):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(zoo.make_kernel(interrupted), subject)


def test_a_failure_without_a_message_still_has_a_reason(subject):
    def run(packed, x, out):
        raise RuntimeError

    measured = attempt(zoo.make_kernel(run), subject)
    assert_refused(measured, "runtime", "RuntimeError: no message")


def test_an_empty_pack_is_a_wrong_kernel_and_no_crash(subject):
    kernel = zoo.make_kernel(lambda packed, x, out: None, pack=lambda *_: Packed({}))
    assert_refused(attempt(kernel, subject), "incorrect", "times its bound")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_x_is_rounded_before_the_reference_sees_it(dtype):
    subject = make_subject(zoo.tensor(bias=True), 2, zoo.DEVICE, dtype=dtype)
    assert subject.xs[0].dtype == getattr(torch, dtype)
    assert (subject.problem.dtype, subject.problem.bias) == (dtype, True)
    exact = subject.xs[1].double() @ subject.tensor.decode().T + subject.tensor.bias.double()
    assert torch.allclose(subject.references[1].y, exact, rtol=1e-12)


def test_a_subject_is_made_again_from_its_seed():
    one, again, other = (make_subject(zoo.tensor(), 2, zoo.DEVICE, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.xs, again.xs, strict=True))
    assert not torch.equal(one.xs[0], other.xs[0])
    assert not torch.equal(one.xs[0], one.xs[1])


@pytest.mark.parametrize(("has", "status"), [(1000, "constraint"), (1024, "ok"), (None, "ok")])
def test_more_shared_memory_than_a_block_has_is_refused_before_it_is_compiled(has, status):
    def footprint(config, problem, device):
        return Footprint(4 * problem.n * problem.k, 0, problem.flops, shared_bytes=1024)

    def compile(config, problem, device):
        compiled.append(config)
        return zoo.right

    compiled = []
    device = dataclasses.replace(zoo.DEVICE, shared_bytes=has)
    kernel = zoo.make_kernel(footprint=footprint, compile=compile)
    measured = attempt(kernel, make_subject(zoo.tensor(), 2, device))
    assert measured.status == status
    if status == "constraint":
        assert measured.reason == "needs 1,024 bytes of shared memory a block; Test has 1,000"
        assert not compiled


def test_a_call_that_is_right_but_too_long_is_not_timed(subject):
    def slow(packed, x, out):
        time.sleep(0.6)
        zoo.right(packed, x, out)

    # far from what an honest call takes, however busy the machine is
    budget = dataclasses.replace(zoo.BUDGET, longest_call_s=0.5)
    measured = attempt(zoo.make_kernel(slow), subject, budget=budget)
    assert_refused(measured, "constraint", "right, but a call takes 0.6")
    assert measured.correctness is not None
    assert attempt(zoo.make_kernel(), subject, budget=budget).status == "ok"


@pytest.mark.parametrize("nbytes", [30 << 10, 40 << 10, 70 << 10])
def test_no_copy_comes_twice_in_a_row_when_cold(nbytes):
    seen = []

    def remember(packed, x, out):
        seen.append((packed["weight"].data_ptr(), x.data_ptr()))
        zoo.right(packed, x, out)

    subject = make_subject(zoo.tensor(nbytes // 4 // 128, 128), 3, zoo.DEVICE)
    budget = dataclasses.replace(zoo.BUDGET, min_samples=40, max_samples=40)
    copies = attempt(zoo.make_kernel(remember), subject, budget=budget).timing.copies
    assert copies >= 2
    timed = seen[CHECKED + 1 : -AFTER]
    assert all(one[0] != other[0] for one, other in itertools.pairwise(timed))
    assert len(set(timed)) == 2 * copies or copies % 2 == 0


# Several layers as one call


@pytest.fixture
def layers():
    return [make_subject(zoo.tensor(n, k), 3, zoo.DEVICE) for n, k in ((37, 22), (16, 48), (5, 29))]


def steps(layers, *runs):
    return [Step(zoo.make_kernel(run), subject) for run, subject in zip(runs, layers, strict=True)]


def test_several_layers_are_one_call_in_order(layers):
    seen = []

    def watch(packed, x, out):
        seen.append(x.shape[1])
        zoo.right(packed, x, out)

    (measured,) = evaluate_steps(steps(layers, *[watch] * 3), timers=(None,), budget=zoo.BUDGET)
    assert measured.status == "ok"
    assert len(measured.samples_s) == 9
    assert seen[-3 * (1 + 9 + AFTER) :] == [22, 48, 29] * (1 + 9 + AFTER)  # from the warm-up on
    sizes = [subject.problem for subject in layers]
    assert measured.weight_bytes == sum(4 * one.n * one.k for one in sizes)
    assert measured.moved_bytes == measured.weight_bytes + sum(o.activation_bytes for o in sizes)
    assert measured.flops == sum(one.flops for one in sizes)
    assert measured.timing.copies * measured.weight_bytes > 2 * zoo.DEVICE.llc_bytes


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("calls", [0, 1, 3, 9])
def test_a_layer_that_is_wrong_at_any_time_spoils_the_call(layers, at, calls):
    runs = [zoo.right] * 3
    runs[at] = zoo.after(calls, zoo.zeros) if calls else zoo.zeros
    (measured,) = evaluate_steps(steps(layers, *runs), timers=(None,), budget=zoo.BUDGET)
    assert_refused(measured, "incorrect", "times its bound")


def test_each_timer_gives_a_measurement_and_one_that_fails_leaves_the_others(layers, monkeypatch):
    gpu = fake_cuda.install(monkeypatch)

    def run(packed, x, out):
        if gpu.capturing:
            raise RuntimeError("no graph with me")
        gpu.launch(1e-5, run=lambda: zoo.right(packed, x, out))

    device = dataclasses.replace(zoo.DEVICE, kind="cuda")
    subject = make_subject(zoo.tensor(), 3, device, place="cpu")
    event, graph = evaluate_steps(
        [Step(zoo.make_kernel(run), subject)],
        timers=("cuda_event", "cuda_graph"),
        budget=zoo.BUDGET,
    )
    assert (event.status, event.timing.timer) == ("ok", "cuda_event")
    assert_refused(graph, "runtime", "no graph with me")


# On a GPU that only keeps time


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU, its tensors on the CPU (`cpu:0`: another name, so that it is waited for)."""
    gpu = fake_cuda.install(monkeypatch)
    device = dataclasses.replace(zoo.DEVICE, kind="cuda")
    return gpu, make_subject(zoo.tensor(), 3, device, place="cpu:0")


def launching(gpu, run=zoo.right, seconds=1e-5):
    return zoo.make_kernel(
        lambda packed, x, out: gpu.launch(seconds, run=lambda: run(packed, x, out))
    )


@pytest.mark.parametrize("timer", ["cuda_event", "cuda_graph"])
def test_a_right_kernel_is_timed_by_either_timer(on_gpu, timer):
    gpu, subject = on_gpu
    measured = attempt(launching(gpu), subject, timer=timer)
    assert (measured.status, measured.timing.timer) == ("ok", timer)
    assert measured.samples_s == pytest.approx([1e-5] * len(measured.samples_s))


def test_a_graph_that_holds_nothing_is_no_result(on_gpu):
    gpu, subject = on_gpu

    def beside(packed, x, out):
        gpu.launch(1e-5)
        zoo.right(packed, x, out)  # on a stream of its own: never captured

    measured = attempt(zoo.make_kernel(beside), subject, timer="cuda_graph")
    assert_refused(measured, "incorrect", "times its bound")


def test_a_check_is_not_timed(subject):
    measured = check(zoo.make_kernel(), subject)
    assert (measured.status, measured.samples_s, measured.timing) == ("checked", (), None)
    assert measured.correctness.controls == subject.controls


def test_a_check_asks_for_the_same_bits_twice(subject):
    calls = []

    def drifting(packed, x, out):
        zoo.right(packed, x, out)
        calls.append(1)
        out *= 1 + len(calls) % 2 * 1e-6  # some ulps apart

    assert_refused(check(zoo.make_kernel(drifting), subject), "incorrect", "other bits")
    assert attempt(zoo.make_kernel(drifting), subject).status == "ok"  # within every bound


def test_a_check_asks_for_a_graph_on_a_gpu(on_gpu):
    gpu, subject = on_gpu
    assert check(launching(gpu), subject).status == "checked"
    assert len(gpu.graphs) == 1

    def waiting(packed, x, out):
        gpu.launch(1e-5, run=lambda: zoo.right(packed, x, out))
        gpu.synchronize()

    measured = check(zoo.make_kernel(waiting), subject)
    assert_refused(measured, "runtime", "in a CUDA graph: RuntimeError: operation not permitted")


def test_a_check_replays_the_graph_on_other_tokens(on_gpu):
    gpu, subject = on_gpu

    def stale(packed, x, out):
        kept = x.clone()  # what the host read while it captured
        gpu.launch(1e-5, run=lambda: zoo.right(packed, kept, out))

    assert_refused(check(zoo.make_kernel(stale), subject), "incorrect", "times its bound")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_check_refuses_every_bad_kernel(name, subject):
    make, status, words = zoo.ZOO[name]
    assert_refused(check(make(), subject), status, words)


def test_a_kernel_packs_on_the_cpu_unless_it_can_anywhere(on_gpu):
    places = []

    def pack(tensor, config, problem):
        places.append(tensor.parts["codes"].dtype)
        return Packed({"weight": tensor.decode(torch.float32)})

    spec = dataclasses.replace(zoo.SPEC, stages=(300, 16), code_bits=(9, 4))
    tensor = random_tensor(spec, 41, 64, fit=False)
    subject = make_subject(tensor, 2, zoo.DEVICE, place="cpu:0")
    for anywhere in (False, True):
        kernel = zoo.make_kernel(pack=pack, packs_anywhere=anywhere)
        assert attempt(kernel, subject).status == "ok"
    # CUDA has few operations on uint16
    assert places == [torch.uint16] * 2 + [torch.int32] * 2
