"""Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), as its authors ship it.

Optuna knows nothing of rules between parameters: a proposal that breaks one, or that is known, is
answered at once and costs nothing here. After many of these in a row a random candidate is asked
for instead, so that the search ends.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from autotune.candidates import Candidates
from autotune.strategies import Search, Strategy
from autotune.strategies._asked import Asked
from vqkernels.errors import BackendError

__all__ = ["STRATEGY", "search"]

_MISSES = 50


def search(candidates: Candidates, rng: np.random.Generator, *, batch: int = 1) -> Search:
    """Ask for what the estimator proposes. Raises BackendError where optuna isn't installed."""
    optuna = _optuna()
    asked = Asked(candidates, batch)
    sampler = optuna.samplers.TPESampler(seed=int(rng.integers(2**31)))
    study = optuna.create_study(sampler=sampler)
    while not asked.done:
        proposed: dict[int, Any] = {}
        while len(proposed) < min(batch, len(asked.left)):
            at, trial = _propose(study, asked, set(proposed), rng)
            proposed[at] = trial
        yield from asked.ask(proposed)
        for at, trial in proposed.items():
            _tell(study, trial, float(asked.seconds[at]))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise BackendError("tpe needs optuna; install vqbench[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _propose(
    study: Any, asked: Asked, taken: set[int], rng: np.random.Generator
) -> tuple[int, Any]:
    candidates = asked.candidates
    for _ in range(_MISSES):
        trial = study.ask()
        found = candidates.at_row(_row(trial, candidates))
        if found is not None and np.isnan(asked.seconds[found]) and found not in taken:
            return found, trial
        # Known: the same answer again. Broken rule: a failure, which the estimator leaves out.
        known = found is not None and found not in taken
        _tell(study, trial, float(asked.seconds[found]) if known else math.inf)
    left = [int(at) for at in asked.left if int(at) not in taken]
    at = int(rng.choice(left))
    names = [param.name for param in candidates.params]
    study.enqueue_trial(dict(zip(names, candidates.rows[at].tolist(), strict=True)))
    trial = study.ask()
    _row(trial, candidates)
    return at, trial


def _row(trial: Any, candidates: Candidates) -> np.ndarray[Any, np.dtype[np.int16]]:
    places = [
        trial.suggest_categorical(param.name, range(len(param.values)))
        for param in candidates.params
    ]
    return np.array(places, np.int16)


def _tell(study: Any, trial: Any, seconds: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if math.isfinite(seconds):
            study.tell(trial, seconds)
        else:
            study.tell(trial, state=_optuna().trial.TrialState.FAIL)


STRATEGY = Strategy(
    name="tpe", search=search, about="Optuna's tree-structured Parzen estimator (extra: tune)"
)
