"""`--dry-run`: which cases a gate would measure, for how long, and what slowdown it could see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from autotune.timers import Budget
from autotune.verdict import detectable
from bench.gate.decide import Rules
from bench.gate.job import Target
from bench.gate.run import Options
from bench.tables import render
from vqkernels.errors import UnsupportedError
from vqkernels.kernel import registry
from vqkernels.parts import check_fit
from vqkernels.presets import parse_format
from vqkernels.problem import Problem

__all__ = ["plan_text"]

# Seconds of a pair, whose two processes start, compile and check side by side: before its first
# case (interpreter, torch, numba), for each kernel's code (numba), for each case. Pairs of 2 and of
# 24 cases took 12 and 16 s on a 2-core x86 machine.
_START_S = 6.0
_CODE_S = 2.0
_CASE_S = 0.3
# Both sides sample in turns, and each warms up.
_WARM_UP_S = Budget().warmup_s

_COLUMNS = {"case": "case", "sees": "finds a slowdown of", "why": "because"}


def plan_text(options: Options, rules: Rules, output: str = "table") -> str:
    """A table of the cases and some lines on time."""
    cases = options.cases()
    refusals = {one.name: _refusal(options, one) for one in cases}
    alive = [one for one in cases if refusals[one.name] is None]
    rows = [_row(one, refusals[one.name], len(alive), options, rules) for one in cases]
    sampling_s = 2 * (_WARM_UP_S + options.seconds)
    code = {(one.kernel, one.format) for one in alive}
    pair_s = _START_S + len(code) * _CODE_S + len(alive) * (_CASE_S + sampling_s)
    seconds = options.pairs * pair_s
    return "\n".join(
        [
            render(rows, _COLUMNS, output),
            "",
            f"{len(alive)} cases, {options.pairs} pairs of processes: about {_duration(seconds)}, "
            f"and up to as long again where something looks slower",
            *_unknown(alive, rules),
        ]
    )


def _row(
    case: Target, refusal: str | None, count: int, options: Options, rules: Rules
) -> dict[str, str]:
    if refusal is not None:
        return {"case": case.name, "sees": "-", "why": f"refused: {refusal}"}
    spread = rules.noise.spread(case.name) if rules.noise else None
    if rules.noise is None or spread is None:
        return {"case": case.name, "sees": "unknown", "why": "no selfcheck of this case here"}
    limits, rule = rules.thresholds.limits(case), rules.thresholds.rule
    rule = dataclasses.replace(rule, ratio=limits.ratio or rule.ratio)
    floor = rules.noise.floor(case.name)
    least = detectable(spread, options.pairs, rule, cases=count, noise=floor)
    why = f"pairs differ by {100 * spread:.3g} % (standard deviation)"
    return {"case": case.name, "sees": f"{100 * (least - 1):.3g} %", "why": why}


def _unknown(alive: Sequence[Target], rules: Rules) -> list[str]:
    known = [one for one in alive if rules.noise and rules.noise.spread(one.name) is not None]
    if len(known) == len(alive):
        return []
    return ["`vqbench selfcheck` with the same options measures how noisy the cases are here"]


def _refusal(options: Options, case: Target) -> str | None:
    """Why the kernel, as it is here, refuses the case."""
    kernel = registry().kernels.get(case.kernel)
    if kernel is None:
        return None  # a peer's, or one side's alone: its process tells
    spec = parse_format(case.format)
    try:
        check_fit(spec, case.n, case.k)
    except UnsupportedError as error:
        return str(error)
    problem = Problem(m=case.m, n=case.n, k=case.k, spec=spec, dtype=case.dtype)  # type: ignore[arg-type]  # click's choice
    return kernel.supports(problem, options.where)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} minutes"
