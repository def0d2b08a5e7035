"""A dense model from its folder, through transformers, and quantised weights put into it.

Nothing is downloaded, no code of the folder is run, and no pickle is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.available import first_line, load_package
from vqkernels.errors import ContainerError, TensorError, UnsupportedError, VqError
from vqkernels.formats.checkpoint import CONFIG, read_json
from vqkernels.nn import replace_linears
from vqkernels.source import outline_of
from vqkernels.tensor import QuantizedTensor, row_step

__all__ = [
    "LoadedModel",
    "architecture",
    "decoded",
    "dense_config",
    "load_model",
    "load_tokenizer",
    "max_positions",
]

_PIECE = 1 << 22  # weights decoded at once: 32 MiB in float64


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and the tensors of its folder that it has no use for."""

    folder: Path
    module: nn.Module
    unused: frozenset[str]

    def put(self, quantised: Mapping[str, QuantizedTensor], *, kernels: bool = False) -> list[str]:
        """Put the weights of `quantised` in place of the dense ones; returns their parameters.

        kernels: as layers that our kernels run (`replace_linears`), instead of their exact decode
        in the model's dtype.

        A tensor's name is that in the model's file, with or without `.weight`; what the model
        does not load from there is passed over. Of a weight shared with an embedding only the
        linear layers change, as in `replace_linears`. Raises TensorError, before anything is
        changed, for a name or a shape that is not the model's, and where nothing is left.
        """
        places = self._places(quantised)
        if kernels:
            replace_linears(self.module, {place: quantised[name] for name, place in places.items()})
        else:
            for name, place in places.items():
                _put_decoded(self.module, place, quantised[name])
        return list(places.values())

    def check_vocabulary(self, largest: int) -> None:
        """Raise ContainerError where token `largest` is beyond the model's embedding."""
        size = len(self.module.get_input_embeddings().weight)  # type: ignore[operator]  # a method
        if largest >= size:
            raise ContainerError(
                f"{self.folder}: its tokenizer gives token {largest}, but the model has {size}; "
                f"put model and tokenizer of one origin in the folder"
            )

    def run(self, **inputs: Any) -> Any:
        """The model's output. Raises UnsupportedError where the model can't take the inputs."""
        try:
            with torch.inference_mode():
                return self.module(**inputs)
        except VqError:
            raise
        except Exception as error:  # another's code: a decoder may be wanting, or positions end
            raise UnsupportedError(
                f"{self.folder}: the model can't read text so ({first_line(error)}); use an "
                f"evaluator of your own"
            ) from error

    def _places(self, quantised: Mapping[str, QuantizedTensor]) -> dict[str, str]:
        """Parameter by tensor; checked, but for the data."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        prefix = str(getattr(self.module, "base_model_prefix", "")) + "."
        places: dict[str, str] = {}
        for name in quantised:
            place = _place(name, prefix, parameters)
            if place is None and {name, f"{name}.weight"} & self.unused:
                continue
            if place is None:
                raise TensorError(
                    f"{self.folder}: tensor {name!r} names no weight of the model; "
                    f"give the folder of the model that was quantised"
                )
            if place in places.values():
                raise TensorError(
                    f"{self.folder}: two tensors are for the weight {place!r}; drop one ({name!r})"
                )
            outline, shape = outline_of(quantised, name), list(parameters[place].shape)
            if [outline.n, outline.k] != shape:
                raise TensorError(
                    f"{self.folder}: tensor {name!r} is [{outline.n}, {outline.k}], but the "
                    f"model's {place!r} is {shape}; it was made for another model"
                )
            places[name] = place
        if not places:
            raise TensorError(
                f"{self.folder}: no quantised tensor is for this model; give a container of it"
            )
        return places


def load_model(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model in `folder` as transformers' class `kind` (`AutoModel`, `BertModel`), on the CPU.

    Raises BackendError without transformers, UnsupportedError for a model that is quantised
    already, ContainerError for a folder that transformers can't load wholly from safetensors.
    """
    dense_config(folder)
    transformers = load_package("transformers")
    with _explained(folder, kind, transformers):
        module, info = getattr(transformers, kind).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype=dtype,
        )
    # a pooler above the last layer is made at random where a file has none; nothing here reads it
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ContainerError(
            f"{folder}: holds no {missing[0]!r}, which {kind} needs; "
            f"give the whole model's folder, or a model of that kind"
        )
    for parameter in module.parameters():
        # out of the mapped file: products of weights that begin elsewhere in a cache line round in
        # other ways, so that equal weights, put in here, would give other numbers
        parameter.data = parameter.data.clone()
    return LoadedModel(folder, module.eval(), frozenset(info["unexpected_keys"]))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises BackendError or ContainerError as `load_model` does."""
    dense_config(folder)
    transformers = load_package("transformers")
    with _explained(folder, "AutoTokenizer", transformers):
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def architecture(folder: Path) -> str:
    """The class of transformers that config.json names. Raises ContainerError where it is none."""
    names = dense_config(folder).get("architectures")
    transformers = load_package("transformers")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ContainerError(
            f"{folder / CONFIG}: architectures names no model of transformers "
            f"{transformers.__version__}; correct it, or use an evaluator that takes the folder"
        )
    return str(name)


def dense_config(folder: Path) -> dict[str, Any]:
    """config.json of a dense model's folder.

    Raises ContainerError where there is none, UnsupportedError for a model quantised already.
    """
    if not folder.is_dir():
        raise ContainerError(f"{folder}: is no folder; give the one with the model's {CONFIG}")
    config = read_json(folder / CONFIG)
    if "quantization_config" in config:
        raise UnsupportedError(
            f"{folder}: is quantised already (quantization_config in {CONFIG}); "
            f"give the folder of the dense model that it was made of"
        )
    return config


def decoded(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The exact decode `[n, k]`, rounded to `dtype` once, on the CPU, some rows at a time."""
    tensor = tensor.to("cpu")
    step = row_step(tensor.spec)
    span = max(step, _PIECE // tensor.k // step * step)
    weight = torch.empty(tensor.n, tensor.k, dtype=dtype)
    for start in range(0, tensor.n, span):
        stop = min(start + span, tensor.n)
        weight[start:stop] = tensor.rows(start, stop).decode().to(dtype)
    return weight


def _place(name: str, prefix: str, parameters: Mapping[str, Tensor]) -> str | None:
    """The parameter that tensor `name` is for: a base model's names may lack its `prefix`."""
    for full in (name, f"{name}.weight"):
        for candidate in (full, full.removeprefix(prefix), prefix + full):
            if candidate in parameters:
                return candidate
    return None


def _put_decoded(module: nn.Module, place: str, tensor: QuantizedTensor) -> None:
    owner, _, attribute = place.rpartition(".")
    target = module.get_submodule(owner)
    old = getattr(target, attribute)
    weight = nn.Parameter(decoded(tensor, old.dtype).to(old.device), requires_grad=False)
    sharing = [one for one in module.modules() if one._parameters.get(attribute) is old]
    if isinstance(target, nn.Linear):
        # an embedding that shares the weight stays dense: what is quantised is a product
        sharing = [one for one in sharing if isinstance(one, nn.Linear)]
    for one in sharing:
        setattr(one, attribute, weight)
        if tensor.bias is not None:
            one.bias = nn.Parameter(tensor.bias.to(old), requires_grad=False)


@contextlib.contextmanager
def _explained(folder: Path, kind: str, transformers: Any) -> Iterator[None]:
    """Keep transformers quiet; whatever a folder makes it raise is one line that names it."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # another's package reads another's files: anything may happen
        raise ContainerError(
            f"{folder}: can't be loaded as {kind} ({first_line(error)}); give a model's folder "
            f"with its tokenizer and its weights in .safetensors"
        ) from error
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def max_positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model was made for, by its config; None where that says nothing."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None
