"""Tuned tables at the operator: what they name serves vq_linear, and nothing in them breaks it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from vqkernels import TunedTableWarning, dispatch, oracle, use_tables
from vqkernels.device import detect_cpu
from vqkernels.dispatch import default_choice, look_up, select, vq_linear
from vqkernels.kernel import Registry, registry
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.tuned_table import Entry, Evidence, Pick, Table, TableDevice, stamp

RQ = PRESETS["rq-2x256x8"]


def weight(k: int = 64) -> QuantizedTensor:
    return random_tensor(RQ, 40, k, fit=False)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def hold(out: torch.Tensor, tensor: QuantizedTensor, x: torch.Tensor) -> None:
    verdict = oracle.check(out, oracle.reference(tensor, x))
    assert verdict.passed, verdict


CHANGED = "the source of numba/table has changed since it was measured"


@pytest.fixture
def tuned(tmp_path):
    """Tables with one entry that names a kernel for `weight()` and some m; unused afterwards."""
    device = detect_cpu(torch.get_num_threads())

    def entry(m, kernel, source) -> Entry:
        problem = Problem(m=m, n=40, k=64, spec=RQ)
        default, chosen = default_choice(problem, device), registry()[kernel]
        held = Pick.of(default.kernel, default.config)
        return Entry(
            spec=RQ,
            n=40,
            k=64,
            dtype="float32",
            m=m,
            chosen=Pick.of(chosen, chosen.default(problem, device)),
            default=held if source is None else dataclasses.replace(held, source=source),
            versions=stamp((chosen, default.kernel), device),
            evidence=Evidence(ratio=1.5, low=1.25, pairs=7, made="2026-01-02T00:00:00+00:00"),
        )

    def use(*ms, kernel="torch/dequant", default_source=None) -> Path:
        entries = tuple(entry(m, kernel, default_source) for m in ms or (7,))
        path = tmp_path / "table.json"
        path.write_text(json.dumps(Table(TableDevice.of(device), entries).to_dict("a test")))
        use_tables(path)
        return path

    yield use
    use_tables(None)


def served_by(monkeypatch, tensor, x) -> tuple[str, torch.Tensor]:
    """The kernel that serves a call, and what it gives."""
    plans, make = [], dispatch._Plan
    monkeypatch.setattr(dispatch, "_Plan", lambda *fields: plans.append(make(*fields)) or plans[-1])
    y = vq_linear(x, tensor)
    monkeypatch.undo()
    return plans[-1].choice.kernel.id, y


def test_a_tuned_table_serves_vq_linear(tuned, monkeypatch):
    tensor, x = weight(), inputs(7, 64)
    vq_linear(x, tensor)  # what is planned before is planned again
    path = tuned()
    name, y = served_by(monkeypatch, tensor, x)
    assert name == "torch/dequant"
    hold(y, tensor, x)
    choice = select(Problem(m=7, n=40, k=64, spec=RQ), detect_cpu(torch.get_num_threads()))
    assert choice.table == path
    assert choice.why.startswith(f"tuned table {path}: 1.5x the default numba/table row_tile=512 ")
    assert choice.why.endswith("(>= 1.25), 7 pairs, 2026-01-02")
    assert served_by(monkeypatch, tensor, x[:1])[0] == "numba/table", "for another m the default"
    use_tables(None)
    assert served_by(monkeypatch, tensor, x)[0] == "numba/table"


def test_neighbours_are_held_against_their_own_defaults(tuned, monkeypatch):
    tuned(1, 64)  # the defaults of 1, 7 and 64 differ
    tensor, x = weight(), inputs(7, 64)
    name, y = served_by(monkeypatch, tensor, x)
    assert name == "torch/dequant"
    hold(y, tensor, x)


def test_a_table_that_does_not_hold_leaves_the_default(tuned, monkeypatch):
    tensor, x = weight(), inputs(7, 64)
    tuned(default_source="another")
    with pytest.warns(TunedTableWarning, match=CHANGED):
        name, y = served_by(monkeypatch, tensor, x)
    vq_linear(x, weight())  # said once
    assert name == "numba/table"
    hold(y, tensor, x)
    choice = select(Problem(m=7, n=40, k=64, spec=RQ), detect_cpu(torch.get_num_threads()))
    assert choice.table is None
    assert choice.why.startswith("default order (cpu, m <= 8); tuned table ")
    assert CHANGED in choice.why


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"schema": 1, "entries"', b"\x00" * 99])
def test_a_damaged_table_leaves_the_default(data, tmp_path, monkeypatch, tuned):
    (tmp_path / "t.json").write_bytes(data)
    use_tables(tmp_path / "t.json")
    tensor, x = weight(), inputs(7, 64)
    with pytest.warns(TunedTableWarning, match=r"t\.json is passed over"):
        name, y = served_by(monkeypatch, tensor, x)
    assert name == "numba/table"
    hold(y, tensor, x)


def test_a_changed_kernel_leaves_the_default(tuned, monkeypatch):
    tuned()
    monkeypatch.setitem(registry()["torch/dequant"].__dict__, "source_hash", "changed")
    with pytest.warns(TunedTableWarning, match="the source of torch/dequant has changed"):
        vq_linear(inputs(7, 64), weight())


def test_a_tuned_config_that_does_not_compile_leaves_the_default(tuned, monkeypatch):
    tuned()
    tensor, x = weight(), inputs(7, 64)

    def broken(config, problem, device):
        raise RuntimeError("ptxas: too many registers\nsecond line")

    monkeypatch.setitem(registry()["torch/dequant"].__dict__, "compile", broken)
    with pytest.warns(TunedTableWarning, match="doesn't compile .RuntimeError: ptxas: too many"):
        hold(vq_linear(x, tensor), tensor, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hold(vq_linear(x, tensor), tensor, x)


def test_a_default_that_does_not_compile_is_an_error(monkeypatch):
    def broken(config, problem, device):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(registry()["numba/table"].__dict__, "compile", broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        vq_linear(inputs(6, 72), weight(k=72))


def test_tables_cost_a_call_nothing(tuned, monkeypatch):
    tuned()
    tensor, x = weight(), inputs(7, 64)
    vq_linear(x, tensor)
    monkeypatch.setattr(dispatch, "look_up", None)
    vq_linear(x, tensor)


def test_the_default_is_no_tables_business(tuned):
    tuned()
    kernels = {name: one for name, one in registry().kernels.items() if one.backend == "torch"}
    only = Registry(kernels, {"numba.table": "ImportError: no numba"})
    problem, device = Problem(m=7, n=40, k=64, spec=RQ), detect_cpu(torch.get_num_threads())
    assert default_choice(problem, device).kernel.id == "numba/table"
    assert default_choice(problem, device, only).kernel.id == "torch/table"
    choice, answer = look_up(problem, device)
    assert choice.kernel.id == "torch/dequant"
    assert answer.entries[0].m == 7
    with pytest.warns(TunedTableWarning, match="numba/table, which can't be used: ImportError"):
        assert look_up(problem, device, only)[0].kernel.id == "torch/table"
