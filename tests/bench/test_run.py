import csv
import functools
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import bench.commands.run as command
import bench.run
from autotune.bandwidth import Bandwidth
from autotune.timers import Budget
from bench.cli import cli, main
from bench.records import load_records, read_records
from bench.selection import selections
from tests.autotune import zoo
from vqkernels.errors import BackendError, ContainerError, VqError
from vqkernels.kernel import registry

ROOT = Path(bench.run.__file__).parents[1]
QUICK = ("--time", "0.001", "--samples", "7")
RAGGED = """
about = "two ragged layers"
source = "a test"
blocks = 1
[[layer]]
name = "wide"
n = 37
k = 42
[[layer]]
name = "odd"
n = 41
k = 19
"""


@pytest.fixture
def workload(tmp_path):
    path = tmp_path / "ragged.toml"
    path.write_text(RAGGED, encoding="utf-8")
    return str(path)


@pytest.fixture
def missing(tmp_path):
    """A workload whose weights are in a package that isn't there."""
    path = tmp_path / "real.toml"
    package = 'package = "no_such_package_here"\nfile = "model.safetensors"\n'
    path.write_text(package + RAGGED + 'tensor = "odd.weight"\n', encoding="utf-8")
    return str(path)


@pytest.fixture
def kernels(monkeypatch):
    """What is run: torch's kernels, and what a test adds."""
    chosen = [registry()["torch/dense"], registry()["torch/dequant"]]
    monkeypatch.setattr(command, "matching_kernels", lambda patterns, device=None: chosen)
    return chosen


@pytest.fixture
def run(tmp_path, monkeypatch, kernels):
    """`vqbench run` on a machine with small caches; the records' folder is `tmp_path/results`."""
    monkeypatch.setattr(command, "where", lambda device, threads: zoo.DEVICE)
    monkeypatch.setattr(command, "Budget", functools.partial(Budget, warmup_s=0.001))
    monkeypatch.setattr(command, "measure_bandwidth", lambda device: Bandwidth(5e17, 1e18, 1))

    def invoke(*words):
        folder = ["--results", str(tmp_path / "results")]
        return CliRunner().invoke(cli, ["run", *QUICK, *folder, *words])

    return invoke


def results(tmp_path: Path) -> list[dict]:
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    return read_records(path)


SELECTION = ("-f", "vq-16x4", "-f", "rq-2x8x8", "-m", "1", "-m", "3")
CASES = 2 * 2 * 2 * 2  # layers, formats, m, kernels


def test_each_case_is_a_record(run, workload, tmp_path):
    done = run("-w", workload, *SELECTION)
    assert done.exit_code == 0, done.output
    records = results(tmp_path)
    assert len(records) == CASES
    assert {record["status"] for record in records} == {"ok"}
    key = ("layer", "format", "m", "kernel")
    assert len({tuple(record[name] for name in key) for record in records}) == CASES
    assert {(record["n"], record["k"]) for record in records} == {(37, 42), (41, 19)}


def test_a_record_tells_how_it_came_about(run, workload, tmp_path):
    run("-w", workload, "-l", "odd", "-f", "vq-16x4", "--seed", "5", "--hot")
    first, second = results(tmp_path)
    assert first["kernel"] == "torch/dense"
    assert first["workload"] == "ragged"
    assert (first["seed"], first["dtype"], first["codes"]) == (5, "float32", "uniform")
    assert first["spec"]["stages"] == [16]
    assert first["effective_bits"] == pytest.approx((5 * 41 * 4 + 16 * 4 * 16) / (41 * 19))
    assert first["timing"]["cache"]["codes"] == "hot"
    assert first["bandwidth"] == {"median": 5e17, "best": 1e18, "nbytes": 1}
    assert first["budget"]["max_samples"] == 7
    assert len(first["samples_s"]) == 7
    assert all(first["correctness"]["controls"].values())
    assert first["kernel_source"] == registry()["torch/dense"].source_hash
    assert set(first["state"]) == {"before", "after"}
    assert first["argv"] == ["vqbench", *sys.argv[1:]]
    assert second["id"].endswith("/2")


def test_a_throttled_gpu_is_recorded_and_said(run, workload, tmp_path, monkeypatch):
    states = ({"throttle_reasons": bits} for bits in [0, 0, 0, 0x40] * CASES)
    monkeypatch.setattr(bench.run, "device_state", lambda device: next(states))
    done = run("-w", workload, *SELECTION)
    assert done.exit_code == 0
    assert [record["state"]["after"]["throttle_reasons"] for record in results(tmp_path)] == [
        0,
        0x40,
    ] * (CASES // 2)
    said = f"  {CASES // 2} without a verdict: GPU throttled at the end: hw_thermal"
    assert said in done.stderr.splitlines()


def test_fused_layers_are_run_as_one(run, tmp_path):
    path = tmp_path / "pair.toml"
    layer = '[[layer]]\nname = "{}"\nn = {}\nk = 64\n'
    pair = '[[fused]]\nname = "ab"\nlayers = ["a", "b"]\n'
    head = 'about = "a"\nsource = "s"\nblocks = 1\n'
    path.write_text(head + layer.format("a", 32) + layer.format("b", 16) + pair, encoding="utf-8")
    done = run("-w", str(path), "--fuse", "-f", "rq-2x8x8", "-f", "pq-m8", "-f", "toy-16-4")
    assert done.exit_code == 0, done.output
    records = results(tmp_path)
    assert {(r["layer"], r["n"], r["k"]) for r in records} == {("ab", 48, 64)}
    found = {r["format"]: (r["status"], r["spec"]["group_size"]) for r in records}
    assert found["rq-2x8x8"] == ("ok", 32)
    assert found["toy-16-4"] == ("ok", 32)
    assert found["pq-m8"][0] == "constraint", "256 entries for fewer vectors"


def test_records_become_one_table(run, workload, tmp_path):
    run("-w", workload, *SELECTION)
    frame = load_records((tmp_path / "results").rglob("*.jsonl"))
    assert len(frame) == CASES
    assert (frame["median_s"] > 0).all()


def test_a_table_has_a_row_a_case_and_says_where_the_records_are(run, workload, tmp_path):
    done = run("-w", workload, *SELECTION)
    assert done.stdout.count("torch/dense") == CASES / 2
    assert "37x42" in done.stdout
    assert f"{CASES} cases: {CASES} ok" in done.stderr
    (path,) = (tmp_path / "results").rglob("*.jsonl")
    assert f"records: {path}" in done.stderr
    assert path.parent.name == zoo.DEVICE.slug


@pytest.mark.parametrize("output", ["csv", "json", "jsonl"])
def test_machine_forms_parse_back_and_nothing_else_is_on_stdout(run, workload, output):
    done = run("-w", workload, *SELECTION, "-o", output)
    if output == "csv":
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
    elif output == "json":
        rows = json.loads(done.stdout)
    else:
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert all(row["schema"] == 1 for row in rows)
    assert len(rows) == CASES
    assert rows[1]["kernel"] == "torch/dequant"


def test_markdown_is_a_table_of_one_width(run, workload):
    lines = run("-w", workload, *SELECTION, "-o", "md").stdout.splitlines()
    assert len(lines) == 2 + CASES
    assert len({line.count(" | ") for line in lines}) == 1


def test_layers_of_one_shape_share_a_row_unless_all_are_asked_for(run, workload):
    Path(workload).write_text(RAGGED.replace("n = 41\nk = 19", "n = 37\nk = 42"), encoding="utf-8")
    merged = run("-w", workload, "-f", "vq-16x4", "-o", "md").stdout.splitlines()
    assert [line.split(" | ")[1] for line in merged[2:]] == ["2 of 37x42"] * 2
    every = run("-w", workload, "-f", "vq-16x4", "-o", "md", "--all-layers").stdout.splitlines()
    assert [line.split(" | ")[1] for line in every[2:]] == ["wide", "wide", "odd", "odd"]


def test_a_format_that_a_layer_can_not_hold_is_refused_with_the_reason(run, tmp_path):
    done = run("-w", "minilm", "-l", "0.query", "-f", "vptq-65536-256")
    assert done.exit_code == 0
    reason = "65,536 entries for 18,432 vectors a codebook"
    assert all(record["reason"].startswith(reason) for record in results(tmp_path))
    assert {record["status"] for record in results(tmp_path)} == {"constraint"}
    assert f"1 x torch/dense: {reason}" in done.stderr


def test_a_missing_package_is_refused_with_its_command_and_the_rest_runs(
    run, missing, workload, tmp_path
):
    done = run("-w", missing, "-w", workload, "-l", "odd", "-f", "vq-16x4")
    assert done.exit_code == 0
    status = [(record["workload"], record["status"]) for record in results(tmp_path)]
    assert status == [("real", "constraint")] * 2 + [("ragged", "ok")] * 2
    assert "pip install no-such-package-here" in done.stderr


def test_a_failing_kernel_is_told_with_its_reason_and_the_rest_runs(run, kernels, workload):
    kernels.insert(1, zoo.make_kernel(zoo.zeros, name="bad"))
    done = run("-w", workload, "-l", "odd", "-f", "vq-16x4", "-o", "json")
    assert done.exit_code == 1
    assert [row["status"] for row in json.loads(done.stdout)] == ["ok", "incorrect", "ok"]
    (line,) = (line for line in done.stderr.splitlines() if "FAILED" in line)
    assert line.startswith("  FAILED ragged odd vq-16x4 m=1 test/bad: incorrect: error ")
    assert line.endswith(")")  # whole, however long


@pytest.mark.parametrize("name", zoo.ZOO)
def test_no_kernel_however_bad_ends_a_run(run, kernels, workload, tmp_path, name):
    make, status, _ = zoo.ZOO[name]
    kernels.insert(0, make())
    done = run("-w", workload, "-l", "odd", "-f", "vq-16x4")
    assert done.exit_code == (0 if status == "constraint" else 1)
    assert [record["status"] for record in results(tmp_path)] == [status, "ok", "ok"]


def test_names_with_brackets_and_colons_are_printed_as_they_are(run, workload, tmp_path):
    text = RAGGED.replace('"odd"', '"[/odd] :smile:"')
    folder = tmp_path / "results" / "[bold]"
    Path(workload).write_text(text, encoding="utf-8")
    done = run("-w", workload, "-f", "vq-16x4", "-o", "md", "--results", str(folder))
    assert done.exit_code == 0, done.output
    assert "[/odd] :smile: 41x19" in done.stdout
    assert f"records: {folder}" in done.stderr


def interrupt_at(number: int, monkeypatch):
    real, calls = bench.run.evaluate, []

    def evaluate(*words, **options):
        calls.append(words)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*words, **options)

    monkeypatch.setattr(bench.run, "evaluate", evaluate)


def test_an_interrupt_keeps_what_is_done(run, workload, tmp_path, monkeypatch):
    interrupt_at(3, monkeypatch)
    done = run("-w", workload, *SELECTION, "-o", "json")
    assert done.exit_code == 130
    assert len(results(tmp_path)) == 2
    assert len(json.loads(done.stdout)) == 2
    assert "interrupted" in done.stderr


def test_an_interrupt_before_the_first_case_leaves_no_file(run, workload, tmp_path, monkeypatch):
    interrupt_at(1, monkeypatch)
    done = run("-w", workload, *SELECTION)
    assert done.exit_code == 130
    assert not list((tmp_path / "results").rglob("*.jsonl"))
    assert "records:" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-w", "nothing"), "workload 'nothing' is unknown"),
        (("-l", "nothing"), "no layer matches nothing"),
        (("-f", "vq-16x4", "-f", "nothing"), "format 'nothing' is unknown"),
    ],
)
def test_a_bad_name_is_an_error_before_anything_is_measured(run, tmp_path, words, message):
    done = run(*words)
    assert isinstance(done.exception, VqError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "words", [("-m", "0"), ("--samples", "1"), ("-o", "xml"), ("--threads", "0"), ("--nothing",)]
)
def test_bad_usage_is_exit_code_2(run, words):
    done = run(*words)
    assert done.exit_code == 2
    assert words[0] in done.stderr


def test_a_folder_in_the_way_is_one_line(run, workload, tmp_path):
    (tmp_path / "results").write_text("in the way", encoding="utf-8")
    done = run("-w", workload, "-f", "vq-16x4")
    assert isinstance(done.exception, ContainerError)
    assert "--results" in str(done.exception)


@pytest.mark.parametrize("error", [BackendError("no GPU answers"), ContainerError("damaged")])
def test_the_entry_point_makes_one_line_and_exit_code_2_of_an_error(
    monkeypatch, capsys, kernels, error
):
    def fail(device, threads):
        raise error

    monkeypatch.setattr(command, "where", fail)
    monkeypatch.setattr(sys, "argv", ["vqbench", "run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_narrowing_the_default_keeps_its_layers(monkeypatch):
    chosen = selections((), (), (), (4, 8))
    assert [(one.workload, one.ms) for one in chosen] == [
        ("minilm", (4, 8)),
        ("llama2-7b", (4, 8)),
    ]
    (one,) = selections((), ("*.query",), (), ())
    assert (one.workload, one.layers, one.formats, one.ms) == (
        "minilm",
        ("*.query",),
        ("rq-2x256x8",),
        (1,),
    )


def test_a_plan_counts_its_cases_before_it_runs(workload):
    chosen = selections((workload,), (), ("vq-16x4", "vq-8x4"), (1, 2, 3))
    plan = bench.run.Plan(selections=chosen, kernels=(zoo.make_kernel(),) * 2, device=zoo.DEVICE)
    assert plan.size == 2 * 2 * 3 * 2


@pytest.mark.parametrize(("words", "code"), [((), 0), (("-f", "vq-0x0"), 2)])
def test_the_real_command_on_this_machine(workload, tmp_path, words, code):
    line = [sys.executable, "-W", "error", "-m", "bench.cli", "run", "--device", "cpu"]
    folder = ["--results", str(tmp_path / "results"), "-k", "torch/dense", "-o", "jsonl"]
    options = ["-w", workload, "-l", "odd", "-f", "vq-16x4", "--threads", "1", *QUICK, *folder]
    done = subprocess.run(
        [*line, *options, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    if code == 0:
        (record,) = (json.loads(text) for text in done.stdout.splitlines())
        assert (record["status"], record["timing"]["threads"]) == ("ok", 1)
        assert record["floor_s"] > 0
        assert record == results(tmp_path)[0]
    else:
        assert done.stdout == ""
        (text,) = done.stderr.splitlines()
        assert text.startswith("error: format: ")
        assert not (tmp_path / "results").exists()


def test_a_real_interrupt_keeps_the_records_and_exits_130(workload, tmp_path):
    line = [sys.executable, "-m", "bench.cli", "run", "--device", "cpu", "--time", "0.5"]
    folder = ["--results", str(tmp_path / "results"), "-k", "torch/dense"]
    options = ["-w", workload, "-f", "vq-16x4", "--samples", "1000000000", *folder]
    ms = [word for m in range(1, 33) for word in ("-m", str(m))]
    process = subprocess.Popen(
        [*line, *options, *ms],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # also where these tests are a job behind `&`: it and its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not any(
        path.stat().st_size for path in (tmp_path / "results").rglob("*.jsonl")
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert 1 <= len(results(tmp_path)) < 64
    assert output.count("torch/dense") == len(results(tmp_path))
