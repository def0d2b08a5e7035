"""The model end to end, dense and quantised: what was asked for, as sections of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.quality import canaries, embedding, evaluate, perplexity, sentences
from bench.quality.embedding import EmbeddingReport
from bench.quality.original import Original
from bench.quality.perplexity import PerplexityReport
from vqkernels.errors import ContainerError
from vqkernels.formats.checkpoint import CONFIG
from vqkernels.tensor import QuantizedTensor

__all__ = ["EndToEnd", "Section", "folder_of", "sections"]

Section = Mapping[str, Any]
"""`report`: all of it; `rows`: of its table; `canaries`: rows of these, where it has some."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """What to run.

    encoder: a sentence encoder's vectors of `sentences`. text: for a language model's perplexity.
    evaluators: functions and commands; directions: which way their figures improve, as `+name`.
    sentences, canaries: TOML files.
    """

    encoder: bool = False
    text: Path | None = None
    evaluators: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    sentences: Path = sentences.OWN
    canaries: Path = canaries.OWN

    def __bool__(self) -> bool:
        return self.encoder or self.text is not None or bool(self.evaluators)


def folder_of(original: Original) -> Path:
    """The folder of a dense model; ContainerError where its tensors lie in none."""
    path = original.path if original.path.is_dir() else original.path.parent
    if not (path / CONFIG).is_file():
        raise ContainerError(
            f"{original.path}: there is no {CONFIG} beside it, so it can't be run end to end; give "
            f"the model's folder"
        )
    return path


def sections(
    asked: EndToEnd, folder: Path, quantised: Mapping[str, QuantizedTensor]
) -> dict[str, Section]:
    """The sections of one quantised model; `folder`: the dense one's. Raises VqError as they do."""
    found: dict[str, Section] = {}
    if asked.encoder:
        report = embedding.compare(
            folder, quantised, sentences=asked.sentences, canaries=asked.canaries
        )
        found["embedding"] = _section(report)
    if asked.text is not None:
        told = perplexity.compare(folder, quantised, asked.text, canaries=asked.canaries)
        found["perplexity"] = _section(told)
    if asked.evaluators:
        rows = [
            row.to_dict()
            for one in asked.evaluators
            for row in evaluate.run(one, folder, quantised, directions=asked.directions)
        ]
        found["evaluators"] = {"report": {"figures": rows}, "rows": rows}
    return found


def _section(report: EmbeddingReport | PerplexityReport) -> Section:
    return {
        "report": report.to_dict(),
        "rows": report.rows(),
        "canaries": report.canary_rows(),
    }
