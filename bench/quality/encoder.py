"""A sentence encoder: texts to vectors, as the files in its folder say (sentence-transformers').

The model reads up to `max_seq_length` tokens of a text, their vectors are pooled into one, and that
is brought to length 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.quality.loading import (
    LoadedModel,
    dense_config,
    load_model,
    load_tokenizer,
    max_positions,
)
from vqkernels.errors import ContainerError, TensorError, UnsupportedError
from vqkernels.formats.tensor_files import read_json

__all__ = ["Encoder", "load_encoder"]

_MODULES = "modules.json"
_SETTINGS = "sentence_bert_config.json"

_MOST_TOKENS = 512  # where neither model nor tokenizer says
_NO_LIMIT = 10**9  # a tokenizer that knows none says 10^30

_POOLING = ("mean", "cls", "max", "lasttoken")  # by sentence-transformers' names


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model, its tokenizer, and how the vectors of a text's tokens become one.

    pooling: `mean` or `max` over the text's tokens, or the first (`cls`) or the last (`lasttoken`).
    max_tokens: what is longer is cut there.
    lower: whether texts are put into lower case first.
    """

    model: LoadedModel
    tokenizer: Any
    pooling: str
    max_tokens: int
    lower: bool

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, cut to `max_tokens`.

        Raises ContainerError where the model doesn't know one, or a text has none.
        """
        given = [text.lower() if self.lower else text for text in texts]
        ids = self.tokenizer(given, truncation=True, max_length=self.max_tokens)["input_ids"]
        if empty := [text for text, found in zip(texts, ids, strict=True) if not found]:
            raise ContainerError(
                f"{self.model.folder}: its tokenizer gives nothing for {empty[0][:40]!r}; "
                f"leave that text out"
            )
        self.model.check_vocabulary(max(map(max, ids)))
        return [list(map(int, one)) for one in ids]

    def embed(self, tokens: Sequence[Sequence[int]], *, batch: int) -> NDArray[np.float64]:
        """Vectors of length 1 for texts as token ids: `[texts, size]`.

        Texts of like length go together, `batch` at a time. Raises TensorError where the model
        gives NaN, infinity or a vector of zeros.
        """
        order = sorted(range(len(tokens)), key=lambda at: len(tokens[at]))
        pieces = [order[at : at + batch] for at in range(0, len(order), batch)]
        found = torch.cat([self._forward([tokens[at] for at in piece]) for piece in pieces])
        sizes = found.norm(dim=1, keepdim=True)
        if not bool((torch.isfinite(sizes) & (sizes > 0)).all()):
            raise TensorError(
                f"{self.model.folder}: the model gives NaN, infinity or zeros for a sentence; "
                f"check its weights, dense and quantised"
            )
        vectors = np.empty(found.shape, dtype=np.float64)
        vectors[order] = (found / sizes).numpy()
        return vectors

    def _forward(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        hidden = self.model.run(input_ids=ids, attention_mask=mask).last_hidden_state
        return _pooled(hidden.double(), mask, self.pooling)


def load_encoder(folder: Path) -> Encoder:
    """The sentence encoder in `folder`: mean pooling where no file says otherwise.

    Raises BackendError without transformers, ContainerError for a folder without a model,
    UnsupportedError for modules or a pooling that are not known here.
    """
    config = dense_config(folder)
    pooling = _pooling(folder)
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    tokenizer = load_tokenizer(folder)
    limits = [settings.get("max_seq_length"), tokenizer.model_max_length, max_positions(config)]
    known = [one for one in limits if isinstance(one, int) and 0 < one < _NO_LIMIT]
    limit = min(known, default=_MOST_TOKENS)
    model = load_model(folder, "AutoModel")
    return Encoder(model, tokenizer, pooling, limit, settings.get("do_lower_case") is True)


def _pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """`hidden: [texts, tokens, size]`, filled up at the end, to `[texts, size]`."""
    inside = mask[..., None].bool()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "lasttoken":
        return hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]
    if pooling == "max":
        return hidden.masked_fill(~inside, -torch.inf).amax(dim=1)
    return hidden.masked_fill(~inside, 0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _pooling(folder: Path) -> str:
    """How the folder's modules pool."""
    path = folder / "1_Pooling"
    if (folder / _MODULES).is_file():
        modules = {one.get("type", ""): str(one.get("path", "")) for one in _modules(folder)}
        names = {name.rpartition(".")[2]: place for name, place in modules.items()}
        if other := sorted(set(names) - {"Transformer", "Pooling", "Normalize"}):
            raise UnsupportedError(
                f"{folder / _MODULES}: module {other[0]!r} is not known here; use an encoder of "
                f"a transformer, pooling and normalisation, or an evaluator of your own"
            )
        path = folder / Path(names.get("Pooling", path.name)).name
    if not path.is_dir():
        return "mean"
    return _pooling_mode(read_json(path / "config.json"), path)


def _pooling_mode(config: Mapping[str, Any], path: Path) -> str:
    # one name since sentence-transformers 6, before that a switch for each
    mode = config.get("pooling_mode")
    if mode is None:
        switches = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
        named = {f"pooling_mode_{switches.get(one, one)}": one for one in _POOLING}
        on = [name for name in config if name.startswith("pooling_mode_") and config[name] is True]
        mode = named.get(on[0], on[0]) if len(on) == 1 else " and ".join(on)
    if mode not in _POOLING:
        raise UnsupportedError(
            f"{path / 'config.json'}: pools by {mode or 'nothing'}; "
            f"one of {', '.join(_POOLING)} is known here"
        )
    return str(mode)


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / _MODULES
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContainerError(f"{path}: {error}; copy or download it again") from error
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ContainerError(f"{path}: is no list of modules; copy or download it again")
    return modules
