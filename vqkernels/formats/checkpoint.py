"""A quantised checkpoint's folder as transformers writes it: config.json and safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from vqkernels.errors import ContainerError
from vqkernels.formats.tensor_files import AGAIN, TensorFiles, read_json
from vqkernels.source import Outline, TensorSource

__all__ = ["CONFIG", "Checkpoint", "CheckpointSource", "shortened"]

CONFIG = "config.json"


class Checkpoint(TensorFiles):
    """A folder with config.json and safetensors files, its headers checked, its tensors by key.

    folder: where it lies.
    config: config.json.
    quantization: its quantization_config (that of text_config where a model has several parts).

    Raises ContainerError, one line, naming the folder or file, what is wrong and the fix.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ContainerError(
                f"{self.folder}: is not a folder; give a checkpoint's folder (with {CONFIG})"
            )
        self.config = read_json(self.folder / CONFIG)
        self.quantization = _quantization(self.config, self.folder / CONFIG)
        super().__init__(self.folder)

    @property
    def method(self) -> str:
        """The quant_method of its config, in lower case."""
        method = self.quantization.get("quant_method")
        if not isinstance(method, str):
            raise ContainerError(
                f"{self.folder / CONFIG}: quantization_config names no quant_method; add it "
                f'("vptq" or "aqlm")'
            )
        return method.lower()


class CheckpointSource(TensorSource):
    """The quantised modules of a checkpoint, by module name; its kinds read them.

    checkpoint: what they are read from.
    refused: modules that were passed over, and why.

    `_outlines` has what headers say of each module, and `_keys` each module's tensors, those of
    dense modules too if need be. Raises ContainerError for a checkpoint of another method.
    """

    def __init__(self, checkpoint: Checkpoint, method: str) -> None:
        if checkpoint.method != method:
            raise ContainerError(
                f"{checkpoint.folder / CONFIG}: quant_method is {checkpoint.method!r}, not "
                f"{method!r}; open it as what it is"
            )
        self.checkpoint = checkpoint
        self.refused: dict[str, str] = {}
        self._outlines: dict[str, Outline] = {}
        self._keys: Mapping[str, Set[str]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._outlines)

    def __len__(self) -> int:
        return len(self._outlines)

    def outline(self, name: str) -> Outline:
        """What is known of matrix `name`, from the headers. Raises KeyError as a lookup."""
        return self._outlines[name]

    def dense_keys(self) -> list[str]:
        """The tensors of the checkpoint that belong to no quantised module."""
        modules = [*self._outlines, *self.refused]
        quantised = {key for name in modules for key in self._keys.get(name, ())}
        return [key for key in self.checkpoint.keys() if key not in quantised]  # noqa: SIM118


def shortened(value: object) -> str:
    """A value of a config as a message shows it."""
    # of a list, only that it is one: it may be nested too deep to print
    plain = isinstance(value, str | int | float) or value is None
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _quantization(config: dict[str, Any], path: Path) -> dict[str, Any]:
    text = config.get("text_config")
    places = [config, text] if isinstance(text, dict) else [config]
    found = next((p["quantization_config"] for p in places if "quantization_config" in p), None)
    if found is None:
        raise ContainerError(
            f"{path}: has no quantization_config, so its weights are not quantised; "
            f"give a VPTQ or AQLM checkpoint"
        )
    if not isinstance(found, dict):
        raise ContainerError(f"{path}: quantization_config is no JSON object; {AGAIN}")
    return found
