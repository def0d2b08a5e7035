import csv
import io
import json

import pytest

from autotune.measurement import Correctness, Measurement
from bench import report
from bench.tables import render

CORRECT = Correctness(worst=0.1, max_abs=0.1, relative_rms=0.1, controls={})
BANDWIDTH = {"median": 5e9, "best": 10e9, "nbytes": 1}


def record(kernel="torch/dense", seconds=None, status="ok", reason="", **fields):
    """A record with what a report reads; samples around `seconds`."""
    spread = (0.9, 1.0, 1.1) if seconds else ()
    measured = Measurement(
        status=status,
        reason=reason,
        samples_s=tuple(seconds * part for part in spread),
        correctness=CORRECT,
        weight_bytes=2_000_000,
        peak_bytes=fields.pop("peak_bytes", 500_000),
        moved_bytes=3_000_000,
    )
    case = {
        "workload": "w",
        "layer": "a",
        "n": 8,
        "k": 4,
        "format": "f",
        "m": 1,
        "dtype": "float32",
    }
    return {
        **case,
        "kernel": kernel,
        "effective_bits": 2.5,
        "bandwidth": BANDWIDTH,
        **fields,
        **measured.to_dict(),
    }


def refused(kernel, reason, **fields):
    return record(kernel, status="constraint", reason=reason, **fields)


def test_a_row_derives_what_the_table_shows():
    (row,) = report.detail_rows([record(seconds=1e-3)])
    assert row["median_us"] == pytest.approx(1000)
    assert row["spread_percent"] == pytest.approx(5)
    assert row["moved_mb"] == 3.0
    assert row["weight_mb"] == 2.0
    assert row["peak_mb"] == 0.5
    assert row["bits"] == 2.5
    assert row["bandwidth_percent"] == pytest.approx(30)  # of the best rate: 10 GB/s
    assert row["speedup"] == pytest.approx(1)


def test_an_unknown_peak_stays_unknown():
    (row,) = report.detail_rows([record(seconds=1e-3, peak_bytes=None)])
    assert row["peak_mb"] is None


@pytest.mark.parametrize("other", [{"m": 2}, {"layer": "b"}, {"format": "g"}, {"workload": "v"}])
def test_speed_is_set_against_the_dense_baseline_of_the_same_case_only(other):
    rows = report.detail_rows(
        [
            record(seconds=8.0),
            record("fast", seconds=2.0),
            record("slow", seconds=16.0),
            record(seconds=100.0, **other),
            record("fast", seconds=4.0, **other),
        ]
    )
    assert [row["speedup"] for row in rows] == pytest.approx([1, 4, 0.5, 1, 25])


def test_without_a_dense_baseline_there_is_no_speedup():
    failed = record(status="incorrect", reason="wrong")
    rows = report.detail_rows([failed, record("fast", seconds=2.0)])
    assert rows[1]["speedup"] is None


def test_a_failure_is_a_row_with_its_reason_and_no_times():
    (row,) = report.detail_rows([record("bad", status="runtime", reason="why")])
    assert (row["status"], row["reason"]) == ("runtime", "why")
    assert "median_us" not in row


def test_layers_of_one_shape_are_merged_into_their_median():
    times = {"a": 1.0, "b": 3.0, "c": 8.0}
    rows = report.summary_rows([record(seconds=s, layer=layer) for layer, s in times.items()])
    (row,) = rows
    assert row["layer"] == "3 of 8x4"
    assert row["median_us"] == pytest.approx(3e6)
    assert row["m"] == 1


@pytest.mark.parametrize("other", [{"n": 9}, {"k": 5}, {"format": "g"}, {"m": 2}])
def test_other_shapes_formats_and_m_are_not_merged(other):
    rows = report.summary_rows([record(seconds=1.0), record(seconds=2.0, **other)])
    assert len(rows) == 2
    assert rows[0]["layer"] == "a 8x4"


def test_what_failed_is_not_merged_with_what_is_right():
    rows = report.summary_rows(
        [record(seconds=1.0), record(status="runtime", reason="why", layer="b")]
    )
    assert sorted(row["status"] for row in rows) == ["ok", "runtime"]


def test_a_value_that_the_first_layer_lacks_is_merged_from_the_others():
    rows = report.summary_rows(
        [
            record(status="incorrect", reason="wrong", layer="a"),
            record("fast", seconds=2.0, layer="a"),
            record(seconds=8.0, layer="b"),
            record("fast", seconds=2.0, layer="b"),
        ]
    )
    (fast,) = (row for row in rows if row["kernel"] == "fast")
    assert fast["speedup"] == 4


def test_kernels_stand_by_speed_and_subjects_as_they_were_run():
    rows = report.summary_rows(
        [
            record(seconds=8.0, m=2),
            record("fast", seconds=2.0, m=2),
            record("bad", status="runtime", reason="why", m=2),
            record(seconds=4.0, m=1),
        ]
    )
    assert [(row["m"], row["kernel"]) for row in rows] == [
        (2, "bad"),
        (2, "fast"),
        (2, "torch/dense"),
        (1, "torch/dense"),
    ]


def test_refusals_are_counted_by_kernel_and_reason_most_first():
    records = [
        refused("one", "too small"),
        refused("two", "too large"),
        refused("two", "too large", m=2),
        refused("two", "too small"),
        record(seconds=1.0),
    ]
    assert list(report.refusals(records).items()) == [
        ("two: too large", 2),
        ("one: too small", 1),
        ("two: too small", 1),
    ]
    assert [row["kernel"] for row in report.summary_rows(records)] == ["torch/dense"]
    assert len(report.detail_rows(records)) == 5


def test_a_summary_counts_every_case():
    records = [record(seconds=1.0), record(seconds=1.0, m=2), refused("one", "too small")]
    records.append(record("bad", status="runtime", reason="why"))
    assert report.summary(records) == "4 cases: 2 ok, 1 refused (reasons below), 1 runtime"
    assert report.summary([]) == "0 cases: none"


RUN = [
    record(seconds=8e-4),
    record("fast", seconds=2e-4),
    refused("small", "a limit, with a | bar"),
    record("bad", status="incorrect", reason="wrong"),
]


def test_json_and_jsonl_of_a_run_parse_back():
    rows = report.detail_rows(RUN)
    assert json.loads(render(rows, report.COLUMNS, "json")) == rows
    lines = render(rows, report.COLUMNS, "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_csv_of_a_run_parses_back():
    rows = list(csv.DictReader(io.StringIO(render(report.detail_rows(RUN), None, "csv"))))
    assert [row["kernel"] for row in rows] == ["torch/dense", "fast", "small", "bad"]
    assert float(rows[1]["speedup"]) == pytest.approx(4)
    assert rows[2]["reason"] == "a limit, with a | bar"
    assert rows[2]["median_us"] == ""


@pytest.mark.parametrize("output", ["table", "md"])
def test_what_people_read_has_every_column_and_row(output):
    lines = render(report.summary_rows(RUN), report.COLUMNS, output).splitlines()
    head = next(line for line in lines if "workload" in line)
    assert all(heading in head for heading in report.COLUMNS.values())
    (fast,) = (line for line in lines if " fast " in line)
    shown = [cell for cell in fast.replace("|", " ").split() if cell]
    expected = ["w", "a", "8x4", "f", "1", "fast", "ok", "200.0", "5", "2.5", "3", "150.0", "4"]
    assert shown == [*expected, "2", "0.5"]
    (bad,) = (line for line in lines if " bad " in line)
    assert "incorrect" in bad
    assert " - " in bad


def timed_by(timer, kernel="torch/dense", seconds=1.0, **fields):
    timing = {"timer": timer, "warmup_s": 0, "copies": 2, "cache": {}, "threads": None}
    return record(kernel, seconds=seconds, **fields) | {"timing": timing | {"pinned": None}}


def test_two_timers_are_never_compared_or_merged():
    rows = report.detail_rows(
        [
            timed_by("cuda_event", seconds=8.0),
            timed_by("cuda_graph", seconds=6.0),
            timed_by("cuda_event", "fast", 2.0),
            timed_by("cuda_graph", "fast", 1.0),
        ]
    )
    assert [row["speedup"] for row in rows] == pytest.approx([1, 1, 4, 6])
    assert [row["timer"] for row in rows] == ["cuda_event", "cuda_graph"] * 2
    (alone,) = report.detail_rows([timed_by("cuda_graph", "fast")])
    assert alone["speedup"] is None
    merged = report.summary_rows(
        [timed_by(timer, layer=layer) for timer in ("cuda_event", "cuda_graph") for layer in "ab"]
    )
    assert [row["layer"] for row in merged] == ["2 of 8x4"] * 2


def test_other_activations_are_another_baseline():
    rows = report.detail_rows([record(seconds=8.0), record("f", seconds=2.0, dtype="float16")])
    assert rows[1]["speedup"] is None


def test_a_block_has_no_shape():
    (row,) = report.summary_rows([record(seconds=1.0, layer="block", n=None, k=None)])
    assert row["layer"] == "block"


def state(busy=100, own=0.9, **fields):
    """Two CPUs that were used for half of a second, and by whom."""
    before = {"busy_ticks": 0, "idle_ticks": 0, "steal_ticks": 0, "own_cpu_s": 1.0}
    after = {"busy_ticks": busy, "idle_ticks": 200 - busy, "steal_ticks": 0, "own_cpu_s": 1.0 + own}
    return {"before": before, "after": after | fields}


def test_conditions_count_what_is_odd_with_the_range_of_its_numbers():
    states = [state(), state(own=0.5), state(own=0.2), state(own=0.7), state(throttle_reasons=32)]
    records = [record(seconds=1.0, state=one) for one in states]
    assert report.conditions(records) == [
        "by the machine's state, of 5 cases: 1 without a verdict, 3 in doubt",
        "  1 without a verdict: GPU throttled at the end: sw_thermal",
        "  3 in doubt: others used 15 to 40 % of the CPUs",
    ]


def test_a_case_with_two_reasons_is_one_case_and_two_lines():
    both = state(own=0.5, throttle_reasons=32, power_limit_w=400.0)
    both["before"]["power_limit_w"] = 700.0
    lines = report.conditions([record(status="runtime", reason="why", state=both)])
    assert lines[0] == "by the machine's state, of 1 cases: 1 without a verdict, 1 in doubt"
    assert [line.partition(": ")[2] for line in lines[1:]] == [
        "GPU throttled at the end: sw_thermal",
        "power limit changed: 700 W to 400 W",
        "others used 25 % of the CPUs",
    ]


def test_a_pid_is_no_number_to_give_a_range_of():
    users = [{"pid": pid, "memory_bytes": None, "sm_percent": pid} for pid in (10, 20, 20)]
    records = [record(seconds=1.0, state=state(foreign=[user])) for user in users]
    assert report.conditions(records)[1:] == [
        "  2 without a verdict: another process computed on the GPU: pid 20, 20 % of it",
        "  1 without a verdict: another process computed on the GPU: pid 10, 10 % of it",
    ]


@pytest.mark.parametrize("fields", [{}, {"state": {}}, {"state": {"before": {}}}, {"state": None}])
def test_without_a_state_nothing_is_odd(fields):
    assert report.conditions([record(seconds=1.0, **fields)]) == []


def test_nothing_forbidden_is_not_counted():
    lines = report.conditions([record(seconds=1.0, state=state(own=0.5)), record(seconds=1.0)])
    assert lines[0] == "by the machine's state, of 2 cases: 1 in doubt"


def test_conditions_of_a_refusal_do_not_count():
    assert report.conditions([refused("a", "no", state=state(own=0.1))]) == []
    assert report.conditions([]) == []
