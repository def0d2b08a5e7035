"""A set of sentences to embed, queries, and which sentence answers which: data in a TOML file.

[sentences.plain]                  # a group, and its sentences by id
kettle = "The kettle switches itself off when the water boils."

[[query]]
group = "plain"
text = "When does the kettle stop?"
answers = { kettle = 2 }           # relevance, above 0; what isn't named is irrelevant
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqkernels.errors import ConfigError

__all__ = ["OWN", "Query", "Sentence", "SentenceSet", "load_sentences", "read_toml"]

OWN = Path(__file__).parent / "sentences.toml"
"""The set that comes with this package."""


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A text, and the group that figures are given for."""

    id: str
    group: str
    text: str


@dataclasses.dataclass(frozen=True)
class Query:
    """A text that looks for others, and the relevance of each sentence that answers it, by id."""

    group: str
    text: str
    answers: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class SentenceSet:
    """Sentences and queries in the file's order."""

    sentences: tuple[Sentence, ...]
    queries: tuple[Query, ...]

    @property
    def texts(self) -> tuple[Sentence | Query, ...]:
        """Sentences, then queries."""
        return (*self.sentences, *self.queries)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups, in order."""
        return tuple(dict.fromkeys(sentence.group for sentence in self.sentences))

    @property
    def relevance(self) -> NDArray[np.float64]:
        """Of each sentence for each query: `[queries, sentences]`."""
        rows = [
            [float(query.answers.get(one.id, 0)) for one in self.sentences]
            for query in self.queries
        ]
        return np.array(rows, dtype=np.float64).reshape(len(self.queries), len(self.sentences))


def load_sentences(path: Path = OWN) -> SentenceSet:
    """The set in a TOML file. Raises ConfigError, which names file and entry, where it is none."""
    table = read_toml(path, "sentences")
    try:
        _known(table, {"sentences", "query"}, "the file")
        found = _sentences(table.get("sentences", {}))
        ids = {sentence.id: sentence for sentence in found}
        if len(ids) < 3 or len(ids) != len(found):
            twice = next((one.id for one in found if ids[one.id] is not one), None)
            raise ValueError(
                f"two sentences have the id {twice!r}" if twice else "fewer than 3 sentences"
            )
        queries = tuple(_query(one, ids, at) for at, one in enumerate(table.get("query", ()), 1))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"sentences {path}: {error}; see {OWN.name} of this package") from error
    return SentenceSet(found, queries)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError where it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {path}: {error}; give a TOML file") from error


def _sentences(groups: Mapping[str, Mapping[str, Any]]) -> tuple[Sentence, ...]:
    return tuple(
        Sentence(name, group, _text(text, f"sentence {name!r}"))
        for group, texts in groups.items()
        for name, text in texts.items()
    )


def _query(table: Mapping[str, Any], ids: Mapping[str, Sentence], number: int) -> Query:
    where = f"query {number}"
    _known(table, {"group", "text", "answers"}, where)
    answers = table.get("answers")
    if not isinstance(answers, dict) or not answers:
        raise ValueError(f"{where} has no answers")
    for name, gain in answers.items():
        if name not in ids:
            raise ValueError(f"{where} is answered by {name!r}, which is no sentence")
        if isinstance(gain, bool) or not isinstance(gain, int | float) or not 0 < gain < 1e9:
            raise ValueError(f"{where}: the relevance of {name!r} is no number above 0")
    group = table.get("group")
    if group not in {sentence.group for sentence in ids.values()}:
        raise ValueError(f"{where} is of the group {group!r}, which has no sentences")
    return Query(group, _text(table.get("text"), where), answers)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} has no text")
    return value


def _known(table: Mapping[str, Any], names: set[str], where: str) -> None:
    if unknown := sorted(set(table) - names):
        raise ValueError(f"{where} has {unknown[0]!r}, not one of {', '.join(sorted(names))}")
