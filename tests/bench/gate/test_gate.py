"""The gate's loop and its conclusions, on processes whose times a test writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from autotune.verdict import Rule
from bench.gate.decide import Rules
from bench.gate.job import ABSENT
from bench.gate.noise import CaseNoise, Machine, Noise
from bench.gate.outcome import EXIT, Report
from bench.gate.process import SideError
from bench.gate.run import Options, run_gate
from bench.gate.thresholds import Limits, Thresholds
from bench.nvml import gpu_state
from bench.records import read_records
from tests.bench.fake_nvml import UUID, Gpu, Process
from tests.bench.fake_nvml import install as install_nvml
from tests.bench.gate.fakes import DEVICE, VERSIONS, Fake, install, target, wrong
from vqkernels.device import detect_cpu
from vqkernels.errors import BackendError

OPTIONS = Options(baseline="base", threads=2)


def gate(monkeypatch, folder: Path, fake: Fake, rules: Rules | None = None, **fields) -> Report:
    options = fields.pop("options", OPTIONS)
    install(monkeypatch, fake, tuple(target(kernel) for kernel in fake.ratios))
    return run_gate(options, rules or Rules(), folder, **fields)


def verdicts(report: Report) -> dict[str, str]:
    return {one.kernel: one.verdict for one in report.outcomes}


def test_each_verdict_in_one_call(monkeypatch, tmp_path):
    wide = itertools.cycle([0.7, 1.3, 0.8, 1.25, 1.0])
    fake = Fake(
        {
            "numba/same": 1.0,
            "numba/slow": 1.1,
            "numba/fast": 0.9,
            "numba/loud": lambda number: next(wide),
            "numba/one": 1.0,
            "numba/broken": wrong("incorrect", "error 9 times its bound"),
            "numba/refused": wrong("constraint"),
        },
        code={(side, "numba/one"): "code" for side in ("base", "cand")},
    )
    report = gate(monkeypatch, tmp_path, fake)
    assert verdicts(report) == {
        "numba/same": "PASS",
        "numba/slow": "REGRESSED",
        "numba/fast": "FASTER",
        "numba/loud": "INCONCLUSIVE",
        "numba/one": "IDENTICAL",
        "numba/broken": "INVALID",
        "numba/refused": "INVALID",
    }
    by_kernel = {one.kernel: one for one in report.outcomes}
    assert by_kernel["numba/broken"].wrong
    assert by_kernel["numba/broken"].reason == "candidate: incorrect: error 9 times its bound"
    assert by_kernel["numba/refused"].wrong, "the baseline took it"
    slow = by_kernel["numba/slow"]
    assert slow.ratio == pytest.approx(1.1, rel=0.01)
    assert slow.first_ratio == pytest.approx(1.1, rel=0.01)
    assert (slow.pairs, by_kernel["numba/same"].pairs) == (14, 7)
    assert slow.low is not None and slow.low > 1.05
    assert by_kernel["numba/loud"].smallest > 1.1
    assert report.exit_code == EXIT["wrong"]


def test_processes_alternate_and_only_suspects_are_confirmed(monkeypatch, tmp_path):
    fake = Fake({"numba/same": 1.0, "numba/slow": 1.1})
    gate(monkeypatch, tmp_path, fake)
    assert fake.calls == 2 * (["base", "cand", "cand", "base"] * 3 + ["base", "cand"])
    assert fake.cases == [2] * 14 + [1] * 14


def test_what_is_not_reproduced_is_no_regression(monkeypatch, tmp_path):
    fake = Fake({"numba/odd": lambda number: 1.1 if number < 14 else 1.0})
    report = gate(monkeypatch, tmp_path, fake)
    (outcome,) = report.outcomes
    assert outcome.verdict in ("PASS", "INCONCLUSIVE")
    assert outcome.first_ratio == pytest.approx(1.1, rel=0.01)
    assert report.exit_code == 0
    assert len(fake.calls) == 28


@pytest.mark.parametrize(
    ("base", "cand", "verdict", "wrong_", "reason", "code"),
    [
        (1e-3, wrong("runtime"), "INVALID", True, "candidate: runtime", "wrong"),
        (1e-3, wrong("timeout"), "INVALID", True, "candidate: timeout", "wrong"),
        (1e-3, wrong("compile"), "INVALID", True, "candidate: compile", "wrong"),
        (1e-3, wrong("constraint", ABSENT), "INVALID", True, "candidate: is gone", "wrong"),
        (wrong("runtime"), 1.0, "INVALID", False, "baseline: runtime", "invalid"),
        (wrong("incorrect"), 1.0, "INVALID", False, "baseline: incorrect", "invalid"),
        (wrong("runtime"), wrong("runtime"), "INVALID", False, "candidate", "invalid"),
        (wrong("incorrect"), wrong("incorrect"), "INVALID", True, "candidate", "wrong"),
        (wrong("constraint"), wrong("runtime"), "INVALID", False, "candidate", "invalid"),
        (wrong("constraint"), wrong("constraint", "a limit"), None, None, "a limit", "invalid"),
        (wrong("constraint", ABSENT), 1.0, None, None, "new: the baseline says", "invalid"),
    ],
)
def test_sides_that_fail(monkeypatch, tmp_path, base, cand, verdict, wrong_, reason, code):
    fake = Fake({"numba/table": cand}, base=base)
    report = gate(monkeypatch, tmp_path, fake)
    assert report.exit_code == EXIT[code]
    assert len(fake.calls) == 2, "what has failed isn't measured again"
    if verdict is None:
        assert not report.outcomes
        assert reason in report.skipped[target().name]
    else:
        (outcome,) = report.outcomes
        assert (outcome.verdict, outcome.wrong) == (verdict, wrong_)
        assert reason in outcome.reason


def test_a_case_that_fails_late_costs_itself_alone(monkeypatch, tmp_path):
    fake = Fake(
        {"numba/late": lambda number: wrong("runtime") if number > 8 else 1.0, "numba/same": 1.0}
    )
    report = gate(monkeypatch, tmp_path, fake)
    assert verdicts(report) == {"numba/late": "INVALID", "numba/same": "PASS"}
    assert fake.cases == [2] * 10 + [1] * 4


@pytest.mark.parametrize(
    "state",
    [
        {"before": {}, "after": {"nvml_error": "GPU is lost"}},
        {"before": {"power_limit_w": 700.0}, "after": {"power_limit_w": 300.0}},
    ],
)
def test_a_machine_that_forbids_a_verdict(monkeypatch, tmp_path, state):
    fake = Fake(
        {"numba/slow": 1.2},
        states=lambda number: state if number == 5 else {"before": {}, "after": {}},
    )
    report = gate(monkeypatch, tmp_path, fake)
    (outcome,) = report.outcomes
    assert (outcome.verdict, outcome.wrong) == ("INVALID", False)
    assert "1 of 14 processes" in outcome.reason
    assert report.exit_code == EXIT["invalid"]


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (Gpu(reasons=0x40), "GPU throttled at the end: hw_thermal"),
        (Gpu(ecc_volatile=1), "1 uncorrected errors of the GPU's memory"),
        (Gpu(lost=True), "the GPU stopped answering: GPU is lost"),
        (Gpu(processes=(Process(4321, sm_percent=70),)), "another process"),
        (Gpu(limit_w=300.0), "power limit changed: 700 W to 300 W"),
    ],
    ids=["throttled", "memory error", "lost", "foreign process", "power limit"],
)
def test_a_gpu_that_plays_up_forbids_a_verdict(monkeypatch, tmp_path, gpu, said):
    """Healthy for 17 looks, of two a process: it begins within a pair."""
    install_nvml(monkeypatch, *[Gpu()] * 17, gpu)
    fake = Fake(
        {"cuda/table": 1.2}, states=lambda _: {"before": gpu_state(UUID), "after": gpu_state(UUID)}
    )
    report = gate(monkeypatch, tmp_path, fake)
    (outcome,) = report.outcomes
    assert outcome.verdict == "INVALID"
    assert said in outcome.reason
    assert "of 14 processes" in outcome.reason
    assert report.exit_code == EXIT["invalid"]
    healthy = Fake({"cuda/table": 1.2}, states=fake.states)
    install_nvml(monkeypatch, Gpu())
    assert verdicts(gate(monkeypatch, tmp_path, healthy)) == {"cuda/table": "REGRESSED"}


def test_the_other_side_is_no_stranger_on_the_cpus(monkeypatch, tmp_path):
    """Each side had a third of the CPUs; a third was idle, or somebody's."""
    first = {"busy_ticks": 0, "idle_ticks": 0, "steal_ticks": 0, "own_cpu_s": 5.0}
    for idle, said in ((100, ()), (0, ("others used 33 % of the CPUs",))):
        last = {"busy_ticks": 300 - idle, "idle_ticks": idle, "steal_ticks": 0, "own_cpu_s": 6.0}
        fake = Fake({"numba/table": 1.0}, states=lambda _, s=last: {"before": first, "after": s})
        (outcome,) = gate(monkeypatch, tmp_path, fake).outcomes
        assert outcome.doubts == said


def test_a_machine_that_forbids_what_was_confirmed(monkeypatch, tmp_path):
    lost = {"before": {}, "after": {"nvml_error": "GPU is lost"}}
    fake = Fake({"numba/slow": 1.2}, states=lambda number: lost if number == 20 else {"after": {}})
    (outcome,) = gate(monkeypatch, tmp_path, fake).outcomes
    assert outcome.verdict == "INVALID"


def test_another_device_within_a_call(monkeypatch, tmp_path):
    fake = Fake(
        {"numba/slow": 1.2},
        device=lambda number: {**DEVICE, "uuid": "other"} if number == 3 else DEVICE,
    )
    (outcome,) = gate(monkeypatch, tmp_path, fake).outcomes
    assert (outcome.verdict, outcome.reason) == (
        "INVALID",
        "its processes ran on different devices",
    )


def test_code_that_changes_under_the_gate(monkeypatch, tmp_path):
    fake = Fake({"numba/slow": 1.2})
    fake.states = lambda number: fake.code.update(
        {("cand", "numba/slow"): str(number > 6)}
    ) or {}  # fmt: skip
    (outcome,) = gate(monkeypatch, tmp_path, fake).outcomes
    assert outcome.verdict == "INVALID"
    assert "candidate's code" in outcome.reason


def test_a_control_that_came_out_slower_forbids_all_differences(monkeypatch, tmp_path):
    fake = Fake(
        {"numba/one": 1.1, "numba/slow": 1.1, "numba/fast": 0.9, "numba/same": 1.0},
        code={(side, "numba/one"): "code" for side in ("base", "cand")},
    )
    report = gate(monkeypatch, tmp_path, fake)
    assert verdicts(report) == {
        "numba/one": "IDENTICAL",
        "numba/slow": "INVALID",
        "numba/fast": "INVALID",
        "numba/same": "PASS",
    }
    assert "numba/one" in report.notes[0]
    assert report.exit_code == EXIT["invalid"]


def test_identical_cases_leave_the_family(monkeypatch, tmp_path):
    """A slowdown that Holm over 40 cases would hide, were they not known to be identical."""
    others = {f"numba/{number}": 1.0 for number in range(40)}
    ratios = {"numba/slow": 1.045, **others}
    code = {(side, kernel): "code" for side in ("base", "cand") for kernel in others}
    known = gate(monkeypatch, tmp_path, Fake(ratios, code=code, noise=0.011))
    assert verdicts(known)["numba/slow"] == "REGRESSED"
    low = {one.kernel: one.low for one in known.outcomes}["numba/slow"]
    unknown = gate(monkeypatch, tmp_path, Fake(ratios, noise=0.011))
    assert {one.kernel: one.low for one in unknown.outcomes}["numba/slow"] < low


def noisy(floor: float) -> Noise:
    case = CaseNoise(
        workload="toy",
        layer="q",
        format="rq-2x256x8",
        m=1,
        dtype="float32",
        kernel="numba/table",
        comparisons=9,
        rms_log_ratio=floor,
        pair_spread=floor,
        effects={},
        versions={},
        made="2026-01-01",
    )
    return Noise(Machine.of(detect_cpu(2)), {target().name: case})


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        (Rules(), "REGRESSED"),
        (Rules(noise=noisy(0.04)), "PASS"),
        (Rules(thresholds=Thresholds(rule=Rule(ratio=1.1))), "PASS"),
        (Rules(thresholds=Thresholds(cases=(Limits(match={}, ratio=1.1),))), "PASS"),
        (Rules(thresholds=Thresholds(cases=(Limits(match={}, seconds=1e-4),))), "INCONCLUSIVE"),
        (
            Rules(thresholds=Thresholds(cases=(Limits(match={"kernel": "cuda/*"}, ratio=1.1),))),
            "REGRESSED",
        ),
    ],
)
def test_what_counts_as_slower(monkeypatch, tmp_path, rules, verdict):
    report = gate(monkeypatch, tmp_path, Fake({"numba/table": 1.06}), rules)
    assert verdicts(report) == {"numba/table": verdict}
    assert any("no noise floor" in note for note in report.notes) == (rules.noise is None)


def test_a_side_that_does_not_run_is_a_report_too(monkeypatch, tmp_path):
    for who, code in (("baseline", "invalid"), ("candidate", "wrong")):

        def dead(sides, job, harness, who=who):
            raise SideError(who, "its process can't measure: ImportError")

        install(monkeypatch, dead, (target(),))
        report = run_gate(OPTIONS, Rules(), tmp_path)
        assert verdicts(report) == {"numba/table": "INVALID"}
        assert "ImportError" in report.outcomes[0].reason
        assert report.exit_code == EXIT[code]


# ------------------------------------------------------------------------------------------------
# records, and going on


def test_every_process_is_recorded_with_its_samples(monkeypatch, tmp_path):
    report = gate(monkeypatch, tmp_path, Fake({"numba/same": 1.0, "numba/slow": 1.1}))
    records = read_records(Path(report.records))
    assert len(records) == 14 * 2 + 14
    first = records[0]
    assert first["options"]["baseline"] == "base"
    assert first["gate"]["side"] == "baseline"
    assert first["config_from"] == "default"
    assert {record["gate"]["number"] for record in records} == {0, 1}
    assert len(first["samples_s"]) == 7


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 2, 7, 13, 14, 15, 27])
def test_a_killed_gate_goes_on_where_it_was(monkeypatch, tmp_path, at):
    whole = gate(monkeypatch, tmp_path / "whole", Fake({"numba/same": 1.0, "numba/slow": 1.1}))
    fake = Fake({"numba/same": 1.0, "numba/slow": 1.1})
    honest = fake._case

    def dies(*words):
        if len(fake.calls) - 1 == at:
            raise Killed
        return honest(*words)

    fake._case = dies
    with pytest.raises(Killed):
        gate(monkeypatch, tmp_path, fake)
    files = list(tmp_path.glob("*.jsonl"))
    assert len(files) == (at > 1), "a file without records isn't left behind"
    again = Fake({"numba/same": 1.0, "numba/slow": 1.1})
    report = gate(monkeypatch, tmp_path, again, resume=files[0] if files else None)
    assert verdicts(report) == verdicts(whole)
    assert len(again.calls) == 28 - at // 2 * 2, "whole pairs are kept, others are made again"
    slow = next(one for one in report.outcomes if one.kernel == "numba/slow")
    assert slow.pairs == 14


@pytest.mark.parametrize("lost", [1, 30, 5000])
def test_a_file_that_was_cut_off_goes_on(monkeypatch, tmp_path, lost):
    report = gate(monkeypatch, tmp_path, Fake({"numba/same": 1.0}))
    path = Path(report.records)
    path.write_bytes(path.read_bytes()[:-lost])
    again = Fake({"numba/same": 1.0})
    report = gate(monkeypatch, tmp_path, again, resume=path)
    assert verdicts(report) == {"numba/same": "PASS"}
    assert len(again.calls) >= 2
    assert report.outcomes[0].pairs == 7
    read_records(path)


def test_a_whole_file_needs_no_process(monkeypatch, tmp_path):
    first = gate(monkeypatch, tmp_path, Fake({"numba/slow": 1.1}))
    again = Fake({"numba/slow": 1.1})
    report = gate(monkeypatch, tmp_path, again, resume=Path(first.records))
    assert not again.calls
    assert report.outcomes == first.outcomes


# ------------------------------------------------------------------------------------------------
# stored baselines


def stored(monkeypatch, folder: Path, ratio: float, **fields) -> Path:
    fake = Fake({"numba/table": ratio}, **fields)
    return Path(gate(monkeypatch, folder / "before", fake).records)


def against(monkeypatch, tmp_path, path: Path, fake: Fake) -> Report:
    install(monkeypatch, fake, tuple(target(kernel) for kernel in fake.ratios))
    return run_gate(dataclasses.replace(OPTIONS, baseline=str(path)), Rules(), tmp_path)


def test_a_stored_baseline_is_advice(monkeypatch, tmp_path):
    path = stored(monkeypatch, tmp_path, 1.0)
    fake = Fake({"numba/table": 1.2, "numba/new": 1.0})
    report = against(monkeypatch, tmp_path, path, fake)
    assert verdicts(report) == {"numba/table": "REGRESSED"} or report.outcomes[0].ratio > 1.15
    assert report.advisory
    assert report.exit_code == 0
    assert set(fake.calls) == {"cand"}
    assert "not in" in report.skipped[target("numba/new").name]


def test_the_candidates_wrong_results_fail_without_a_baseline(monkeypatch, tmp_path):
    path = stored(monkeypatch, tmp_path, 1.0)
    report = against(monkeypatch, tmp_path, path, Fake({"numba/table": wrong("incorrect")}))
    assert report.exit_code == EXIT["wrong"]


def test_another_kernels_compiler_is_no_matter(monkeypatch, tmp_path):
    path = stored(monkeypatch, tmp_path, 1.0)
    records = [{**one, "versions": {**VERSIONS, "triton": "9"}} for one in read_records(path)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    report = against(monkeypatch, tmp_path, path, Fake({"numba/table": 1.0}))
    assert verdicts(report) == {"numba/table": "PASS"}


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("device", {**DEVICE, "name": "Other"}, "device"),
        ("device", {**DEVICE, "driver": "600"}, "driver"),
        ("state", {"before": {"power_limit_w": 300}, "after": {}}, "power limit"),
        ("versions", {"torch": "1.0"}, "torch"),
        ("versions", {**VERSIONS, "numba": "0.1"}, "numba"),
    ],
)
def test_what_was_stored_elsewhere_is_refused(monkeypatch, tmp_path, field, value, word):
    path = stored(monkeypatch, tmp_path, 1.0)
    records = [{**record, field: value} for record in read_records(path)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(BackendError, match=f"no case can be compared.*{word}"):
        against(monkeypatch, tmp_path, path, Fake({"numba/table": 1.0}))
