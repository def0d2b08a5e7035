import dataclasses
import json
import statistics
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.measurement import Correctness, Measurement, Status, Timing

STATUSES = get_args(Status)
CORRECT = Correctness(worst=0.5, max_abs=1e-6, relative_rms=1e-7, controls={"zeros": True})

finite = st.floats(0, 1e12, allow_nan=False)
sizes = st.none() | st.integers(0, 1 << 60)
timings = st.builds(
    Timing,
    timer=st.sampled_from(["perf_counter", "cuda_event"]),
    warmup_s=finite,
    copies=st.integers(1, 10_000),
    cache=st.dictionaries(st.text(max_size=5), st.sampled_from(["hot", "cold"])),
    threads=sizes,
    pinned=st.none() | st.booleans(),
)
corrects = st.builds(
    Correctness,
    worst=finite,
    max_abs=finite,
    relative_rms=finite,
    controls=st.dictionaries(st.text(max_size=5), st.booleans()),
)


@st.composite
def measurements(draw):
    status = draw(st.sampled_from(STATUSES))
    right = status in ("ok", "checked")
    return Measurement(
        status=status,
        reason="" if right else draw(st.text(min_size=1, max_size=20)),
        samples_s=tuple(draw(st.lists(finite, min_size=1))) if status == "ok" else (),
        timing=draw(st.none() | timings),
        correctness=draw(corrects if right else st.none() | corrects),
        floor_s=draw(st.none() | finite),
        compile_s=draw(st.none() | finite),
        **{name: draw(sizes) for name in ("weight_bytes", "peak_bytes", "moved_bytes", "flops")},
    )


@given(measurements())
def test_json_gives_back_the_same_measurement(measured):
    text = json.dumps(measured.to_dict(), allow_nan=False)
    assert Measurement.from_dict(json.loads(text)) == measured


@given(st.lists(finite, min_size=1, max_size=9))
def test_median_is_derived_and_lies_among_the_samples(samples):
    measured = Measurement(status="ok", samples_s=tuple(samples), correctness=CORRECT)
    assert min(samples) <= measured.median_s <= max(samples)
    assert not {"median_s", "spread"} & set(measured.to_dict())
    assert measured.samples_s == tuple(samples)  # neither sorted nor rounded


def test_median_and_spread_of_known_samples():
    measured = Measurement(status="ok", samples_s=(5.0, 1.0, 2.0, 4.0, 3.0), correctness=CORRECT)
    assert measured.median_s == 3.0
    assert measured.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)


@given(st.floats(1e-9, 1e3), st.integers(1, 9))
def test_equal_samples_have_no_spread(seconds, count):
    measured = Measurement(status="ok", samples_s=(seconds,) * count, correctness=CORRECT)
    assert measured.median_s == seconds
    assert measured.spread == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("status", STATUSES)
def test_samples_exist_exactly_when_ok(status):
    fields = {"status": status, "correctness": CORRECT}
    fields["reason"] = "" if status in ("ok", "checked") else "why"
    samples = {} if status == "ok" else {"samples_s": (1.0,)}
    with pytest.raises(ValueError, match="samples exist exactly when"):
        Measurement(**fields, **samples)


@pytest.mark.parametrize("status", STATUSES)
def test_a_reason_goes_with_what_went_wrong_and_only_with_it(status):
    right = status in ("ok", "checked")
    samples = (1.0,) if status == "ok" else ()
    with pytest.raises(ValueError, match="a reason goes with"):
        Measurement(
            status=status,
            reason="why" if right else "",
            samples_s=samples,
            correctness=CORRECT,
        )


@pytest.mark.parametrize(("status", "samples"), [("ok", (1.0,)), ("checked", ())])
def test_nothing_is_right_that_the_oracle_has_not_seen(status, samples):
    with pytest.raises(ValueError, match="oracle"):
        Measurement(status=status, samples_s=samples)


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="'fine' is not one of"):
        Measurement(status="fine", reason="why")


def test_a_measurement_is_not_changed_afterwards():
    measured = Measurement(status="timeout", reason="why")
    with pytest.raises(dataclasses.FrozenInstanceError):
        measured.status = "ok"


def test_a_record_of_another_shape_is_not_a_measurement():
    fields = Measurement(status="timeout", reason="why").to_dict()
    with pytest.raises(TypeError, match="unexpected"):
        Measurement.from_dict({**fields, "median": 1.0})


def test_the_median_is_the_statisticians():
    samples = (0.3, 0.1, 0.2, 0.4)
    measured = Measurement(status="ok", samples_s=samples, correctness=CORRECT)
    assert measured.median_s == statistics.median(samples) == 0.25
