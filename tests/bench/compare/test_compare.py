"""`vqbench compare`: what meets, what is refused, and the tables and numbers that come out."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from scipy import stats

from bench.cli import cli
from bench.compare.match import IncomparableError
from bench.tables import OUTPUTS
from vqkernels.errors import ContainerError, VqError

DEVICE = {"name": "Test CPU", "arch": "x86_64", "units": 2, "uuid": None, "driver": None}
GPU = {"name": "Test GPU", "arch": "sm_90", "units": 132, "uuid": "GPU-1", "driver": "580"}
COLD = {"codes": "cold", "codebooks": "cold", "sides": "cold", "x": "hot", "out": "hot"}
HOT = dict.fromkeys(COLD, "hot")
TIMING = {
    "timer": "perf_counter",
    "warmup_s": 0.1,
    "copies": 3,
    "cache": COLD,
    "threads": 2,
    "pinned": True,
}
RIGHT = {"worst": 0.1, "max_abs": 0.0, "relative_rms": 0.0, "controls": {}}
# Around 1: nine samples, of which the 2nd to the 8th bound the median with 95 %, all with its root.
SPREAD = (0.96, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03, 1.04)


def record(us: float | None = 100.0, *, run: str = "run", **changes: Any) -> dict[str, Any]:
    """A record of numba/table whose median is `us`; refused where that is None."""
    timed = {"samples_s": [us * part * 1e-6 for part in SPREAD], "timing": TIMING} if us else {}
    refused = {"status": "constraint", "reason": "too small", "samples_s": [], "timing": None}
    return {
        "schema": 1,
        "id": f"{run}/1",
        "time": "2026-11-21T23:07:38+00:00",
        "device": DEVICE,
        "versions": {"torch": "2.13.0"},
        "project": {"commit": "a" * 40, "dirty": False},
        "state": {"before": {}, "after": {}},
        "workload": "toy",
        "layer": "q_proj",
        "format": "vq-256x8",
        "spec": {"stages": [256]},
        "n": 64,
        "k": 32,
        "m": 1,
        "dtype": "float32",
        "kernel": "numba/table",
        "kernel_source": "c" * 64,
        "config": {"tile": 8},
        "config_from": "default",
        "seed": 0,
        "codes": "uniform",
        "relative_error": None,
        "effective_bits": 1.0,
        "steps": [],
        "correctness": RIGHT,
        **(timed | {"status": "ok", "reason": ""} if us else refused),
        **changes,
    }


def failed(status: str = "incorrect", reason: str = "wrong", **changes: Any) -> dict[str, Any]:
    return record(None, status=status, reason=reason, **changes)


def timing(**changes: Any) -> dict[str, Any]:
    return {"timing": TIMING | changes}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return tmp_path / "b.jsonl"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["compare", *arguments])


def text(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(*arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text(*arguments, "-o", "json"))
    return found


def refusal(kind: type[VqError], *arguments: str) -> str:
    error = run(*arguments).exception
    assert type(error) is kind, error
    message = str(error)
    assert "\n" not in message
    return message


def of(found: Sequence[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    return [row for row in found if row["source"] == source]


# ------------------------------------------------------------------------------------------------
# one file


def test_a_case_has_its_median_and_interval(a: Path) -> None:
    (row,) = rows(write(a, record(200.0)))
    assert row["median_us"] == pytest.approx(200)
    samples = [200 * part for part in SPREAD]
    bounds = stats.quantile_test(samples, p=0.5).confidence_interval(0.95)
    assert (row["median_us_low"], row["median_us_high"]) == pytest.approx((bounds.low, bounds.high))
    assert (row["records"], row["samples"], row["status"]) == (1, 9, "ok")
    assert (row["kernel"], row["n"], row["k"], row["dtype"]) == ("numba/table", 64, 32, "float32")
    assert row["cache"] == "codes=cold codebooks=cold sides=cold x=hot out=hot"
    assert row["ratio"] is None


def test_records_of_a_case_are_pooled_by_their_medians(a: Path) -> None:
    times = (90.0, 110.0, 100.0, 105.0, 95.0, 400.0, 101.0)
    (row,) = rows(write(a, *(record(us, run=str(us)) for us in times)))
    assert row["median_us"] == pytest.approx(statistics.median(times))
    assert (row["median_us_low"], row["median_us_high"]) == pytest.approx((90, 400))
    assert (row["records"], row["samples"]) == (7, 63)
    assert "records" in text(str(a))


def test_five_records_have_a_median_and_no_interval(a: Path) -> None:
    (row,) = rows(write(a, *(record(us) for us in (1.0, 2.0, 3.0, 4.0, 5.0))))
    assert row["median_us"] == pytest.approx(3)
    assert row["median_us_low"] is row["median_us_high"] is None


def test_a_folder_is_one_source(tmp_path: Path) -> None:
    write(tmp_path / "dev" / "1.jsonl", record(100.0, run="1"))
    write(tmp_path / "dev" / "2.jsonl", record(300.0, run="2"))
    (row,) = rows(str(tmp_path / "dev"))
    assert (row["median_us"], row["records"]) == (pytest.approx(200), 2)


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        (timing(timer="cuda_graph"), "timer"),
        (timing(cache=HOT), "cache"),
        (timing(threads=1), "threads"),
        (timing(pinned=False), "pinned"),
        ({"dtype": "float16"}, "dtype"),
        ({"device": GPU}, "device"),
        ({"config": {"tile": 16}}, "config"),
        ({"kernel_source": "d" * 64}, "code"),
    ],
    ids=str,
)
def test_what_was_measured_otherwise_is_a_row_of_its_own(
    a: Path, changes: dict[str, Any], column: str
) -> None:
    found = rows(write(a, record(100.0), record(200.0, **changes)))
    assert sorted(row["median_us"] for row in found) == pytest.approx([100, 200])
    assert found[0][column] != found[1][column]
    (head,) = [line for line in text(str(a)).splitlines() if "workload" in line]
    shown = {"timer", "cache", "threads", "pinned", "dtype", "device", "config", "code"}
    assert shown & set(head.split()) == {column}


def test_failures_and_refusals_are_told(a: Path) -> None:
    write(a, record(), record(None, m=2), record(None, m=4), failed(m=8))
    shown = text(str(a))
    assert "4 records: 1 ok, 2 refused, 1 incorrect" in shown
    assert "refused: 2 x numba/table: too small" in shown
    assert "A: 1 x toy q_proj vq-256x8 m=8 numba/table float32: incorrect: wrong" in shown
    assert [row["status"] for row in rows(str(a))] == [
        "ok",
        "constraint",
        "constraint",
        "incorrect",
    ]


def test_a_case_that_failed_once_of_twice_is_told(a: Path) -> None:
    assert "runtime: a fault; ok in A" in text(write(a, record(), failed("runtime", "a fault")))


def test_blocks_of_layers_have_neither_n_nor_k(a: Path) -> None:
    steps = [{"layer": "q", "n": 8, "k": 4, "kernel": "x/y", "config": {"tile": 1}}]
    write(a, record(layer="block", n=None, k=None, config={}, steps=steps), record())
    block, layer = rows(str(a))
    assert (block["n"], block["config"]) == (None, "q x/y tile=1")
    assert layer["n"] == 64


# ------------------------------------------------------------------------------------------------
# several files


def test_ratios_are_to_the_first_file(a: Path, b: Path, tmp_path: Path) -> None:
    c = tmp_path / "c.jsonl"
    found = rows(write(a, record(100.0)), write(b, record(150.0)), write(c, record(50.0)))
    assert [row["ratio"] for row in found] == [None, pytest.approx(1.5), pytest.approx(0.5)]
    low, high = found[1]["ratio_low"], found[1]["ratio_high"]
    # of nine samples, the second from either end bounds a median with 96.1 %: not the root of 95 %
    assert (low, high) == pytest.approx((1.5 * 0.96 / 1.04, 1.5 * 1.04 / 0.96))


def test_cases_are_matched_by_all_that_names_them(a: Path, b: Path) -> None:
    names = [
        {},
        {"workload": "v"},
        {"layer": "b"},
        {"format": "g"},
        {"n": 128},
        {"k": 64},
        {"m": 2},
        {"kernel": "torch/dense"},
        {"dtype": "float16"},
    ]
    first = [record(100.0 * i, **name) for i, name in enumerate(names, 1)]
    second = [record(200.0 * i, **name) for i, name in enumerate(names, 1)]
    found = of(rows(write(a, *first), write(b, *reversed(second))), "B")
    assert [row["ratio"] for row in found] == pytest.approx([2.0] * len(names))


def test_the_geometric_mean_is_scipys(a: Path, b: Path) -> None:
    ratios = (0.5, 0.8, 1.02, 1.5, 4.0)
    write(a, *(record(100.0, m=m) for m, _ in enumerate(ratios, 1)))
    write(b, *(record(100.0 * ratio, m=m) for m, ratio in enumerate(ratios, 1)))
    (row,) = rows(str(a), str(b), "--summary")
    assert row["geomean"] == pytest.approx(stats.gmean(ratios))
    assert row["deviation"] == pytest.approx(stats.gstd(ratios))
    logs = [math.log(ratio) for ratio in ratios]
    low, high = stats.t.interval(0.95, 4, stats.tmean(logs), stats.sem(logs))
    assert (row["geomean_low"], row["geomean_high"]) == pytest.approx(
        (math.exp(low), math.exp(high))
    )
    # 1.02 lies within the noise
    assert [row[name] for name in ("cases", "faster", "slower", "unclear")] == [5, 2, 2, 1]


def test_means_of_groups(a: Path, b: Path) -> None:
    names = [{"kernel": k, "m": m} for k in ("x/y", "v/w") for m in (1, 2)]
    write(a, *(record(100.0, **name) for name in names))
    write(b, *(record(100.0 * i, **name) for i, name in enumerate(names, 1)))
    found = rows(str(a), str(b), "--summary", "--by", "kernel")
    assert [(row["kernel"], row["cases"]) for row in found] == [("x/y", 2), ("v/w", 2)]
    assert [row["geomean"] for row in found] == pytest.approx([math.sqrt(2), math.sqrt(12)])
    assert len(rows(str(a), str(b), "--summary", "--by", "kernel", "--by", "m")) == 4
    result = run(str(a), "--summary")
    assert result.exit_code == 2
    assert "name two files" in result.output


def test_a_case_that_one_file_lost_is_told(a: Path, b: Path) -> None:
    write(a, record(), record(m=2), record(m=4), record(m=8))
    write(b, record(), failed(m=2), record(None, m=4))
    shown = text(str(a), str(b))
    assert "B: 1 x toy q_proj vq-256x8 m=2 numba/table float32: incorrect: wrong; ok in A" in shown
    assert "numba/table float32: constraint: too small; ok in A" in shown
    assert "B: lacks 1 cases of the table" in shown
    found = of(rows(str(a), str(b)), "B")
    assert [row["status"] for row in found] == ["ok", "incorrect", "constraint", "absent"]
    assert [row["m"] for row in of(rows(str(a), str(b), "--status", "incorrect"), "B")] == [2]
    assert [row["m"] for row in of(rows(str(a), str(b), "--status", "absent"), "B")] == [8]
    assert "wrong" in text(str(a), str(b), "--status", "incorrect")
    assert "no case ended so" in text(str(a), str(b), "--status", "timeout")


def test_of_many_failures_some_are_listed_and_the_rest_counted(a: Path) -> None:
    shown = text(write(a, record(), *(failed(m=m) for m in range(2, 20))))
    assert shown.count("incorrect: wrong") == 10
    assert "and 8 more" in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": DEVICE | {"name": "Other CPU"}}, "device (Test CPU (x86_64), Other CPU"),
        (
            {"device": DEVICE | {"arch": "aarch64"}},
            "device (Test CPU (x86_64), Test CPU (aarch64))",
        ),
        (timing(timer="cuda_event"), "timer (perf_counter, cuda_event)"),
        (timing(cache=HOT), "cache of codes/codebooks/sides (cold, hot)"),
        (timing(cache=COLD | {"x": "cold"}), "cache of x (hot, cold)"),
        (timing(threads=1), "threads (2, 1)"),
        (timing(pinned=False), "pinned (True, False)"),
        ({"dtype": "float16"}, "dtype (float32, float16)"),
        ({"codes": "trained"}, "codes (uniform, trained)"),
        ({"spec": {"stages": [16]}}, "differ in spec;"),
        ({"steps": [{"layer": "q", "n": 1, "k": 1, "kernel": "", "config": {}}]}, "in layers;"),
    ],
    ids=str,
)
def test_what_is_not_comparable_is_refused(
    a: Path, b: Path, changes: dict[str, Any], said: str
) -> None:
    files = write(a, record(100.0), record(100.0, m=2)), write(b, record(150.0, **changes))
    message = refusal(IncomparableError, *files)
    for part in (*files, said, "1 of 1 cases", "--anyway"):
        assert part in message
    shown = text(*files, "--anyway")
    assert "NOT COMPARABLE: B differs from A in" in shown
    assert said.removeprefix("differ in ").removeprefix("in ").rstrip(";") in shown
    first, second = rows(*files, "--anyway")[:2]
    assert first["differs"] is None
    assert second["differs"]
    assert second["ratio"] == pytest.approx(1.5)


def test_multiprocessors_of_a_gpu_have_to_agree(a: Path, b: Path) -> None:
    event = timing(timer="cuda_event", threads=None)
    fewer = GPU | {"units": 114}
    files = write(a, record(device=GPU, **event)), write(b, record(device=fewer, **event))
    assert "units (132, 114)" in refusal(IncomparableError, *files)


def test_one_case_that_is_not_comparable_refuses_all(a: Path, b: Path) -> None:
    write(a, record(), record(m=2))
    write(b, record(), record(m=2, **timing(threads=1)))
    assert "1 of 2 cases differ in threads" in refusal(IncomparableError, str(a), str(b))
    assert rows(str(a), str(b), "-m", "1")[1]["ratio"] == pytest.approx(1)
    found = of(rows(str(a), str(b), "--anyway"), "B")
    assert [row["differs"] for row in found] == [None, "threads (2, 1)"]
    assert "B differs" in text(str(a), str(b), "--anyway").replace("B differs from A", "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": DEVICE | {"uuid": "GPU-2"}}, "GPU (-, GPU-2)"),
        ({"device": DEVICE | {"driver": "590"}}, "driver (-, 590)"),
        ({"state": {"before": {"power_limit_w": 400.0}}}, "power limit (-, 400.0 W)"),
        ({"versions": {"torch": "2.14.0"}}, "torch (2.13.0, 2.14.0)"),
        ({"project": {"commit": "b" * 40, "dirty": True}}, "commit (aaaaaaa, bbbbbbb, changed)"),
        ({"seed": 1}, "seed (0, 1)"),
        ({"kernel_source": "d" * 64}, "code of numba/table"),
    ],
    ids=str,
)
def test_what_may_differ_is_noted_on_one_line(
    a: Path, b: Path, changes: dict[str, Any], said: str
) -> None:
    shown = text(write(a, record()), write(b, record(**changes)))
    (line,) = [line for line in shown.splitlines() if "noted only" in line]
    assert line == f"B differs from A, noted only, in: {said}"


def test_a_config_is_shown_where_it_differs(a: Path, b: Path) -> None:
    write(a, record(), record(m=2))
    write(b, record(config={"tile": 16}), record(m=2))
    lines = text(str(a), str(b)).splitlines()
    (line,) = [line for line in lines if "tile" in line]
    assert "A: tile=8; B: tile=16" in line
    assert "tile" not in text(str(a))


def test_series_that_were_measured_alike_meet(a: Path, b: Path) -> None:
    """Timers and caches of one case, in any order; those that only one file has stay alone."""
    kinds = [timing(), timing(timer="cuda_graph"), timing(cache=HOT)]
    write(a, *(record(100.0 * i, **kind) for i, kind in enumerate(kinds, 1)))
    write(b, *(record(200.0 * i, **kind) for i, kind in reversed([*enumerate(kinds, 1)][:2])))
    found = of(rows(str(a), str(b)), "B")
    assert [row["ratio"] for row in found] == [pytest.approx(2), pytest.approx(2), None]
    assert [row["status"] for row in found] == ["ok", "ok", "absent"]


def test_of_several_codes_the_same_meets_then_the_newest(tmp_path: Path, b: Path) -> None:
    hashes = ("d" * 64, "e" * 64)
    for day, source in enumerate(hashes, 1):
        one = record(100.0 * day, time=f"2026-11-0{day}", kernel_source=source)
        write(tmp_path / "dev" / f"{day}.jsonl", one)
    folder = str(tmp_path / "dev")
    old = of(rows(folder, write(b, record(100.0, kernel_source=hashes[0]))), "B")
    assert [row["ratio"] for row in old] == [None, pytest.approx(1)]
    other = of(rows(folder, write(b, record(100.0))), "B")
    assert [row["ratio"] for row in other] == [pytest.approx(0.5), None]


def test_files_without_a_common_case_are_refused(a: Path, b: Path) -> None:
    message = refusal(IncomparableError, write(a, record()), write(b, record(m=2)))
    assert "no case is timed in both" in message


def test_two_runs_are_said_to_be_two(a: Path, b: Path) -> None:
    assert "`vqbench gate` decides" in text(write(a, record()), write(b, record()))


# ------------------------------------------------------------------------------------------------
# pairs: sides of a gate, kernels of a run


def test_the_sides_of_a_gate_are_compared_pair_by_pair(a: Path) -> None:
    """The machine gets slower by the pair; each pair's ratio is the same."""
    records = [
        record(us * drift, gate={"side": side, "pair": pair})
        for pair, drift in enumerate((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))
        for side, us in (("candidate", 110.0 + pair), ("baseline", 100.0))
    ]
    first, second = rows(write(a, *records))
    assert (first["side"], second["side"]) == ("baseline", "candidate")
    assert first["median_us"] == pytest.approx(400)
    assert second["ratio"] == pytest.approx(1.13)
    assert (second["ratio_low"], second["ratio_high"]) == pytest.approx((1.10, 1.16))
    assert f"B: {a} (candidate): 7 records" in text(str(a))


def test_the_calls_of_a_selfcheck_are_told_apart(a: Path) -> None:
    """By how much its candidate was slowed, and their pairs by the call."""
    records = [
        record(us * drift, gate={"side": side, "pair": pair, "call": call, "slow": slow})
        for call, drift, slow in (("A/A 1", 1.0, 0.0), ("A/A 2", 3.0, 0.0), ("5 %", 9.0, 0.05))
        for pair in range(6)
        for side, us in (("baseline", 100.0), ("candidate", 101.0 + 100 * slow))
        if side == "candidate" or not slow
    ] + [record(900.0, gate={"side": "baseline", "pair": p, "call": "5 %"}) for p in range(6)]
    first, same, slowed = rows(write(a, *records))
    assert [one["side"] for one in (first, same, slowed)] == [
        "baseline",
        "candidate",
        "candidate slowed by 5%",
    ]
    assert same["ratio"] == pytest.approx(1.01)
    assert slowed["ratio"] == pytest.approx(1.06)


def dense(us: float, **changes: Any) -> dict[str, Any]:
    return record(us, kernel="torch/dense", **changes)


def test_kernels_are_set_against_another_of_the_same_case(a: Path) -> None:
    write(a, dense(400.0), record(100.0), dense(800.0, m=2), record(100.0, m=2))
    found = rows(str(a), "--against", "torch/dense")
    assert [row["ratio"] for row in found] == [
        None,
        pytest.approx(0.25),
        None,
        pytest.approx(0.125),
    ]
    (row,) = rows(str(a), "--against", "torch/dense", "--summary")
    assert (row["kernel"], row["cases"]) == ("numba/table", 2)
    assert row["geomean"] == pytest.approx(math.sqrt(0.25 * 0.125))
    assert rows(str(a), "--against", "torch/dense", "-k", "numba/*") == found
    assert "time/torch/dense" in text(str(a), "--against", "torch/dense")


@pytest.mark.parametrize(
    "changes",
    [{"m": 2}, {"layer": "b"}, {"dtype": "float16"}, timing(threads=1), {"id": "another/1"}],
    ids=str,
)
def test_no_ratio_but_of_one_case_and_run(a: Path, changes: dict[str, Any]) -> None:
    write(a, dense(400.0, **changes), record(100.0))
    assert {row["ratio"] for row in rows(str(a), "--against", "torch/dense")} == {None}
    assert "1 cases have no ratio" in text(str(a), "--against", "torch/dense")


def test_of_several_runs_the_ratios_are_taken_run_by_run(tmp_path: Path) -> None:
    drifts = (1.0, 5.0, 2.0, 4.0, 3.0, 6.0)
    for i, drift in enumerate(drifts):
        one = record((100.0 + i) * drift, run=f"{i}"), dense(200.0 * drift, run=f"{i}")
        write(tmp_path / "dev" / f"{i}.jsonl", *one)
    found = rows(str(tmp_path / "dev"), "--against", "torch/dense")
    assert found[0]["ratio"] == pytest.approx(0.5125)
    assert (found[0]["ratio_low"], found[0]["ratio_high"]) == pytest.approx((0.5, 0.525))


def test_against_is_of_each_file_by_itself(a: Path, b: Path) -> None:
    write(a, dense(400.0), record(100.0))
    write(b, dense(400.0, **timing(threads=1)), record(200.0, **timing(threads=1)))
    found = rows(str(a), str(b), "--against", "torch/dense")
    assert [row["ratio"] for row in found] == [None, pytest.approx(0.25), None, pytest.approx(0.5)]
    assert "no time of no/such; --against takes one of: torch/dense, numba/table" in refusal(
        VqError, str(a), "--against", "no/such"
    )


# ------------------------------------------------------------------------------------------------
# filters, order, forms, bad files


@pytest.mark.parametrize(
    ("option", "value", "changes"),
    [
        ("-w", "v*", {"workload": "vision"}),
        ("-l", "*.query", {"layer": "0.query"}),
        ("-f", "rq-*", {"format": "rq-2x256x8"}),
        ("-k", "triton/*", {"kernel": "triton/mma"}),
        ("-m", "8", {"m": 8}),
        ("--dtype", "float16", {"dtype": "float16"}),
    ],
)
def test_filters(a: Path, option: str, value: str, changes: dict[str, Any]) -> None:
    write(a, record(100.0), record(200.0, **changes))
    (row,) = rows(str(a), option, value)
    assert row["median_us"] == pytest.approx(200)
    wrong = "77" if option == "-m" else "nothing"
    message = refusal(VqError, str(a), option, value, option, wrong)
    assert f"{wrong}; there are: " in message


def test_filters_that_leave_nothing_together(a: Path) -> None:
    write(a, record(), record(m=2, kernel="torch/dense"))
    assert "together" in refusal(VqError, str(a), "-m", "1", "-k", "torch/*")


@pytest.mark.parametrize(
    ("how", "order"),
    [("run", [3, 1, 2]), ("name", [1, 2, 3]), ("median", [2, 3, 1]), ("ratio", [2, 1, 3])],
)
def test_sorting(a: Path, b: Path, how: str, order: list[int]) -> None:
    write(a, record(200.0, m=3), record(300.0, m=1), record(100.0, m=2))
    write(b, record(200.0, m=3), record(450.0, m=1), record(200.0, m=2))
    assert [row["m"] for row in of(rows(str(a), str(b), "--sort", how), "A")] == order


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_form_has_every_case(a: Path, b: Path, output: str) -> None:
    write(a, record(100.0), record(100.0, m=2), dense(300.0), record(None, m=4))
    write(b, record(150.0), record(150.0, m=2), dense(450.0), record(None, m=4))
    result = run(str(a), str(b), "-o", output)
    assert result.exit_code == 0
    if output in ("table", "md"):
        lines = result.stdout.splitlines()
        cases = [line for line in lines if "q_proj" in line]
        assert len(cases) == 3
        assert all("1.500" in line and "1.385–1.625" in line for line in cases)
        (mean,) = [line for line in lines if line.strip("| ").startswith("B/A ")]
        assert "1.500" in mean
        assert ("- A: " if output == "md" else "A: ") in result.stdout
        return
    found: list[dict[str, Any]]
    if output == "csv":
        found = list(csv.DictReader(io.StringIO(result.stdout)))
    elif output == "json":
        found = json.loads(result.stdout)
    else:
        found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["source"] for row in found] == ["A", "B"] * 4
    assert [float(row["ratio"]) for row in found[1:6:2]] == pytest.approx([1.5] * 3)
    assert "gate" in result.stderr


def test_an_empty_file_is_one_line(a: Path, tmp_path: Path) -> None:
    a.write_text("", encoding="utf-8")
    assert "holds no records" in refusal(ContainerError, str(a))
    (tmp_path / "dev").mkdir()
    assert "no .jsonl in this folder" in refusal(ContainerError, str(tmp_path / "dev"))
    assert "can't be read" in refusal(ContainerError, str(tmp_path / "none.jsonl"))
    a.write_text("{\n", encoding="utf-8")
    assert "line 1 is no record" in refusal(ContainerError, str(a))


def test_more_files_than_letters_are_one_line(a: Path) -> None:
    write(a, record())
    assert "26 at most" in refusal(VqError, *[str(a)] * 27)


def test_a_file_of_refusals_alone_is_a_table_of_reasons(a: Path, b: Path) -> None:
    write(a, record(None), record(None, m=2))
    assert "refused: 2 x numba/table: too small" in text(str(a))
    assert [row["status"] for row in rows(str(a))] == ["constraint"] * 2
    assert "too small" in text(str(a), "--status", "constraint")
    assert "no case is timed in both" in refusal(IncomparableError, write(b, record()), str(a))
    # of B nothing passes the filter
    write(b, record(m=4))
    assert "no case is timed in both" in refusal(IncomparableError, str(b), str(a), "-m", "4")


def test_what_each_file_measured_besides_is_not_set_against_each_other(a: Path, b: Path) -> None:
    write(a, record(), record(**timing(cache=HOT)))
    write(b, record(), record(**timing(threads=1)))
    found = of(rows(str(a), str(b)), "B")
    assert [row["ratio"] for row in found] == [pytest.approx(1), None, None]
    assert [row["status"] for row in found] == ["ok", "absent", "ok"]


def test_a_refusal_is_of_its_dtype(a: Path, b: Path) -> None:
    dtypes = ("float32", "float16", "bfloat16")
    write(a, *(record(dtype=dtype) for dtype in dtypes))
    write(b, record(), record(None, dtype="float16"))
    found = of(rows(str(a), str(b)), "B")
    assert [row["status"] for row in found] == ["ok", "constraint", "absent"]
