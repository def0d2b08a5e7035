"""A local model of the Hugging Face kind, run over lines of text to calibrate its layers."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.available import first_line
from bench.quality.loading import architecture, load_model, load_tokenizer, max_positions
from bench.weights import model_path
from vqkernels.errors import BackendError, ContainerError, TensorError

__all__ = [
    "BUILT_IN",
    "Batch",
    "Texts",
    "batches",
    "load",
    "model_folder",
    "read_texts",
    "run",
]

Batch = dict[str, Tensor]

BUILT_IN = "calibration_texts.toml"
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
# Lines that run together: enough to fill two cores, few enough for 512 tokens of a large model.
BATCH = 16
# Tokens of a line, if neither the model nor its tokeniser takes fewer.
LENGTH = 512


class Texts(list[str]):
    """Lines of text, and where they come from."""

    def __init__(self, lines: Sequence[str], name: str) -> None:
        super().__init__(lines)
        self.name = name

    @property
    def sha256(self) -> str:
        """SHA-256 of the lines."""
        return hashlib.sha256("\n".join(self).encode()).hexdigest()


def read_texts(path: Path | None) -> Texts:
    """The lines of a UTF-8 file that hold more than space; those built in where `path` is None.

    Raises ContainerError for a file that can't be read or has none.
    """
    if path is None:
        content = tomllib.loads((files("bench") / BUILT_IN).read_text("utf-8"))
        return Texts(content["texts"], "built-in")
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ContainerError(f"{path}: can't be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ContainerError(f"{path}: is no UTF-8 text; convert it, or give another") from error
    if not (full := [line for line in lines if line.strip()]):
        raise ContainerError(f"{path}: holds no text; give one with a sample on each line")
    return Texts(full, path.name)


def model_folder(name: str) -> Path:
    """The folder of the model at the path `name`, or of the workload of that name, as `minilm`.

    Raises ContainerError for what is no model's folder, BackendError where the package is missing.
    """
    path = model_path(name)
    folder = path if path == Path(name) else path.parent
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "there is no such folder"
        raise ContainerError(f"{folder}: {problem}; give a model's folder, or 'minilm'")
    if not (folder / "config.json").is_file():
        raise ContainerError(f"{folder}: holds no config.json; give a Hugging Face model's folder")
    if not any(folder.glob("*.safetensors")):
        raise ContainerError(
            f"{folder}: holds no .safetensors file; vqbench never loads pickles, which can run "
            f"code: convert the weights to safetensors"
        )
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # without one, transformers makes a tokeniser that knows no word
        raise ContainerError(
            f"{folder}: holds no tokeniser ({', '.join(VOCABULARIES)}); add the model's own"
        )
    return folder


def load(folder: Path, device: str = "cpu") -> tuple[nn.Module, Any]:
    """The model in `folder` and its tokeniser, in float32 on `device`, as the class it names.

    So its modules have the names that the file's tensors have. Raises BackendError where
    transformers or the device is missing, ContainerError for a folder that it can't load, and
    UnsupportedError for a model that is quantised already.
    """
    place = _device(device)
    model = load_model(folder, architecture(folder)).module
    config: Any = model.config
    config.use_cache = False  # keys and values that no later token asks for
    return model.to(place), load_tokenizer(folder)


def batches(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Iterator[Batch]:
    """`texts` as the model takes them: BATCH lines each, padded, with an attention mask.

    Lines are cut to as many tokens as the model takes, 512 at most.
    """
    config: Any = model.config
    limits = (max_positions(config.to_dict()), tokenizer.model_max_length, LENGTH)
    length = min(limit for limit in limits if limit)
    if tokenizer.pad_token is None:
        # padding counts in no moment, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # on the right: there it leaves the positions of the other tokens alone
    tokenizer.padding_side = "right"
    for first in range(0, len(texts), BATCH):
        batch: Batch = tokenizer(
            list(texts[first : first + BATCH]),
            truncation=True,
            max_length=length,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        if batch["input_ids"].numel():
            # no more than these: some tokenisers give what their model doesn't take
            yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def run(model: nn.Module, batch: Batch) -> object:
    """The model's output. Raises TensorError for a model that needs more than text."""
    try:
        return model(**batch)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise TensorError(
            f"its model can't be run over text ({first_line(error)}); give an encoder or a causal "
            f"language model"
        ) from error


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"device {name!r}: torch can't use it ({first_line(error)}); use cpu"
        ) from error
