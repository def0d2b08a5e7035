"""Anybody's measure of a model, before and after: a function of the model, or a command.

A function is named `package.module:function`. What it gets, it says by its parameters' names:
`model` (the torch module, in evaluation mode), `tokenizer`, `folder` (a path). A command holds
`{model}` where the folder goes. A function returns, and a command prints as its last line, its
figures by name: `{"accuracy": 0.91}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from bench.available import first_line
from bench.quality.copies import decoded_folder
from bench.quality.loading import architecture, dense_config, load_model, load_tokenizer
from vqkernels.errors import VqError
from vqkernels.tensor import QuantizedTensor

__all__ = ["EvaluatorError", "MetricRow", "better", "run"]

Better = Literal["higher", "lower"]
Figures = dict[str, float]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_PLACE = "{model}"
_GIVEN = ("model", "tokenizer", "folder")

# Words of a figure's name that say which way is better: of `eval/rouge2`, `rouge`.
_HIGHER = re.compile(
    r"acc|accuracy|auc|auroc|bleu|chrf|cosine|em|exact|f|hits|kendall|map|match|mcc|meteor|mrr|ndcg"
    r"|pass|pearson|precision|recall|rouge|rougel|rougelsum|spearman|win"
)
_LOWER = re.compile(
    r"bpb|bpc|cer|entropy|error|errors|kl|loss|mae|mse|nll|perplexity|ppl|rmse|ter|wer"
)


class EvaluatorError(VqError):
    """An evaluator that can't be run, fails, or gives no figures."""


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """A figure, dense and quantised; `better`: which way it improves, None where nobody said."""

    evaluator: str
    metric: str
    better: Better | None
    dense: float
    quantised: float

    @property
    def change(self) -> float:
        """Quantised minus dense."""
        return self.quantised - self.dense

    @property
    def worse(self) -> bool | None:
        """Whether the quantised model's is worse; None where it isn't known which way that is."""
        if self.better is None:
            return None
        return self.change < 0 if self.better == "higher" else self.change > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "change": self.change, "worse": self.worse}


def run(
    evaluator: str,
    model_folder: Path,
    quantised: Mapping[str, QuantizedTensor],
    *,
    directions: Sequence[str] = (),
    timeout_s: float = 3600.0,
) -> list[MetricRow]:
    """What `evaluator` says of the dense model, and of the same one with `quantised` in it.

    evaluator: `package.module:function`, looked for in the working directory too, or a command.
    model_folder: a dense model's, whose tensors `quantised` names. Commands, and functions of a
        `folder`, see it as it is, and then a temporary copy with the decoded weights.
    directions: `+name` for a figure of which more is better, `-name` for one of which less is; the
        usual names (accuracy, perplexity, ...) are known.
    timeout_s: of a command, each time.

    Raises EvaluatorError for whatever an evaluator does wrong, and what loading or decoding the
    model raises.
    """
    dense_config(model_folder)
    known = dict(_direction(text) for text in directions)
    if _FUNCTION.fullmatch(evaluator):
        with _working_directory():
            dense, after = _called(evaluator, model_folder, quantised)
    else:
        words = _words(evaluator)
        dense = _command(evaluator, words, model_folder, timeout_s)
        with decoded_folder(model_folder, quantised) as copy:
            after = _command(evaluator, words, copy, timeout_s)
    if unlike := sorted(set(dense) ^ set(after)):
        raise EvaluatorError(
            f"evaluator {evaluator!r}: gives {unlike[0]!r} for one of the two models only; "
            f"let it give the same figures for both"
        )
    if unknown := sorted(set(known) - set(dense)):
        raise EvaluatorError(
            f"evaluator {evaluator!r}: gives no {unknown[0]!r}, only {', '.join(dense)}; "
            f"correct the direction's name"
        )
    return [
        MetricRow(evaluator, name, known.get(name, better(name)), dense[name], after[name])
        for name in dense
    ]


def better(name: str) -> Better | None:
    """Which way the figure of this name improves, by its words; None where they don't say."""
    words = [word.rstrip("0123456789") for word in re.split(r"[\W_]+", name.lower())]
    higher, lower = (any(map(kind.fullmatch, words)) for kind in (_HIGHER, _LOWER))
    if higher == lower:
        return None
    return "higher" if higher else "lower"


def _direction(text: str) -> tuple[str, Better]:
    if len(text) < 2 or text[0] not in "+-":
        raise EvaluatorError(
            f"direction {text!r}: write +name where more is better, -name where less is"
        )
    return text[1:], "higher" if text[0] == "+" else "lower"


# ------------------------------------------------------------------------------------------------
# functions


def _called(
    evaluator: str, folder: Path, quantised: Mapping[str, QuantizedTensor]
) -> tuple[Figures, Figures]:
    function, wanted = _function(evaluator)
    dense = _call(evaluator, function, _arguments(folder, wanted, None, folder))
    with contextlib.ExitStack() as stack:
        place = folder
        if "folder" in wanted:
            place = stack.enter_context(decoded_folder(folder, quantised))
        after = _call(evaluator, function, _arguments(folder, wanted, quantised, place))
    return dense, after


def _function(evaluator: str) -> tuple[Callable[..., Any], list[str]]:
    """The function, and the names of what it wants."""
    module, _, path = evaluator.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for name in path.split("."):
            function = getattr(function, name)
        parameters = inspect.signature(function).parameters.values()
    except Exception as error:  # the user's code: anything may happen in its import
        raise EvaluatorError(
            f"evaluator {evaluator!r}: can't be imported ({first_line(error)}); name a function "
            f"as package.module:function"
        ) from error
    wanted = [one.name for one in parameters if one.name in _GIVEN]
    other = [one.name for one in parameters if one.name not in _GIVEN and one.default is one.empty]
    if not wanted or other:
        raise EvaluatorError(
            f"evaluator {evaluator!r}: takes {', '.join([*wanted, *other]) or 'nothing'}; its "
            f"parameters have to be of {', '.join(_GIVEN)}, or have defaults"
        )
    return function, wanted


def _arguments(
    folder: Path, wanted: Sequence[str], quantised: Mapping[str, QuantizedTensor] | None, copy: Path
) -> dict[str, Any]:
    """What the function wants, made anew each time: it may change what it gets."""
    given: dict[str, Any] = {}
    if "model" in wanted:
        model = load_model(folder, architecture(folder))
        if quantised is not None:
            model.put(quantised)
        given["model"] = model.module
    if "tokenizer" in wanted:
        given["tokenizer"] = load_tokenizer(folder)
    if "folder" in wanted:
        given["folder"] = copy
    return given


def _call(evaluator: str, function: Callable[..., Any], given: Mapping[str, Any]) -> Figures:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)  # what it draws at random is the same for both models
            found = function(**given)
    except VqError:
        raise
    except Exception as error:  # the user's code
        raise EvaluatorError(f"evaluator {evaluator!r}: fails ({first_line(error)})") from error
    return _figures(evaluator, found)


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Let modules of the working directory be imported, as `python -m` does."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")


# ------------------------------------------------------------------------------------------------
# commands


def _words(evaluator: str) -> list[str]:
    try:
        words = shlex.split(evaluator)
    except ValueError as error:
        raise EvaluatorError(f"evaluator {evaluator!r}: {error}; correct the quotes") from error
    if not any(_PLACE in word for word in words):
        raise EvaluatorError(
            f"evaluator {evaluator!r}: is no package.module:function, and as a command it lacks "
            f"{_PLACE}, where the model's folder goes"
        )
    return words


def _command(evaluator: str, words: Sequence[str], folder: Path, timeout_s: float) -> Figures:
    """What the command prints of the model in `folder`."""
    line = [word.replace(_PLACE, str(folder)) for word in words]
    code, out, err = _output(evaluator, line, timeout_s)
    if code:
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise EvaluatorError(f"evaluator {evaluator!r}: ends with status {code} ({last})")
    last = (out.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(last)
    except ValueError as error:
        raise EvaluatorError(
            f'evaluator {evaluator!r}: its last line is no JSON: {last[:80]!r}; print {{"name": 1}}'
        ) from error
    return _figures(evaluator, found)


def _output(evaluator: str, line: Sequence[str], timeout_s: float) -> tuple[int, str, str]:
    """Status, output and messages of a command, which ends here whatever happens."""
    try:
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that its children can be ended with it
        )
    except OSError as error:
        raise EvaluatorError(
            f"evaluator {evaluator!r}: {line[0]} can't be started ({error.strerror}); "
            f"correct the command"
        ) from error
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise EvaluatorError(
                f"evaluator {evaluator!r}: has not ended after {timeout_s:g} s; "
                f"give it more time, or less to do"
            ) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------
# figures


def _figures(evaluator: str, found: object) -> Figures:
    if not isinstance(found, Mapping) or not found:
        raise EvaluatorError(
            f"evaluator {evaluator!r}: gives {_short(found)}; let it give figures by name, "
            f'as {{"accuracy": 0.91}}'
        )
    return {str(name): _figure(evaluator, str(name), value) for name, value in found.items()}


def _figure(evaluator: str, name: str, value: Any) -> float:
    # numbers of numpy and torch, too
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise EvaluatorError(
            f"evaluator {evaluator!r}: its {name!r} is {_short(value)}, no finite number"
        )
    return number


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
