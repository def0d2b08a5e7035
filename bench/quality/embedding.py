"""A sentence encoder before and after: its vectors, the order it puts texts in, and canaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.quality import metrics
from bench.quality.canaries import OWN as OWN_CANARIES
from bench.quality.canaries import CanaryResult, Nearer, load_canaries
from bench.quality.encoder import load_encoder
from bench.quality.sentences import OWN, SentenceSet, load_sentences
from vqkernels.tensor import QuantizedTensor

__all__ = ["ALL", "Agreement", "EmbeddingReport", "Search", "compare"]

ALL = "all"
"""The name of the row over all groups."""

_Vectors = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Search:
    """How well queries find what answers them, dense and quantised: 0 to 1."""

    mrr_dense: float
    mrr: float
    ndcg_dense: float
    ndcg: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The texts of a group (or of all), before and after.

    texts: how many, queries with them.
    cosine, cosine_min: of a text's two vectors: mean, and the worst, which is `worst`'s.
    spearman, kendall, overlap: of the similarities of a text to all sentences but itself, dense
        and quantised: rank correlations, and the share of the nearest that stay; means over texts.
    search: of the group's queries; None where it has none.
    """

    group: str
    texts: int
    cosine: float
    cosine_min: float
    worst: str
    spearman: float
    kendall: float
    overlap: float
    search: Search | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, flat."""
        fields = {name: value for name, value in vars(self).items() if name != "search"}
        search = dataclasses.asdict(self.search) if self.search else {}
        return {**fields, **{field.name: search.get(field.name) for field in _SEARCH}}


_SEARCH = dataclasses.fields(Search)


@dataclasses.dataclass(frozen=True)
class EmbeddingReport:
    """What became of a sentence encoder.

    model: the folder's name.
    weights: how many of its matrices are quantised here.
    nearest: of how many nearest sentences `overlap` is the share.
    groups: each group, and last all of them (`ALL`).
    """

    model: str
    weights: int
    nearest: int
    groups: tuple[Agreement, ...]
    canaries: tuple[CanaryResult, ...]

    @property
    def all(self) -> Agreement:
        """Over all groups."""
        return self.groups[-1]

    def rows(self) -> list[dict[str, Any]]:
        """A row a group, the last over all."""
        return [group.to_dict() for group in self.groups]

    def canary_rows(self) -> list[dict[str, Any]]:
        """A row a canary."""
        return [canary.to_dict() for canary in self.canaries]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "weights": self.weights,
            "nearest": self.nearest,
            "groups": self.rows(),
            "canaries": self.canary_rows(),
        }


def compare(
    model_folder: Path,
    quantised: Mapping[str, QuantizedTensor],
    *,
    sentences: Path = OWN,
    canaries: Path = OWN_CANARIES,
    batch: int = 16,
    nearest: int = 5,
    kernels: bool = False,
) -> EmbeddingReport:
    """Embed the sentences with the dense model and with `quantised` in it, on the CPU in float32.

    model_folder: a dense encoder's, whose tensors `quantised` names.
    sentences, canaries: TOML files; the package's own unasked.
    batch: texts embedded at once.
    kernels: run the quantised layers by our kernels, not by their exact decode.

    Changes no file. Raises BackendError without transformers, ConfigError for the TOML files,
    ContainerError or UnsupportedError for the folder, TensorError for tensors that aren't its.
    """
    texts, checks = load_sentences(sentences), load_canaries(canaries).nearer
    encoder = load_encoder(model_folder)
    everything = _texts(texts, checks)
    tokens = encoder.tokens(everything)
    dense = encoder.embed(tokens, batch=batch)
    places = encoder.model.put(quantised, kernels=kernels)
    after = encoder.embed(tokens, batch=batch)
    count = len(texts.texts)
    where = {text: at for at, text in enumerate(everything[count:], count)}
    return EmbeddingReport(
        model=model_folder.resolve().name,
        weights=len(places),
        nearest=nearest,
        groups=_agreements(texts, dense[:count], after[:count], nearest),
        canaries=tuple(
            CanaryResult(
                one.name, "nearer", one.margin, *(_margin(v, one, where) for v in (dense, after))
            )
            for one in checks
        ),
    )


def _texts(texts: SentenceSet, checks: Sequence[Nearer]) -> list[str]:
    """Sentences, queries, and what canaries speak of, once each."""
    spoken = dict.fromkeys(text for one in checks for text in (one.text, one.near, one.far))
    return [*(one.text for one in texts.texts), *spoken]


def _margin(vectors: _Vectors, check: Nearer, where: Mapping[str, int]) -> float:
    text, near, far = (vectors[where[one]] for one in (check.text, check.near, check.far))
    return float(text @ near - text @ far)


# ------------------------------------------------------------------------------------------------
# agreement of two sets of vectors


def _agreements(
    texts: SentenceSet, dense: _Vectors, after: _Vectors, nearest: int
) -> tuple[Agreement, ...]:
    """Of each group and of all; `dense, after: [sentences + queries, size]`."""
    names = [one.id for one in texts.sentences] + [one.text for one in texts.queries]
    of = np.array([one.group for one in texts.texts])
    cosines = np.clip((dense * after).sum(axis=1), -1, 1)
    count = len(texts.sentences)
    near = dense @ dense[:count].T, after @ after[:count].T
    ranks = _ranks(*near, nearest)
    found = []
    for group in (*texts.groups, ALL):
        inside = np.flatnonzero((of == group) | (group == ALL))
        worst = inside[cosines[inside].argmin()]
        spearman, kendall, overlap = ranks[inside].mean(axis=0).tolist()
        found.append(
            Agreement(
                group=group,
                texts=len(inside),
                cosine=float(cosines[inside].mean()),
                cosine_min=float(cosines[worst]),
                worst=names[worst],
                spearman=spearman,
                kendall=kendall,
                overlap=overlap,
                search=_search(texts, inside, *near),
            )
        )
    return tuple(found)


def _ranks(dense: _Vectors, after: _Vectors, nearest: int) -> _Vectors:
    """Spearman, Kendall and overlap for each text: `[texts, 3]` of `[texts, sentences]`."""
    rows = []
    for at, (one, other) in enumerate(zip(dense, after, strict=True)):
        if at < len(one):  # a sentence's similarity to itself says nothing
            one, other = np.delete(one, at), np.delete(other, at)
        overlap = metrics.top_overlap(one, other, nearest)
        rows.append((metrics.spearman(one, other), metrics.kendall(one, other), overlap))
    return np.array(rows)


def _search(
    texts: SentenceSet, inside: NDArray[np.intp], dense: _Vectors, after: _Vectors
) -> Search | None:
    """MRR and NDCG of the queries among the texts `inside`."""
    first = len(texts.sentences)
    asked = inside[inside >= first]
    if not len(asked):
        return None
    relevance = texts.relevance[asked - first]
    return Search(
        mrr_dense=metrics.mrr(relevance, dense[asked]),
        mrr=metrics.mrr(relevance, after[asked]),
        ndcg_dense=metrics.ndcg(relevance, dense[asked]),
        ndcg=metrics.ndcg(relevance, after[asked]),
    )
