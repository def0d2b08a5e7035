"""Tuning a selection: one loop for each distinct product, on one device, into one store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from autotune.arms import arms
from autotune.bandwidth import Bandwidth
from autotune.export import conclude
from autotune.store import Store
from autotune.timers import Budget
from autotune.trial import Processes, Recipe
from autotune.tune import Choice, Plan, Progress, Result, tune
from bench.selection import Selection
from vqkernels.device import Device
from vqkernels.dispatch import default_choice
from vqkernels.errors import UnsupportedError
from vqkernels.kernel import Kernel
from vqkernels.parts import check_fit
from vqkernels.problem import Dtype

__all__ = ["Job", "Tuned", "jobs", "tune_job"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A product to tune, named as the user did: the layers of one shape, a format, tokens."""

    layers: tuple[str, ...]
    format: str
    recipe: Recipe

    def __str__(self) -> str:
        one = self.recipe
        return f"{'/'.join(self.layers)} {one.n}x{one.k} {self.format} m={one.m}"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What came of a job."""

    job: Job
    result: Result


def jobs(
    selections: Sequence[Selection], device: Device, dtype: Dtype, *, seed: int, cold: bool
) -> tuple[list[Job], list[str]]:
    """A job for each distinct shape, format and m; and why other layers have none."""
    found: dict[Recipe, Job] = {}
    refused: list[str] = []
    for chosen in selections:
        for workload, layer, name in chosen.cases():
            try:
                spec = layer.spec(name)
                check_fit(spec, layer.n, layer.k)
            except UnsupportedError as error:
                refused.append(f"{workload.name} {layer.name} {name}: {error}")
                continue
            for m in chosen.ms:
                recipe = Recipe(
                    spec=spec,
                    n=layer.n,
                    k=layer.k,
                    m=m,
                    dtype=dtype,
                    device=device.torch_name,
                    threads=device.units if device.kind == "cpu" else 1,
                    seed=seed,
                    cold=cold,
                )
                before = found[recipe].layers if recipe in found else ()
                names = tuple(dict.fromkeys((*before, layer.name)))
                found[recipe] = Job(names, name, recipe)
    return list(found.values()), refused


def tune_job(
    job: Job,
    kernels: Sequence[Kernel],
    device: Device,
    store: Store,
    plan: Plan,
    budget: Budget,
    bandwidth: Bandwidth,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Tuned:
    """Tune one job to its end; the verdict is in the store."""
    problem = job.recipe.problem
    default = default_choice(problem, device)
    baseline = Choice(default.kernel.id, default.kernel.source_hash, default.config)
    subject = store.subject(job.recipe.facts(device))
    with Processes(job.recipe, budget=budget, bandwidth=bandwidth) as processes:
        result = tune(
            arms(kernels, problem, device, bandwidth),
            baseline,
            processes,
            store,
            subject,
            plan,
            progress,
        )
    conclude(store, subject, problem, device, result, plan.pairs)
    return Tuned(job, result)


def rows(tuned: Sequence[Tuned]) -> Iterator[dict[str, object]]:
    """A row a job: what won, how much faster, how surely."""
    for one in tuned:
        result, recipe = one.result, one.job.recipe
        sure = result.judgement
        yield {
            "layer": "/".join(one.job.layers),
            "n": recipe.n,
            "k": recipe.k,
            "format": one.job.format,
            "m": recipe.m,
            "default": result.baseline.kernel,
            "default_us": _us(result, result.baseline),
            "winner": result.winner.kernel,
            "winner_us": _us(result, result.winner),
            "config": " ".join(f"{k}={v}" for k, v in result.winner.config.items()),
            "speedup": None if sure is None else 1 / sure.ratio,
            "at_least": None if sure is None else 1 / sure.high,
            "verdict": "default kept" if sure is None else sure.verdict,
            "attempts": sum(result.counts.values()),
            "pruned": sum(result.pruned.values()),
            "failed": sum(count for status, count in result.counts.items() if status != "ok"),
        }


def _us(result: Result, choice: Choice) -> float | None:
    seconds = result.seconds.get(choice)
    return None if seconds is None else seconds * 1e6
