"""The command line's frame: commands by file, exit codes, and no traceback for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "bits",
    "compile",
    "convert",
    "doctor",
    "import",
    "inspect",
    "list",
    "predict",
    "quality",
    "quantize",
    "run",
]


def test_every_file_is_a_command_with_help() -> None:
    runner = CliRunner()
    text = runner.invoke(cli.cli, ["--help"])
    assert text.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in text.output
        one = runner.invoke(cli.cli, [name, "-h"])
        assert one.exit_code == 0
        assert one.output.startswith(f"Usage: cli {name} ")


def test_module_runs_from_a_source_tree() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: vqbench ")


def test_help_loads_no_kernel() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from bench.cli import cli;"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0;"
        "print([name for name in sys.modules if name.startswith(('numba', 'vqkernels.kernels.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["bits"], "--workload NAME or --shape NxK"),
        (["bits", "-f", "vq-9", "-s", "8x8"], "error: format 'vq-9' is unknown; use one of"),
        (["list", "sheep"], "'sheep' is not one of"),
        (["quantize", "none.safetensors", "-f", "vq-256x8", "-o", "."], "error: none.safetensors:"),
        (["convert", "none", "-o", "x.npz"], "error: none: there is no such file"),
        (["import", "none", "-o", "x"], "error: none: is not a folder"),
        (["inspect", "none.safetensors"], "error: none.safetensors: there is no such file"),
    ],
)
def test_bad_input_ends_in_2_with_the_reason(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["vqbench", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert not output.out
