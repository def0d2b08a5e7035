"""`vqbench explain`: what serves a problem and why, and what every table said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from bench.cli import cli
from vqkernels import tuned_lookup, use_tables
from vqkernels.device import detect_cpu
from vqkernels.dispatch import default_choice
from vqkernels.errors import SpecError
from vqkernels.kernel import registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.tuned_table import Entry, Evidence, Pick, Table, TableDevice, stamp

ASKED = ("rq-2x256x8", "64x128")
HERE = detect_cpu(3)


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("VQBENCH_TUNED")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(tuned_lookup, "PACKAGE", tmp_path / "package")
    use_tables(None)
    yield
    use_tables(None)


def table(path: Path, m: int = 4, **changes: Any) -> Path:
    """A table that names torch/dequant."""
    problem = Problem(m=m, n=64, k=128, spec=PRESETS["rq-2x256x8"])
    default, chosen = default_choice(problem, HERE), registry()["torch/dequant"]
    entry = Entry(
        spec=problem.spec,
        n=64,
        k=128,
        dtype="float32",
        m=m,
        chosen=Pick.of(chosen, chosen.default(problem, HERE)),
        default=Pick.of(default.kernel, default.config),
        versions=stamp((chosen, default.kernel), HERE),
        evidence=Evidence(
            ratio=1.5, low=1.25, pairs=7, made="2026-01-02T00:00:00+00:00", store="sqlite://x"
        ),
    )
    entry = dataclasses.replace(entry, **changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(Table(TableDevice.of(HERE), (entry,)).to_dict("a test")))
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["explain", *ASKED, "--device", "cpu", *arguments])


def explained(*arguments: str) -> dict[str, Any]:
    result = run("--threads", "3", "-o", "json", *arguments)
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.output)
    return facts


def test_without_tables_the_default_serves() -> None:
    facts = explained("-m", "4")
    assert facts["problem"] == {
        "format": "rq-2x256x8",
        "m": 4,
        "n": 64,
        "k": 128,
        "dtype": "float32",
        "bias": False,
    }
    assert facts["device"]["units"] == 3
    assert facts["kernel"] == facts["default"]["kernel"] == "numba/table"
    assert facts["config"] == facts["default"]["config"]
    assert facts["why"] == "default order (cpu, m <= 8)"
    assert facts["table"] is None
    assert facts["evidence"] == []
    assert [place["place"] for place in facts["places"]] == ["user", "package"]
    assert all(place["asked"] and not place["tables"] for place in facts["places"])


def test_a_tuned_config_is_shown_with_its_evidence(tmp_path: Path) -> None:
    path = table(tmp_path / "config" / "vqbench" / "tuned" / "a.json")
    facts = explained("-m", "4")
    assert facts["kernel"] == "torch/dequant"
    assert facts["default"]["kernel"] == "numba/table"
    assert facts["table"] == str(path)
    (found,) = facts["evidence"]
    assert found["evidence"]["ratio"] == 1.5
    assert found["default"]["kernel"] == "numba/table"
    assert "torch" in found["versions"]
    user, package = facts["places"]
    assert user["tables"][0]["outcome"] == "served"
    assert (package["asked"], package["tables"]) == (False, [])


def test_what_was_passed_over_has_its_reason(tmp_path: Path) -> None:
    named = table(tmp_path / "mine.json", versions={"numba": "0.1"})
    gap = table(tmp_path / "config" / "vqbench" / "tuned" / "a.json", m=5)
    serves = table(tmp_path / "package" / "b.json")
    facts = explained("-m", "4", "--tables", str(named))
    assert facts["table"] == str(serves)
    explicit, user, package = facts["places"]
    assert explicit["tables"][0]["outcome"] == "versions"
    assert "llvmlite was none" in explicit["tables"][0]["text"]
    assert user["tables"][0]["text"] == "m=4 lies outside what was measured (5 to 5)"
    assert user["tables"][0]["path"] == str(gap)
    assert package["tables"][0]["outcome"] == "served"


def test_for_people(tmp_path: Path) -> None:
    path = table(tmp_path / "config" / "vqbench" / "tuned" / "a.json")
    use_tables(tmp_path / "missing")
    lines = run("-m", "4", "--threads", "3").output.splitlines()
    assert lines[0].startswith("rq-2x256x8 64x128, m=4, float32, on ")
    assert lines[1] == "kernel   torch/dequant"
    assert lines[2].startswith("config   ")
    text = "\n".join(lines)
    assert f"why      tuned table {path}: 1.5x the default numba/table" in text
    assert "default  numba/table  row_tile=512 " in text
    assert "evidence at m=4: 1.5x the default's speed, at least 1.25x, 7 pairs, 2026-" in text
    assert "  samples: subject -, in sqlite://x" in text
    assert lines[-5:-2] == [
        f"  explicit: {tmp_path / 'missing'}",
        "    passed over: is no file; give one that `vqbench export` wrote",
        f"  user: {path.parent}",
    ]
    assert lines[-2].startswith(f"    {path}: 1.5x the default")
    assert lines[-1] == f"  package: {tmp_path / 'package'}: not asked"


def test_tables_that_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQBENCH_TUNED", "off")
    assert run().output.splitlines()[-1] == "tuned tables are off"
    assert explained()["places"] == []


def test_places_behind_the_one_that_served_were_not_asked(tmp_path: Path) -> None:
    facts = explained("-m", "4", "--tables", str(table(tmp_path / "mine.json")))
    assert [place["asked"] for place in facts["places"]] == [True, False, False]


def test_a_cpu_computes_in_float32_with_the_threads_that_torch_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    facts = json.loads(run("--dtype", "bfloat16", "--bias", "-o", "json").output)
    assert facts["problem"]["dtype"] == "float32"
    assert facts["problem"]["bias"] is True
    assert facts["device"]["units"] == 5


@pytest.mark.parametrize("shape", ["64", "64x", "0x128", "64x127x2", "٣x8", "a"])
def test_a_shape_that_is_none(shape: str) -> None:
    result = CliRunner().invoke(cli, ["explain", "pq-m8", shape])
    assert isinstance(result.exception, SpecError)
    assert "write output x input features, such as 4096x11008" in str(result.exception)
