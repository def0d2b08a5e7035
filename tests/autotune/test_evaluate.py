import dataclasses
import itertools
import json
import math

import pytest
import torch

from autotune import memory
from autotune.bandwidth import Bandwidth
from autotune.evaluate import evaluate, make_subject
from autotune.measurement import Measurement
from tests.autotune import zoo
from vqkernels import oracle
from vqkernels.kernel import Footprint, Packed
from vqkernels.space import Config

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


# The check makes calls 1 and 2, the peak call 3, then one to warm up, 9 samples, and a last check.
LAST_TIMED = 3 + 1 + 9


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 9])
def test_a_kernel_that_is_right_first_and_wrong_later_is_caught(subject, calls):
    kernel = zoo.make_kernel(zoo.after(calls, zoo.zeros))
    assert_refused(attempt(kernel, subject), "incorrect", "times its bound")


def test_a_kernel_that_is_wrong_only_while_it_is_timed_is_caught(subject):
    timed = zoo.after(3, zoo.zeros)
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
    if memory.peak_during(lambda: None, zoo.DEVICE) is None:
        pytest.skip("this system doesn't tell a process's peak memory")
    assert_refused(attempt(zoo.make_kernel(zoo.greedy), subject), "incorrect", "a hidden copy")

    def declare(config, problem, device):
        return Footprint(4 * problem.n * problem.k, 64 << 20, problem.flops)

    declared = attempt(zoo.make_kernel(zoo.greedy, footprint=declare), subject)
    assert declared.status == "ok"
    assert declared.peak_bytes > 60 << 20


def test_an_unknown_peak_is_recorded_as_unknown(subject, monkeypatch):
    monkeypatch.setattr(memory, "peak_during", lambda call, device: call())
    measured = attempt(zoo.make_kernel(zoo.greedy), subject)
    assert (measured.status, measured.peak_bytes) == ("ok", None)


def test_an_impossible_time_is_no_record(subject):
    measured = attempt(zoo.make_kernel(), subject, bandwidth=SLOW_MEMORY)
    assert_refused(measured, "incorrect", "below the floor")


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
    assert cold.timing.copies == len(seen) - 1 > 2 * zoo.DEVICE.llc_bytes / cold.weight_bytes
    seen.clear()
    hot = attempt(zoo.make_kernel(remember), subject, budget=budget, cold=False)
    assert hot.timing.cache["codes"] == "hot"
    assert hot.timing.copies == len(seen) - 1 == 1


def test_consecutive_timed_calls_see_other_activations(subject):
    seen = []

    def watch(packed, x, out):
        seen.append(float(x[0, 0]))
        zoo.right(packed, x, out)

    for cold in (True, False):
        seen.clear()
        attempt(zoo.make_kernel(watch), subject, cold=cold)
        timed = seen[3:LAST_TIMED]
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
