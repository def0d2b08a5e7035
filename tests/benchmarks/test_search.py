"""Search strategies on recorded spaces, beside Optuna's TPE and Kernel Tuner's own.

    pytest tests/benchmarks/test_search.py -s

Prints the fraction of the optimum after 50, 100 and 200 unique valid configs, failures counted:
the mean over seeds and spaces with the standard error over seeds. VQBENCH_SPACES names a folder of
Kernel Tuner caches (the tests' own where unset), VQBENCH_SEEDS how many seeds (20). What isn't
installed is left out with a word. Kernel Tuner runs in its simulation mode, with its defaults.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest

from autotune.replay import Recorded, load_cache, replay
from autotune.strategies import DEFAULT, strategies
from tests.autotune import recorded as spaces

FOLDER = Path(os.environ.get("VQBENCH_SPACES", spaces.FOLDER))
SEEDS = int(os.environ.get("VQBENCH_SEEDS", "20"))
BUDGETS = (50, 100, 200)
# Kernel Tuner's names. random_sample is left out: it is ours too.
OTHERS = ("pso", "genetic_algorithm", "greedy_ils", "diff_evo", "simulated_annealing", "mls")

Trace = Callable[[Path, int], np.ndarray]


def ours(name: str) -> Trace:
    def trace(path: Path, seed: int) -> np.ndarray:
        return replay(strategies()[name], space(path), seed=seed, budget=BUDGETS[-1])

    return trace


@functools.cache
def space(path: Path) -> Recorded:
    return load_cache(path)


def kernel_tuner(name: str, folder: Path) -> Trace:
    """One of Kernel Tuner's strategies; a run that gives up early starts again, as a user would."""

    def trace(path: Path, seed: int) -> np.ndarray:
        from constraint import FunctionConstraint
        from kernel_tuner import tune_kernel

        plain = unpacked(path, folder)
        whole = json.loads(plain.read_text())
        names, valid = whole["tune_params_keys"], whole["cache"]
        seen: dict[str, float] = {}
        for attempt in range(20):
            random.seed(1000 * seed + attempt)
            np.random.seed(1000 * seed + attempt)  # noqa: NPY002 - what Kernel Tuner draws from
            results, _ = tune_kernel(
                whole["kernel_name"], "", whole["problem_size"], [], whole["tune_params"],
                restrictions=[FunctionConstraint(lambda *v: ",".join(map(str, v)) in valid)],
                strategy=name, strategy_options={"max_fevals": BUDGETS[-1]},
                cache=str(plain), simulation_mode=True, lang="CUDA", quiet=True, verbose=False,
            )  # fmt: skip
            for result in results:
                key = ",".join(str(result[n]) for n in names)
                value = result["time"]
                seen.setdefault(key, value if isinstance(value, float) else math.inf)
            if len(seen) >= BUDGETS[-1]:
                break
        best = np.minimum.accumulate(list(seen.values()))[: BUDGETS[-1]]
        fractions = space(path).seconds.min() / 1e-3 / best
        return np.pad(fractions, (0, BUDGETS[-1] - len(fractions)), mode="edge")

    return trace


@functools.cache
def unpacked(path: Path, folder: Path) -> Path:
    """Kernel Tuner reads no .gz."""
    plain = folder / path.name.removesuffix(".gz")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    return plain


def contenders(folder: Path) -> dict[str, Trace]:
    found = {name: ours(name) for name in strategies() if name not in ("exhaustive", "surrogate")}
    if importlib.util.find_spec("optuna") is None:
        click.echo("optuna isn't installed: no tpe; pip install optuna")
        del found["tpe"]
    if importlib.util.find_spec("kernel_tuner") is None:
        click.echo("kernel_tuner isn't installed: none of its strategies; pip install kernel_tuner")
        return found
    return found | {f"Kernel Tuner {name}": kernel_tuner(name, folder) for name in OTHERS}


def test_search_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(FOLDER.glob("*.json.gz"))
    assert paths, f"{FOLDER} holds no caches"
    warnings.simplefilter("ignore")  # others' code
    means = {}
    with capsys.disabled():
        click.echo(f"\n{SEEDS} seeds; after {' / '.join(map(str, BUDGETS))} configs")
        click.echo("spaces: " + ", ".join(path.name.removesuffix(".json.gz") for path in paths))
        for name, trace in contenders(tmp_path).items():
            start = time.perf_counter()
            runs = np.array([[trace(path, seed) for seed in range(SEEDS)] for path in paths])
            at = runs[:, :, [budget - 1 for budget in BUDGETS]]  # [space, seed, budget]
            means[name] = at.mean(axis=(0, 1))
            error = at.mean(axis=0).std(axis=0, ddof=1) / math.sqrt(SEEDS)
            mean = " / ".join(f"{m:.3f}±{e:.3f}" for m, e in zip(means[name], error, strict=True))
            each = "  ".join("/".join(f"{v:.3f}" for v in one) for one in at.mean(axis=1))
            seconds = (time.perf_counter() - start) / at.shape[0] / SEEDS
            click.echo(f"{name:34s} {mean}  | {each}  {seconds:.1f} s a run")
    others = [mean for name, mean in means.items() if name == "tpe" or "Kernel Tuner" in name]
    if others:
        assert (means[DEFAULT] >= np.max(others, axis=0)).all()
