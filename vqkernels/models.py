"""Whole models: built without weights, then filled from a folder, a tensor at a time.

    with without_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    replace_linears(model, folder)  # the quantised matrices
    load_dense(model, folder)  # all that is not quantised: embeddings, norms, lm_head, biases

At no moment is there more in memory than the quantised model and one layer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from vqkernels import heap
from vqkernels.errors import ContainerError, TensorError
from vqkernels.formats import Checkpoint, open_source
from vqkernels.nn import VQLinear

__all__ = ["DENSE_FILE", "load_dense", "without_weights"]

DENSE_FILE = "dense.safetensors"
"""Beside the containers of an imported folder: what its checkpoint did not quantise."""


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made inside have their parameters on the meta device, without memory.

    Buffers are made as always, unlike under `torch.device("meta")`: some are computed and stored
    in no checkpoint (a rotary embedding's frequencies). Parameters that are tied stay tied. It
    holds for modules that other threads make meanwhile, too.
    """
    made: Any = WeakTensorKeyDictionary()  # so that a Parameter given to two modules stays one

    def empty(_module: nn.Module, _name: str, given: nn.Parameter | None) -> nn.Parameter | None:
        if given is None or given.is_meta:
            return None  # as it is
        if given not in made:
            made[given] = nn.Parameter(given.detach().to("meta"), given.requires_grad)
        found: nn.Parameter = made[given]
        return found

    hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # torch's type forgets that it may give another
    try:
        yield
    finally:
        hook.remove()


def load_dense(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> list[str]:
    """Fill parameters and buffers of `model` that aren't quantised; returns their names.

    source: a VPTQ or AQLM checkpoint's folder, an imported folder (its `dense.safetensors`), or
        tensors by name. After `prefix`, a tensor's name is that of a parameter or persistent
        buffer; tensors without the prefix are left alone.
    dtype: of floating-point values; None: as they are stored.
    strict: whether a tensor that finds no place is an error.

    Call `replace_linears` first. A tied weight stays tied; stored twice, it has to be the same
    both times. Values go where the model's own are (from the meta device: to the CPU). Raises
    TensorError or ContainerError, before anything is changed, and for what would be left on the
    meta device.
    """
    stored, where = _opened(source)
    places = _places(model)
    homes = {key: key.removeprefix(prefix) for key in stored.keys() if key.startswith(prefix)}  # noqa: SIM118
    if unused := [key for key, name in homes.items() if name not in places]:
        if strict:
            raise TensorError(
                f"{where}: tensor {unused[0]!r} (prefix {prefix!r}) names no parameter or buffer "
                f"of the model; set prefix, or strict=False to skip it"
            )
        homes = {key: name for key, name in homes.items() if name in places}
    _check_shapes(stored, homes, places, where)
    _check_complete(model, {id(places[name]) for name in homes.values()}, where)
    loaded: dict[int, Tensor] = {}
    for key, name in homes.items():
        old = places[name]
        value = _placed(stored.read(key), old, dtype)
        if not torch.equal(loaded.setdefault(id(old), value), value):
            raise TensorError(
                f"{where}: tensor {key!r} is tied to another in the model, but is stored with "
                f"other values; untie them (tie_word_embeddings) or drop one"
            )
        heap.release()
    # from here on nothing can fail
    names = [name for name, old in places.items() if id(old) in loaded]
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, loaded[id(places[name])])
    return names


class _Stored(Protocol):
    """Dense tensors by key, each read when it is asked for."""

    def keys(self) -> list[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def read(self, key: str) -> Tensor: ...


class _Given:
    """Tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach()


class _File:
    """A safetensors file, mapped while a tensor is copied out: mapped pages count as memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._opened() as file:
            self._shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    def keys(self) -> list[str]:
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> Tensor:
        with self._opened() as file:
            value: Tensor = file.get_tensor(key).clone()
        return value

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise ContainerError(
                f"{self._path}: can't be read ({reason}); import the checkpoint again"
            ) from error


@runtime_checkable
class _Checkpoint(Protocol):
    """A source that is a model's checkpoint: VPTQ's or AQLM's."""

    checkpoint: Checkpoint

    def dense_keys(self) -> list[str]: ...


class _OfCheckpoint:
    """What a checkpoint holds beside its quantised modules."""

    def __init__(self, source: _Checkpoint) -> None:
        self._keys, checkpoint = source.dense_keys(), source.checkpoint
        self.shape, self.read = checkpoint.shape, checkpoint.read

    def keys(self) -> list[str]:
        return self._keys


def _opened(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[_Stored, str]:
    if isinstance(source, Mapping):
        return _Given(source), "the given tensors"
    path = Path(source)
    if (path / DENSE_FILE).is_file():
        return _File(path / DENSE_FILE), str(path / DENSE_FILE)
    quantised = open_source(path)
    if isinstance(quantised, _Checkpoint):
        return _OfCheckpoint(quantised), str(path)
    raise ContainerError(
        f"{path}: holds no {DENSE_FILE}, and is no checkpoint; give the folder that "
        f"`vqbench import` made, or the checkpoint's own"
    )


# ------------------------------------------------------------------------------------------------
# in a model


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by all names that they have; no parts of a VQLinear."""
    places: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        held: dict[str, Tensor | None] = {**module._parameters}
        if not isinstance(module, VQLinear):
            kept = module._buffers.keys() - module._non_persistent_buffers_set
            held |= {name: module._buffers[name] for name in module._buffers if name in kept}
        places |= {
            f"{path}.{name}" if path else name: value
            for name, value in held.items()
            if value is not None
        }
    return places


def _check_shapes(
    stored: _Stored, homes: Mapping[str, str], places: Mapping[str, Tensor], where: str
) -> None:
    for key, name in homes.items():
        if stored.shape(key) != tuple(places[name].shape):
            raise TensorError(
                f"{where}: tensor {key!r} is {list(stored.shape(key))}, but {name!r} of the model "
                f"is {list(places[name].shape)}; it was made for another model"
            )


def _check_complete(model: nn.Module, filled: set[int], where: str) -> None:
    """Raise TensorError, naming the first, where something would be left without memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta and id(parameter) not in filled:
            raise TensorError(
                f"{where}: holds no {name!r}, which would stay on the meta device; replace_linears "
                f"comes first, and the checkpoint has to be of this model"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in filled:
            raise TensorError(
                f"{where}: holds no buffer {name!r}, which would stay on the meta device; build "
                f"the model inside vqkernels.without_weights(), which computes buffers"
            )


def _placed(value: Tensor, old: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`value` where `old` is, as what `old` is."""
    place = torch.device("cpu") if old.is_meta else old.device
    value = value.to(place, dtype if value.is_floating_point() else None)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, old.requires_grad and value.is_floating_point())
    return value
