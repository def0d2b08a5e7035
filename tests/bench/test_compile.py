"""`vqbench compile`: a table without a GPU, reasons, and one line for bad input."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.cubin import Cubin
from autotune.inspection import Inspection
from autotune.sass import Traffic
from bench.cli import cli
from bench.commands import compile as compile_command
from tests.interpreter import compiling_environment
from vqkernels.errors import VqError
from vqkernels.kernel import Kernel
from vqkernels.problem import Problem
from vqkernels.space import Config

ROOT = Path(__file__).resolve().parents[2]

CODE = Cubin(
    function="product",
    arch="sm_90",
    registers=40,
    stack_bytes=8,
    spill_store_bytes=4,
    spill_load_bytes=8,
    static_shared_bytes=0,
    instructions=100,
    loop=Traffic(
        instructions=50,
        global_loads={4: 1, 16: 8},
        shared_loads={},
        tensor={"HMMA.16816.F32": 8},
        local_store_bytes=0,
        local_load_bytes=0,
    ),
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that compile at once: 2 GB of shared memory at 8 warps, broken on sm_120.

    At 2 warps more still, which is known beforehand.
    """

    def inspect(
        kernel: Kernel, problem: Problem, arch: str, config: Config | None = None
    ) -> Iterator[Inspection]:
        chosen = config or Config(warps=4)
        if arch == "sm_120":
            yield Inspection(status="compile", config=chosen, reason="Error: no such type")
        elif chosen["warps"] == 8:
            yield Inspection(
                status="constraint", config=chosen, reason="needs 2 GB", code=CODE, shared_bytes=2
            )
        elif chosen["warps"] == 2:
            yield Inspection(
                status="constraint", config=chosen, reason="needs 4 GB", shared_bytes=4
            )
        else:
            yield Inspection(status="ok", config=chosen, code=CODE, shared_bytes=1024)

    monkeypatch.setattr(compile_command, "inspect_kernel", inspect)
    monkeypatch.delenv("TRITON_INTERPRET")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["compile", *arguments])


@pytest.mark.usefixtures("fake")
def test_table_shows_what_was_read() -> None:
    result = run("triton/naive", "--format", "aqlm-2x8")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "triton/naive" in line)
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[3:] == [
        "warps=4", "40", "12", "1,024", "16x8 4x1", "-", "HMMA.16816.F32x8", "50", "100",
    ]  # fmt: skip


@pytest.mark.usefixtures("fake")
def test_machine_forms_carry_everything() -> None:
    arguments = ("triton/naive", "--arch", "sm_80", "--arch", "sm_90", "--format", "pq-m8")
    rows = json.loads(run(*arguments, "-o", "json").output)
    assert [row["arch"] for row in rows] == ["sm_80", "sm_90"]
    assert rows[0]["spill_store_bytes"] == 4
    assert rows[0]["spill_load_bytes"] == 8
    table = list(csv.DictReader(io.StringIO(run(*arguments, "-o", "csv").output)))
    assert [row["kernel"] for row in table] == ["triton/naive"] * 2
    assert run(*arguments, "-o", "md").output.startswith("| kernel | format |")


@pytest.mark.usefixtures("fake")
def test_a_config_that_does_not_compile_is_a_row_and_exit_code_1() -> None:
    result = run("triton/naive", "--arch", "sm_90", "--arch", "sm_120", "-o", "json")
    assert result.exit_code == 1
    assert {row["status"] for row in json.loads(result.output)} == {"ok", "compile"}
    table = run("triton/naive", "--arch", "sm_90", "--arch", "sm_120")
    assert "aqlm-2x8, warps=4: does not compile: Error: no such type (sm_120)" in table.output


@pytest.mark.usefixtures("fake")
def test_configs_are_changes_of_the_default() -> None:
    result = run("triton/naive", "--config", "warps=8,tile_rows=32", "--config", "warps=4")
    assert result.exit_code == 0, result.output
    rows = json.loads(
        run(
            "triton/naive",
            *("--config", "warps=8,tile_rows=32", "--config", "warps=4"),
            *("--format", "aqlm-2x8", "-o", "json"),
        ).output
    )
    assert "tile_cells=16 tile_rows=32 tokens=1 warps=8" in rows[0]["config"]
    assert rows[0]["status"] == "constraint"
    assert rows[0]["registers"] == 40
    assert "tile_rows=8 tokens=1 warps=4" in rows[1]["config"]


@pytest.mark.usefixtures("fake")
def test_a_config_that_can_not_launch_is_a_line_that_names_it() -> None:
    changes = ("--config", "warps=2", "--config", "warps=4")
    result = run("triton/vectorized", "--format", "aqlm-2x8", *changes)
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("!"))
    assert line.startswith("! triton/vectorized, aqlm-2x8, layout=words")
    assert line.endswith("warps=2: needs 4 GB")


@pytest.mark.usefixtures("fake")
def test_a_parameter_that_some_kernels_lack_is_their_reason() -> None:
    result = run("triton/naive", "triton/mma", "--config", "tile_k=64", "-o", "json")
    rows = json.loads(result.output)
    assert {row["status"] for row in rows if row["kernel"] == "triton/mma"} == {"ok"}
    reasons = {row["reason"] for row in rows if row["kernel"] == "triton/naive"}
    assert len(reasons) == 1
    assert "no parameter 'tile_k'" in reasons.pop()


def test_kernels_without_programs_are_listed_with_the_reason() -> None:
    result = run("torch/dense", "numba/naive")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "! torch/dense: launches no GPU program of its own",
        "! numba/naive: launches no GPU program of its own",
    ]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sm_12"), "architecture 'sm_12' is unknown; use one of sm_80"),
        (("--shape", "4096"), "shape '4096': write output x input features"),
        (("--shape", "0x64"), "shape '0x64': write output x input features"),
        (("--format", "nope"), "format 'nope' is unknown"),
        (("--config", "warps"), "write key=value"),
        (("--config", "warps=3"), "warps=3 is not one of"),
        (("--config", "nope=3"), "no parameter 'nope'"),
        (("cuda/none",), "no kernel matches cuda/none"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run("triton/naive", *arguments)
    assert isinstance(result.exception, VqError)  # which `main` prints, with exit code 2
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_an_interpreting_triton_cannot_compile() -> None:
    result = run("triton/naive")
    assert isinstance(result.exception, VqError)
    assert "TRITON_INTERPRET" in str(result.exception)


def test_compiles_for_real(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.cli", "compile", "triton/naive", "triton/staged"),
            *("--format", "vptq-65536-256", "--shape", "100x75", "-o", "json"),
        ],
        cwd=ROOT,
        env=compiling_environment() | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    naive, staged = json.loads(done.stdout)
    assert (naive["status"], naive["program"], naive["arch"]) == ("ok", "gemv", "sm_90")
    assert naive["registers"] > 16
    assert "16x" in naive["global_loads"]
    assert naive["compiler"].startswith("triton ")
    assert (staged["status"], staged["registers"]) == ("constraint", None)
    assert "more than the 4,096 values" in staged["reason"]
