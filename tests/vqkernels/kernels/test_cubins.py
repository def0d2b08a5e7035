"""What the GPU kernels compile to, held to the kept table and to what they promise.

The table belongs to one version of the compilers: with others, rows are compiled and held to the
promises, but not compared. `python -m tests.vqkernels.kernels.keep_cubins` rewrites it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.inspection import ARCHS
from tests.interpreter import compiling_environment
from tests.vqkernels.kernels import keep_cubins
from tests.vqkernels.kernels.keep_cubins import FORMATS, KEY
from vqkernels.atomic import locked

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]

TENSOR = {"HMMA", "HGMMA", "UTCHMMA"}


@functools.cache
def compiled(scope: str, folder: Path) -> list[Row]:
    """One process compiles all rows, once for all that test: Triton is interpreting in this one."""
    rows: list[Row]
    found = folder / f"{scope}.json"
    with locked(found):
        if not found.exists():
            found.write_text(_compile(scope, folder), encoding="utf-8")
        rows = json.loads(found.read_text(encoding="utf-8"))
    return rows


def _compile(scope: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.vqkernels.kernels.keep_cubins", "--print", scope],
        cwd=ROOT,
        env=compiling_environment()
        | {"TRITON_CACHE_DIR": str(folder), "VQBENCH_CACHE": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes that test."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return tmp_path_factory.mktemp("compiled")
    shared = tmp_path_factory.getbasetemp().parent / "compiled"
    shared.mkdir(exist_ok=True)
    return shared


def name(row: Row) -> str:
    return ", ".join(row[key] for key in KEY)


def worse(kept: Row, now: Row) -> list[str]:
    """What got worse, or changed without being better."""
    found = []
    if now["status"] != kept["status"]:
        return [f"{name(now)}: {kept['status']} became {now['status']}: {now['reason']}"]
    if not now["registers"]:  # refused, or not compiled
        return []
    if int(now["spill_bytes"]) > int(kept["spill_bytes"]):
        found.append(f"spills {now['spill_bytes']} bytes, before {kept['spill_bytes']}")
    found += [
        f"{key}: {now[key] or 'none'}, before {kept[key] or 'none'}"
        for key in ("global_load_bytes", "shared_load_bytes", "tensor")
        if now[key] != kept[key]
    ]
    if int(now["registers"]) > 1.1 * int(kept["registers"]):
        found.append(f"{now['registers']} registers, before {kept['registers']}")
    return [f"{name(now)}: {line}" for line in found]


def compare(found: list[Row]) -> None:
    kept = {name(row): row for row in keep_cubins.read()}
    for row in found:
        assert name(row) in kept, f"{name(row)} is not in the table: rewrite it"
    same = [row for row in found if row["compiler"] == kept[name(row)]["compiler"]]
    if not same:
        was, now = kept[name(found[0])]["compiler"], found[0]["compiler"]
        pytest.skip(f"the table was kept with {was}; here is {now}")
    complaints = [line for row in same for line in worse(kept[name(row)], row)]
    assert not complaints, "\n".join(complaints)


def keep_promises(rows: list[Row]) -> None:
    """What holds for any version of the compilers."""
    defaults = [row for row in rows if row["default"] == "yes"]
    for row in defaults:
        assert row["status"] == "ok", f"{name(row)}: {row['reason']}"
        assert row["spill_bytes"] == "0", f"{name(row)} spills {row['spill_bytes']} bytes"
    vectorized = [r for r in defaults if r["kernel"] == "triton/vectorized"]
    byte_codes = [r for r in vectorized if r["format"] in ("aqlm-2x8", "rq-4x256x8")]
    assert byte_codes
    for row in byte_codes:
        # codes, entries and x alike: no load in the loop is narrower
        assert row["global_load_bytes"] == "16", name(row)
    for row in vectorized:
        assert "16" in row["global_load_bytes"].split(), name(row)
    for row in defaults:
        if row["kernel"] == "cuda/vectorized":
            assert "16" in row["global_load_bytes"].split(), name(row)
        if row["kernel"] == "cuda/staged":
            assert row["shared_load_bytes"] == "16", name(row)
    mma = [row for row in rows if row["kernel"] == "triton/mma"]
    assert mma
    for row in mma:
        assert set(row["tensor"].split()) & TENSOR, name(row)


def keep_footprints(rows: list[Row]) -> None:
    """What a kernel declares before it compiles: never less than it takes, at most 15 % more."""
    compiled = [row for row in rows if row["registers"]]
    assert compiled
    for row in compiled:
        declared, taken = int(row["footprint_bytes"]), int(row["shared_bytes"])
        assert taken <= declared <= 1.15 * taken, f"{name(row)}: {declared} declared, {taken} taken"


# ------------------------------------------------------------------------------------------------
# the kept table


def test_table_has_every_kernel_format_and_architecture() -> None:
    rows = keep_cubins.read()
    kernels = {kernel.id for kernel in keep_cubins.gpu_kernels()}
    assert {row["kernel"] for row in rows} == kernels
    assert {row["format"] for row in rows} == set(FORMATS)
    defaults = [row for row in rows if row["default"] == "yes"]
    assert {(r["kernel"], r["arch"]) for r in defaults} == {(k, a) for k in kernels for a in ARCHS}
    assert {row["kernel"] for row in rows if row["default"] == "no"} == kernels
    assert len({name(row) for row in rows}) == len(rows)


def test_table_keeps_the_promises() -> None:
    keep_promises(keep_cubins.read())


def row(**fields: str) -> Row:
    made = next(r for r in keep_cubins.read() if r["kernel"] == "triton/mma")
    return made | fields


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"registers": "109"}, None),
        ({"registers": "80"}, None),
        ({"registers": "111"}, "111 registers, before 100"),
        ({"spill_bytes": "8"}, "spills 8 bytes, before 0"),
        ({"global_load_bytes": "16 4 1"}, "global_load_bytes: 16 4 1, before 16 4"),
        ({"shared_load_bytes": "4"}, "shared_load_bytes: 4, before"),
        ({"tensor": ""}, "tensor: none, before HMMA"),
        ({"status": "compile", "reason": "x"}, "ok became compile: x"),
    ],
)
def test_what_counts_as_worse(change: dict[str, str], complaint: str | None) -> None:
    kept = row(registers="100", global_load_bytes="16 4", tensor="HMMA")
    found = worse(kept, kept | change)
    assert len(found) == (complaint is not None)
    if complaint:
        assert complaint in found[0]
        assert found[0].startswith("triton/mma, aqlm-2x8, 16, sm_80, ")


def test_broken_promises_are_seen() -> None:
    rows = keep_cubins.read()
    for kernel, change in (
        ("triton/naive", {"spill_bytes": "4"}),
        ("triton/vectorized", {"global_load_bytes": "16 4"}),
        ("triton/mma", {"tensor": ""}),
        ("triton/mma", {"status": "constraint", "reason": "too much"}),
    ):
        at = next(i for i, r in enumerate(rows) if r["kernel"] == kernel)
        doctored = [*rows[:at], rows[at] | change, *rows[at + 1 :]]
        with pytest.raises(AssertionError, match=kernel):
            keep_promises(doctored)


def test_another_compiler_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = keep_cubins.read()
    with pytest.raises(pytest.skip.Exception, match="the table was kept with"):
        compare([rows[0] | {"compiler": "triton 9, ptxas 99", "spill_bytes": "4"}])
    with pytest.raises(AssertionError, match="not in the table"):
        compare([rows[0] | {"format": "new"}])


# ------------------------------------------------------------------------------------------------
# compiled now


def test_core_keeps_the_promises(folder: Path) -> None:
    rows = compiled("core", folder)
    assert {row["kernel"] for row in rows} == {row["kernel"] for row in keep_cubins.read()}
    keep_promises(rows)


def test_core_declares_its_shared_memory(folder: Path) -> None:
    keep_footprints(compiled("core", folder))


@pytest.mark.parametrize("declared", ["999", "1151", ""])
def test_a_wrong_footprint_is_seen(declared: str) -> None:
    found = row(shared_bytes="1000", footprint_bytes="1150")
    keep_footprints([found])
    with pytest.raises((AssertionError, ValueError), match=declared or "invalid literal"):
        keep_footprints([found | {"footprint_bytes": declared}])


def test_core_is_as_kept(folder: Path) -> None:
    compare(compiled("core", folder))


@pytest.mark.sweep
def test_all_keep_the_promises(folder: Path) -> None:
    keep_promises(compiled("all", folder))


@pytest.mark.sweep
def test_all_declare_their_shared_memory(folder: Path) -> None:
    keep_footprints(compiled("all", folder))


@pytest.mark.sweep
def test_all_are_as_kept(folder: Path) -> None:
    found = compiled("all", folder)
    compare(found)
    gone = {name(row) for row in keep_cubins.read()} - {name(row) for row in found}
    assert not gone, f"in the table only: {sorted(gone)[0]}; rewrite it"
