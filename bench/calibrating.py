"""A local model of the Hugging Face kind, run over lines of text to calibrate its layers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.weights import weights_file
from bench.workload import load_workload
from vqkernels.errors import BackendError, ContainerError

__all__ = ["BUILT_IN", "Texts", "batches", "load_model", "model_folder", "read_texts"]

MINILM = "minilm"
BUILT_IN = "calibration_texts.toml"
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
    """The folder of the model at the path `name`, or in the package that `minilm` stands for.

    Raises ContainerError for what is no model's folder, BackendError where the package is missing.
    """
    packaged = weights_file(load_workload(MINILM)) if name == MINILM else None
    folder = packaged.parent if packaged else Path(name)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "there is no such folder"
        raise ContainerError(f"{folder}: {problem}; give a model's folder, or {MINILM!r}")
    if not (folder / "config.json").is_file():
        raise ContainerError(f"{folder}: holds no config.json; give a Hugging Face model's folder")
    if not any(folder.glob("*.safetensors")):
        raise ContainerError(
            f"{folder}: holds no .safetensors file; vqbench never loads pickles, which can run "
            f"code: convert the weights to safetensors"
        )
    return folder


def load_model(folder: Path) -> tuple[nn.Module, Any]:
    """The model in `folder` and its tokeniser, in float32 on the CPU, as their own class.

    So its modules have the names that the file's tensors have. Nothing is downloaded, and no code
    of the folder is run. Raises BackendError where transformers is missing, and ContainerError for
    a folder that it can't load, or that lacks some of the weights.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise BackendError(
            f"{folder}: needs transformers to be run ({error}); run: pip install transformers"
        ) from error
    local = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(transformers), _explained(folder):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        name = (config.get("architectures") or ["AutoModel"])[0]
        kind = getattr(transformers, name, transformers.AutoModel)
        model, found = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    if missing := sorted(found["missing_keys"]):
        raise ContainerError(
            f"{folder}: lacks {missing[0]!r} and {len(missing) - 1} more weights of {name}, which "
            f"would be random; complete the folder"
        )
    return model, tokenizer


def batches(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """`texts` as the model takes them: BATCH lines each, padded, with an attention mask.

    Lines are cut to as many tokens as the model takes, 512 at most. A line that gives no token is
    left out.
    """
    config: Any = model.config
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length, LENGTH)
    length = min(limit for limit in limits if limit)
    if tokenizer.pad_token is None:
        # padding counts in no moment, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # on the right: there it leaves the positions of the other tokens alone
    tokenizer.padding_side = "right"
    found = []
    for first in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[first : first + BATCH]),
            truncation=True,
            max_length=length,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        found.append(batch)
    return found


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What transformers raises for a folder that it can't load, as a ContainerError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ContainerError(
            f"{folder}: transformers can't load it ({reason}); check the folder"
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' own bars and reports, which would run through ours."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
