"""Whole models: built without weights, then filled from a folder, a tensor at a time.

    with without_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    replace_linears(model, folder)  # the quantised matrices
    load_dense(model, folder)  # all that is not quantised: embeddings, norms, lm_head, biases

It takes about the memory of the quantised model and one layer (two where codes are entropy-coded).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from vqkernels import heap
from vqkernels.dense import open_dense
from vqkernels.errors import TensorError
from vqkernels.nn import VQLinear

__all__ = ["load_dense", "without_weights"]


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
    if isinstance(source, Mapping):
        stored, where = source, "the given tensors"
    else:
        stored, where = open_dense(source), str(Path(source))
    places = _places(model)
    homes = {key: key.removeprefix(prefix) for key in stored if key.startswith(prefix)}
    if unused := [key for key, name in homes.items() if name not in places]:
        if strict:
            raise TensorError(
                f"{where}: tensor {unused[0]!r} (prefix {prefix!r}) names no parameter or buffer "
                f"of the model; set prefix, or strict=False to skip it"
            )
        homes = {key: name for key, name in homes.items() if name in places}
    _check_complete(model, {id(places[name]) for name in homes.values()}, where)
    loaded: dict[int, Tensor] = {}
    for key, name in homes.items():
        old = places[name]
        value = _placed(stored[key], old, dtype, f"{where}: tensor {key!r} for {name!r}")
        first = loaded.setdefault(id(old), value)
        if first is not value and not torch.equal(first, value):
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


def _placed(value: Tensor, old: Tensor, dtype: torch.dtype | None, where: str) -> Tensor:
    """`value` where `old` is, as what `old` is."""
    if value.shape != old.shape:
        raise TensorError(
            f"{where} is {list(value.shape)}, but the model's is {list(old.shape)}; "
            f"it was made for another model"
        )
    place = torch.device("cpu") if old.is_meta else old.device
    value = value.detach().to(place, dtype if value.is_floating_point() else None)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, old.requires_grad and value.is_floating_point())
    return value
