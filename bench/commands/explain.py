"""`vqbench explain`: which kernel and config serve a problem, why, and what tuned tables say."""

from __future__ import annotations

import json
import warnings
from typing import Any, get_args

import click
import torch

from bench.workload import parse_shape
from vqkernels import dispatch, tuned_lookup
from vqkernels.device import Device, detect, detect_cpu
from vqkernels.dispatch import Choice
from vqkernels.parts import check_shape
from vqkernels.presets import parse_format
from vqkernels.problem import Dtype, Problem
from vqkernels.tuned_lookup import Answer, TunedTableWarning
from vqkernels.tuned_table import Entry

__all__ = ["command"]

Row = dict[str, Any]


@click.command("explain")
@click.argument("form", metavar="FORMAT")
@click.argument("shape", metavar="NxK")
@click.option("-m", "m", type=click.IntRange(1), default=1, help="Tokens.")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), help="Of x; a CPU computes float32.")
@click.option("--bias", is_flag=True, help="With a bias.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or the GPU if there is one.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; as many as torch uses.")
@click.option("--tables", help="A tuned table or a folder of them, asked before all others.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def command(
    form: str,
    shape: str,
    m: int,
    dtype: Dtype | None,
    bias: bool,
    device: str,
    threads: int | None,
    tables: str | None,
    output: str,
) -> None:
    """Show which kernel and config serve x `[m, K]` times a weight `[N, K]` in FORMAT, and why.

    With the evidence of a tuned config, and all places where tuned tables are looked for, in
    order, with what was found there and why it was passed over.
    """
    where = detect(device)
    if where.kind == "cpu":
        where, dtype = detect_cpu(threads or torch.get_num_threads()), "float32"
    problem = _problem(form, shape, m, dtype or "float16", bias)
    if tables is not None:
        dispatch.use_tables(tables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TunedTableWarning)  # all of it is shown below
        choice, answer = dispatch.look_up(problem, where)
    facts = _facts(form, problem, where, choice, answer)
    click.echo(json.dumps(facts, indent=2) if output == "json" else _text(facts))


def _problem(form: str, shape: str, m: int, dtype: Dtype, bias: bool) -> Problem:
    layer, spec = parse_shape(shape), parse_format(form)
    check_shape(spec, layer.n, layer.k)
    return Problem(m=m, n=layer.n, k=layer.k, spec=spec, dtype=dtype, bias=bias)


def _facts(form: str, problem: Problem, device: Device, choice: Choice, answer: Answer) -> Row:
    default = dispatch.default_choice(problem, device)
    return {
        "problem": {
            "format": form,
            **{name: getattr(problem, name) for name in ("m", "n", "k", "dtype", "bias")},
        },
        "device": {name: getattr(device, name) for name in ("kind", "name", "arch", "units")},
        "kernel": choice.kernel.id,
        "config": dict(choice.config),
        "why": choice.why,
        "table": None if choice.table is None else str(choice.table),
        "default": {"kernel": default.kernel.id, "config": dict(default.config)},
        "evidence": [_evidence(entry) for entry in answer.entries],
        "places": _places(answer),
    }


def _evidence(entry: Entry) -> Row:
    """An entry but for what the problem and the choice tell already."""
    fields = entry.to_dict()
    names = ("m", "chosen", "default", "versions", "evidence")
    return {name: fields[name] for name in names}


def _places(answer: Answer) -> list[Row]:
    """Where tables are looked for, in order; those behind one that served were not asked."""
    rows: list[Row] = []
    served = False
    for place, path in tuned_lookup.places().items():
        found = [one for one in answer.findings if one.place == place]
        rows.append(
            {
                "place": place,
                "path": str(path),
                "asked": not served,
                "tables": [
                    {"path": str(one.path), "outcome": one.kind, "text": one.text} for one in found
                ],
            }
        )
        served = served or any(one.kind == "served" for one in found)
    return rows


# ------------------------------------------------------------------------------------------------
# for people


def _text(facts: Row) -> str:
    problem, device = facts["problem"], facts["device"]
    bias = " with a bias" if problem["bias"] else ""
    lines = [
        f"{problem['format']} {problem['n']}x{problem['k']}, m={problem['m']}, "
        f"{problem['dtype']}{bias}, on {device['name']} {device['arch']} ({device['units']})",
        f"kernel   {facts['kernel']}",
        f"config   {_values(facts['config'])}",
        f"why      {facts['why']}",
        f"default  {facts['default']['kernel']}  {_values(facts['default']['config'])}",
    ]
    for entry in facts["evidence"]:
        lines += _evidence_lines(entry)
    if not facts["places"]:
        return "\n".join([*lines, "tuned tables are off"])
    lines.append("tuned tables, in the order in which they are asked:")
    for place in facts["places"]:
        lines += _place_lines(place)
    return "\n".join(lines)


def _values(config: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items()) or "-"


def _evidence_lines(entry: Row) -> list[str]:
    found = entry["evidence"]
    origin = f", in {found['store']}" if found["store"] else ""
    return [
        f"evidence at m={entry['m']}: {found['ratio']:.4g}x the default's speed, "
        f"at least {found['low']:.4g}x, {found['pairs']} pairs, {found['made']}",
        f"  samples: subject {found['subject'] or '-'}{origin}",
        f"  made with {_values(entry['versions'])}",
    ]


def _place_lines(place: Row) -> list[str]:
    head = f"  {place['place']}: {place['path']}"
    if not place["asked"]:
        return [f"{head}: not asked"]
    if not place["tables"]:
        return [f"{head}: no tables"]
    lines = [head]
    for one in place["tables"]:
        outcome = "" if one["outcome"] == "served" else "passed over: "
        name = "" if one["path"] == place["path"] else f"{one['path']}: "
        lines.append(f"    {name}{outcome}{one['text']}")
    return lines
