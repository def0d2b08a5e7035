"""`vqbench bits`: the published figures, the split behind them, and what can't be held."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.cli import cli


def rows(*arguments: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(cli, ["bits", *arguments, "-o", "json"])
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.output)
    return found


def total(*arguments: str) -> dict[str, Any]:
    (found,) = rows(*arguments, "--totals")
    return found


@pytest.mark.parametrize(
    ("arguments", "bits", "whole"),
    [
        (("-f", "toy-16-4", "-w", "toy"), 10.75, (2752, 256)),
        (
            ("-f", "vptq-65536-256", "-w", "llama2-7b"),
            3.291288860103627,
            (666_075_136, 202_375_168),
        ),
        (
            ("-f", "vptq-65536-256", "-w", "llama2-7b", "--model"),
            3.291288860103627,
            (32 * 666_075_136, 32 * 202_375_168),
        ),
        (
            ("-f", "vptq-65536-256", "-w", "opt-125m"),
            10.13888888888889,
            (71_761_920, 7_077_888),
        ),
    ],
    ids=["toy", "llama2-7b", "llama2-7b-model", "opt-125m"],
)
def test_published_figures(arguments: tuple[str, ...], bits: float, whole: tuple[int, int]) -> None:
    found = total(*arguments)
    assert found["effective_bits"] == found["effective_bits_without_side"] == bits
    assert (found["index_bytes"] + found["codebook_bytes"]) * 8 == whole[0]
    assert (found["total_bits"], found["weights"]) == whole
    assert bits == pytest.approx(whole[0] / whole[1], rel=3e-16)
    assert found["side_bytes"] == 0
    assert found["ratio"] == pytest.approx(16 / bits)


def test_opt_figure_to_its_published_digits() -> None:
    assert f"{total('-f', 'vptq-65536-256', '-w', 'opt-125m')['effective_bits']:.6f}" == "10.138889"


def test_split_of_the_toy() -> None:
    found = total("-f", "toy-16-4", "-w", "toy")
    # 32 vectors of 4 + 2 bits; 16 + 4 entries of 8 fp16 elements
    assert (found["index_bytes"], found["codebook_bytes"]) == (24, 320)
    assert (found["index_bits"], found["codebook_bits"], found["side_bits"]) == (0.75, 10.0, 0.0)


@pytest.mark.parametrize(
    ("name", "codebook", "index"),
    [
        ("vq-256x16", 256 * 16 * 2, 256 * 256 // 16),  # 8 KB, a byte a vector
        ("pq-m8", 8 * 256 * 16 * 2, 256 * 256 // 16),  # 8 of them: 64 KB
        ("rq-2x256x16", 2 * 256 * 16 * 2, 2 * 256 * 256 // 16),
    ],
)
def test_sizes_of_the_textbook_formulas(name: str, codebook: int, index: int) -> None:
    found = total("-f", name, "-s", "256x256")
    assert (found["codebook_bytes"], found["index_bytes"]) == (codebook, index)


def test_side_data_is_counted_and_can_be_left_out() -> None:
    found = total("-f", "aqlm-2x8", "-s", "64x256")
    assert found["side_bytes"] == 64 * 2  # an fp16 scale a row
    weights = 64 * 256
    assert found["side_bits"] == 64 * 16 / weights
    assert found["effective_bits_without_side"] == 2 + 2 * 256 * 8 * 16 / weights
    assert found["effective_bits"] == 2 + 2 * 256 * 8 * 16 / weights + 64 * 16 / weights


def test_layers_of_a_model_count_once_a_block() -> None:
    block = rows("-f", "aqlm-2x8", "-w", "llama2-7b", "-l", "q_*", "-l", "down_proj")
    model = rows("-f", "aqlm-2x8", "-w", "llama2-7b", "-l", "q_*", "-l", "down_proj", "--model")
    assert [row["layer"] for row in block] == ["q_proj", "down_proj", "total"]
    assert [row["count"] for row in model] == [32, 32, 64]
    assert (
        model[-1]["bytes"]
        == 32 * block[-1]["bytes"]
        == 32 * (block[0]["bytes"] + block[1]["bytes"])
    )
    assert model[0]["bytes"] == block[0]["bytes"]  # a layer's own


def test_a_layer_too_small_is_counted_and_flagged() -> None:
    small, large, both = rows("-f", "vptq-65536-256", "-s", "384x384", "-s", "1536x384")
    assert not small["fits"]
    assert "65,536 entries for 18,432 vectors" in small["note"]
    assert small["total_bits"] == 3 * 384**2 + (65536 + 256) * 8 * 16
    assert large["fits"]
    assert not large["note"]
    assert not both["fits"]
    table = CliRunner().invoke(cli, ["bits", "-f", "vptq-65536-256", "-s", "384x384"]).output
    assert "! vptq-65536-256: 65,536 entries for 18,432 vectors" in table


def test_a_layer_that_cannot_be_cut_has_no_figures_and_no_total() -> None:
    bad, good, both = rows("-f", "opq-m8", "-s", "100x100", "-s", "384x384")
    assert bad["effective_bits"] is None
    assert "rotation of 128" in bad["note"]
    assert good["effective_bits"] > 0
    assert both["effective_bits"] is None
    assert "no total" in both["note"]


def test_formats_repeat_and_default_to_all_presets(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("vector_length = 4\nstages = [16]\n", encoding="utf-8")
    found = rows("-f", "vq-512x8", "-f", str(own), "-s", "512x512", "--totals")
    assert [row["format"] for row in found] == ["vq-512x8", str(own)]
    assert found[0]["index_bits"] == 9 / 8
    assert found[1]["index_bits"] == 1
    assert len(rows("-s", "512x512", "--totals")) == 15


def test_outputs_agree() -> None:
    arguments = ["bits", "-f", "toy-16-4", "-w", "toy", "--totals", "-o"]
    texts = {o: CliRunner().invoke(cli, [*arguments, o]).output for o in ("csv", "jsonl", "md")}
    (record,) = csv.DictReader(io.StringIO(texts["csv"]))
    assert float(record["effective_bits"]) == json.loads(texts["jsonl"])["effective_bits"] == 10.75
    assert record["weights"] == "256"
    assert "| 10.7500 |" in texts["md"]


def test_table_shows_split_and_bytes() -> None:
    output = CliRunner().invoke(cli, ["bits", "-f", "vptq-65536-256", "-w", "llama2-7b"]).output
    last = output.splitlines()[-1].split()
    assert last[:2] == ["vptq-65536-256", "block"]
    assert {"3.0000", "0.2913", "3.2913", "75,890,688", "7,368,704", "404,750,336"} <= set(last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-w", "toy", "-s", "8x8"], "either --workload NAME or --shape"),
        (["-s", "8x8", "--model"], "go with --workload"),
        (["-w", "toy", "-o", "xml"], "is not one of"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["bits", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-w", "gpt-9"], "workload 'gpt-9' is unknown"),
        (["-w", "toy", "-l", "q_*"], "no layer matches q_*; there are: weight"),
        (["-s", "8x8", "-f", "none.toml"], "format file none.toml"),
        (["-s", "8by8"], "shape '8by8': write output x input features"),
        (["-s", "0x8"], "shape '0x8': write output x input features"),
    ],
)
def test_bad_names(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["bits", *arguments])
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
