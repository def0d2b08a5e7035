import errno
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import pytest

from autotune.measurement import Correctness, Measurement
from bench import records
from bench.records import SCHEMA_VERSION, Case, RecordFile, load_records, read_records
from vqkernels.errors import ContainerError
from vqkernels.space import Config

HEADER = {"argv": ["vqbench"], "device": {"name": "Test"}, "host": "here"}
STATE = {"before": {"load_1m": 0.5}, "after": {"load_1m": 1.5}}
OK = Measurement(
    status="ok",
    samples_s=(3.0, 1.0, 2.0),
    correctness=Correctness(worst=0.1, max_abs=0.1, relative_rms=0.1, controls={"zeros": True}),
)
REFUSED = Measurement(status="constraint", reason="a limit of 4 entries")


def make_case(**fields) -> Case:
    values = {
        "workload": "toy",
        "layer": "q — proj",
        "format": "vq-256x8",
        "spec": {"stages": [256]},
        "n": 37,
        "k": 22,
        "m": 1,
        "dtype": "float32",
        "kernel": "torch/dense",
        "kernel_source": "abc",
        "config": Config(tile=8),
        "config_from": "default",
        "seed": 0,
        "codes": "uniform",
        "relative_error": None,
        "effective_bits": 2.5,
    }
    return Case(**values | fields)


def write_two(folder: Path) -> Path:
    with RecordFile(folder, HEADER) as file:
        file.write(make_case(), OK, STATE)
        file.write(make_case(kernel="torch/table"), REFUSED, STATE)
    return file.path


def assert_one_line(error, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_what_is_written_is_read_back(tmp_path):
    with RecordFile(tmp_path, HEADER) as file:
        written = [file.write(make_case(m=m), OK, STATE) for m in (1, 2)]
    read = read_records(file.path)
    assert read == json.loads(json.dumps(written, default=dict))
    first = read[0]
    assert (first["schema"], first["m"], first["host"]) == (SCHEMA_VERSION, 1, "here")
    assert first["config"] == {"tile": 8}
    assert first["state"] == STATE
    assert first["samples_s"] == [3.0, 1.0, 2.0]
    assert records.measurement_of(first) == OK


def test_each_record_has_an_id_of_its_own_and_a_time_with_a_zone(tmp_path):
    first, second = read_records(write_two(tmp_path))
    assert first["id"].endswith("/1")
    assert second["id"].endswith("/2")
    assert first["time"][-6] in "+-"


def test_a_line_is_on_disk_before_the_next_case_starts(tmp_path):
    with RecordFile(tmp_path, HEADER) as file:
        for count in (1, 2, 3):
            file.write(make_case(), OK, STATE)
            text = file.path.read_text(encoding="utf-8")
            assert text.endswith("\n")
            assert len(text.splitlines()) == count


def test_pandas_gets_a_row_a_record(tmp_path):
    frame = load_records([write_two(tmp_path), write_two(tmp_path)])
    assert len(frame) == 4
    assert frame["kernel"].tolist() == ["torch/dense", "torch/table"] * 2
    assert frame["device"].tolist() == ["Test"] * 4
    assert len(set(frame["path"])) == 2
    assert frame["arch"].tolist() == [None] * 4
    assert frame["median_s"].tolist()[0] == 2.0
    assert frame["spread"].tolist()[0] == pytest.approx(0.25)
    assert math.isnan(frame["median_s"].tolist()[1])
    assert math.isnan(frame["spread"].tolist()[1])
    assert frame["reason"].tolist()[1] == REFUSED.reason


def test_no_files_make_an_empty_table():
    assert load_records([]).empty


def test_an_interrupted_run_keeps_what_it_measured(tmp_path):
    def run():
        with RecordFile(tmp_path, HEADER) as file:
            file.write(make_case(), OK, STATE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    (path,) = tmp_path.iterdir()
    assert len(read_records(path)) == 1


class Interrupting(FileIO):
    """Ctrl-C arrives within each write, which writes at most 100 bytes."""

    def write(self, data):
        signal.raise_signal(signal.SIGINT)
        return super().write(data[:100])


def test_an_interrupt_within_a_write_comes_when_the_line_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FileIO", Interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job behind `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt), RecordFile(tmp_path, HEADER) as file:
            file.write(make_case(), OK, STATE)
        with pytest.raises(KeyboardInterrupt):  # Ctrl-C works as before
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    (record,) = read_records(file.path)
    assert json.loads(json.dumps(file.records, default=dict)) == [record]


def test_records_are_written_from_any_thread(tmp_path):
    with RecordFile(tmp_path, HEADER) as file, ThreadPoolExecutor(1) as pool:
        pool.submit(file.write, make_case(), OK, STATE).result()
    assert len(read_records(file.path)) == 1


def test_an_empty_run_leaves_no_file(tmp_path):
    with RecordFile(tmp_path, HEADER) as file:
        assert file.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_runs_in_the_same_second_do_not_collide(tmp_path):
    files = [RecordFile(tmp_path, HEADER) for _ in range(4)]
    for m, file in enumerate(files):
        with file:
            file.write(make_case(m=m), OK, STATE)
    assert len({file.path for file in files}) == 4
    assert [read_records(file.path)[0]["m"] for file in files] == [0, 1, 2, 3]


def test_runs_that_start_at_the_same_moment_do_not_collide(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: RecordFile(tmp_path, HEADER), range(32)))
    assert len({file.path for file in files}) == 32
    for file in files:
        with file:
            pass


LINES = {
    "no JSON": "{",
    "no object": "[1]",
    "a number": "7",
    "empty": "",
    "no schema": "{}",
    "nothing but a schema": '{"schema": 1}',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_corrupt_line_is_named(tmp_path, line):
    path = write_two(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    for read in (read_records, lambda path: load_records([path])):
        with pytest.raises(ContainerError) as error:
            read(path)
        assert_one_line(error, str(path), "line 3", "remove it")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.pop("status"),
        lambda record: record.pop("kernel"),
        lambda record: record.pop("device"),
        lambda record: record.update(samples_s=[]),
        lambda record: record.update(samples_s=[1.0, "2"]),
        lambda record: record.update(samples_s=[1.0, math.nan]),
        lambda record: record.update(samples_s=[1.0, math.inf]),
        lambda record: record.update(samples_s=[1.0, 2.0, -1.0]),
        lambda record: record.update(samples_s=[0.0, 0.0, 1.0]),
        lambda record: record.update(correctness={"worst": 1}),
        lambda record: record.update(kernel=7),
        lambda record: record.update(m=None),
        lambda record: record.update(gate="A"),
        lambda record: record.update(steps=[{"layer": "q"}]),
        lambda record: record.update(
            timing={"timer": "perf_counter", "warmup_s": 0.1, "copies": 1, "cache": "cold"}
        ),
    ],
    ids=[
        "status",
        "kernel",
        "device",
        "samples",
        "a text",
        "NaN",
        "infinity",
        "negative",
        "a median of 0",
        "correctness",
        "a type",
        "a missing number",
        "gate",
        "a step",
        "cache",
    ],
)
def test_a_record_that_lacks_what_readers_need_is_named(tmp_path, spoil):
    path = write_two(tmp_path)
    record = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    spoil(record)
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(ContainerError) as error:
        load_records([path])
    assert_one_line(error, str(path), "line 1")


@pytest.mark.parametrize("lost", [1, 20, 200])
def test_a_line_that_was_never_finished_is_passed_over_and_cut_off(tmp_path, lost):
    path = write_two(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert len(read_records(path)) == 1
    with RecordFile.reopen(path, HEADER) as file:
        assert len(file.records) == 1
        file.write(make_case(), OK, {}, {"host": "another", "odd": 1})
    first, second = read_records(path)
    assert path.read_bytes().startswith(whole.split(b"\n")[0] + b"\n")
    assert (second["id"].rpartition("/")[2], second["odd"], second["host"]) == ("2", 1, "another")
    assert "odd" not in first


def test_a_file_without_a_whole_line_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"schema": 1', encoding="utf-8")
    with pytest.raises(ContainerError) as error:
        read_records(path)
    assert_one_line(error, str(path), "holds no record")


def test_another_schema_is_named(tmp_path):
    path = write_two(tmp_path)
    text = path.read_text(encoding="utf-8").replace('{"schema": 1', '{"schema": 99', 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ContainerError) as error:
        read_records(path)
    assert_one_line(error, "line 1", "schema 99", f"reads {SCHEMA_VERSION}")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_what_is_no_text_file_is_one_line(tmp_path, content):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ContainerError) as error:
        read_records(path)
    assert_one_line(error, str(path), "can't be read")


def test_a_folder_that_can_not_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ContainerError) as error:
            RecordFile(folder, HEADER)
        assert_one_line(error, str(folder), "--results")


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(records, "FileIO", refuse)  # a mode would not stop root
    with pytest.raises(ContainerError) as error:
        RecordFile(tmp_path, HEADER)
    assert_one_line(error, str(tmp_path), "Permission denied", "--results")


def test_a_value_that_json_does_not_know_is_a_mistake_not_a_record(tmp_path):
    with RecordFile(tmp_path, HEADER) as file:
        with pytest.raises(TypeError, match="JSON doesn't know"):
            file.write(make_case(codes=object), OK, STATE)
        with pytest.raises(ValueError, match="JSON"):
            file.write(make_case(relative_error=math.nan), OK, STATE)
    assert list(tmp_path.iterdir()) == []


# A limit on the size of files fails a write half-way, as a full disk does.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from bench.records import RecordFile
from tests.bench.test_records import HEADER, OK, STATE, make_case
from vqkernels.errors import ContainerError
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with RecordFile(folder, HEADER) as file:
        size = 0
        if sys.argv[2] == "second":
            file.write(make_case(), OK, STATE)
            size = file.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        file.write(make_case(), OK, STATE)
except ContainerError as error:
    print(error)
"""


@pytest.mark.parametrize(("fails", "kept"), [("first", 0), ("second", 1)])
def test_a_full_disk_is_one_line_and_leaves_no_half_record(tmp_path, fails, kept):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), fails],
        cwd=Path(records.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "can't be written: File too large" in line
    assert f"record {kept + 1} " in line
    assert [len(read_records(path)) for path in tmp_path.iterdir()] == [kept] * bool(kept)


def test_a_file_is_named_after_its_command(tmp_path):
    names = []
    for _ in range(2):
        with RecordFile(tmp_path, HEADER, "gpu-check") as file:
            file.write(make_case(), OK, STATE)
        names.append(file.path.name)
    assert all("-gpu-check" in name and name.endswith(".jsonl") for name in names)
    assert len(set(names)) == 2


def test_a_block_of_layers_reads_back(tmp_path):
    steps = ({"layer": "q", "n": 37, "k": 22, "kernel": "torch/dense", "config": Config(tile=8)},)
    with RecordFile(tmp_path, HEADER) as file:
        file.write(make_case(layer="block", n=None, k=None, steps=steps), OK, STATE)
    (record,) = read_records(file.path)
    assert (record["n"], record["k"]) == (None, None)
    assert record["steps"] == [{**steps[0], "config": {"tile": 8}}]


def test_records_from_before_blocks_still_read(tmp_path):
    path = write_two(tmp_path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        assert line.pop("steps") == []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert read_records(path) == lines
    assert len(load_records([path])) == 2
