"""`vqbench export`: where tables go, and attempts as text."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autotune.export import conclude
from autotune.measurement import Correctness, Measurement
from autotune.replay import load_cache, load_results
from autotune.store import Key, Store
from bench.cli import cli
from vqkernels import tuned_lookup
from vqkernels.device import Device
from vqkernels.kernel import registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config
from vqkernels.tuned_table import Pick, load

DEVICE = Device(kind="cpu", name="Test", arch="any", units=8, llc_bytes=1, memory_bytes=1)
PROBLEM = Problem(m=1, n=64, k=128, spec=PRESETS["rq-2x256x8"])
DEFAULT = Pick.of(registry()["torch/dequant"], Config())


@dataclasses.dataclass(frozen=True)
class Found:
    winner: Pick = DEFAULT
    baseline: Pick = DEFAULT
    judgement: None = None


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(tuned_lookup, "PACKAGE", tmp_path / "package")
    return f"sqlite:///{tmp_path / 'tuning.sqlite'}"


def fill(url: str, *devices: Device) -> None:
    store = Store(url)
    for device in devices:
        subject = store.subject({"units": device.units})
        conclude(store, subject, PROBLEM, device, Found(), pairs=0)
    claim = store.claim(store.subject({"units": 1}), Key("a/b", "s", Config(tile=4)))
    assert claim is not None
    store.finish(claim, Measurement(status="runtime", reason="comma, and\nline"))
    store.close()


def run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["export", "--store", url, *arguments])


NAME = "test-any-8.json"


@pytest.mark.parametrize(
    ("to", "place"),
    [
        ([], f"config/vqbench/tuned/{NAME}"),
        (["--to", "user"], f"config/vqbench/tuned/{NAME}"),
        (["--to", "package"], f"package/{NAME}"),
        (["--to", "{}/folder"], f"folder/{NAME}"),
        (["--to", "{}/deep/mine.json"], "deep/mine.json"),
    ],
)
def test_where_a_table_goes(to: list[str], place: str, url: str, tmp_path: Path) -> None:
    fill(url, DEVICE)
    result = run(url, *(word.format(tmp_path) for word in to))
    assert result.exit_code == 0, result.output
    table = load(tmp_path / place)
    assert table.device.units == 8
    assert bool(table.entries[0].evidence.store) == (place != f"package/{NAME}")
    assert result.output == (
        f"{tmp_path / place}: Test any, 8 threads: 0 configs faster than the default, "
        f"1 problems where it stays\n"
    )


def test_a_table_a_device(url: str, tmp_path: Path) -> None:
    fill(url, DEVICE, dataclasses.replace(DEVICE, units=4))
    assert run(url, "--to", str(tmp_path / "all")).exit_code == 0
    assert sorted(one.name for one in (tmp_path / "all").iterdir()) == ["test-any-4.json", NAME]
    result = run(url, "--to", str(tmp_path / "one.json"))
    assert "there are 2 devices; name a folder" in str(result.exception)
    assert not (tmp_path / "one.json").exists()


def test_nothing_to_export_is_said(url: str) -> None:
    result = run(url)
    assert result.exit_code != 0
    assert "no verdicts yet; run `vqbench tune` first" in str(result.exception)


def test_attempts_as_csv(url: str) -> None:
    fill(url)
    (row,) = csv.DictReader(io.StringIO(run(url, "--format", "csv").output))
    assert row["kernel"] == "a/b"
    assert row["config.tile"] == "4"
    assert row["reason"] == "comma, and\nline"
    assert row["facts.units"] == "1"


def test_attempts_as_json_in_a_file(url: str, tmp_path: Path) -> None:
    fill(url)
    path = tmp_path / "rows.json"
    result = run(url, "--format", "json", "--to", str(path))
    assert (result.exit_code, result.output) == (0, "")
    (row,) = json.loads(path.read_text())
    assert row["measurement"]["status"] == "runtime"


def test_rows_need_a_file(url: str, tmp_path: Path) -> None:
    result = run(url, "--format", "csv", "--to", "package")
    assert result.exit_code == 2
    assert "--to package is for tables" in result.output
    result = run(url, "--format", "csv", "--to", str(tmp_path))
    assert "choose another file" in str(result.exception)


@pytest.mark.parametrize(("form", "read"), [("kernel-tuner", load_cache), ("t4", load_results)])
def test_what_was_searched_is_written_for_other_tools(form, read, url, tmp_path: Path) -> None:
    kernel = registry()["numba/dequant"]
    values = kernel.space.params[0].values
    configs = [Config(**{kernel.space.params[0].name: value}) for value in values[:2]]
    store = Store(url)
    facts = {"device": {"name": "Test"}, "m": 1, "n": 64, "k": 128}
    subject = store.subject(facts)
    right = Correctness(worst=0.1, max_abs=0.0, relative_rms=0.0, controls={})
    outcomes = (
        Measurement(status="ok", samples_s=(2e-3, 3e-3, 4e-3), correctness=right),
        Measurement(status="compile", reason="no"),
    )
    for config, outcome in zip(configs, outcomes, strict=True):
        for source, round in ((kernel.source_hash, 0), (kernel.source_hash, 1), ("older", 0)):
            claim = store.claim(subject, Key(kernel.id, source, config, round))
            store.finish(claim, outcome if round == 0 else outcomes[1])
    store.close()
    result = run(url, "--format", form, "--to", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").iterdir()
    assert result.stdout.strip() == str(path)
    assert path.name.startswith("numba-dequant-")
    recorded = read(path)
    assert recorded.outcome(configs[0]).seconds == pytest.approx(3e-3)
    failed = recorded.outcome(configs[1])
    assert (failed.seconds, failed.status) == (None, "compile")


def test_a_store_without_attempts_has_no_spaces(url, tmp_path: Path) -> None:
    result = run(url, "--format", "t4", "--to", str(tmp_path / "out"))
    assert "no attempts yet; run `vqbench tune` first" in str(result.exception)
