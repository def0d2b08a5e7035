"""Matrices of an AQLM checkpoint, read and checked one at a time, and dequantised as there."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.errors import ContainerError, SpecError, TensorError, VqError
from vqkernels.formats.aqlm.scheme import FLOATS, KEPT, Scheme
from vqkernels.formats.checkpoint import CONFIG, Checkpoint, CheckpointSource
from vqkernels.source import Outline
from vqkernels.tensor import QuantizedTensor, row_step

__all__ = ["AqlmSource", "dequantize"]

_PIECE = 1 << 22  # weights summed at once: 16 MB in float32

_AGAIN = "copy or download the checkpoint again"


class AqlmSource(CheckpointSource):
    """The quantised modules of an AQLM checkpoint, by module name.

    Values keep the dtype they are stored in (config.json's torch_dtype has no say); a scale of
    `out_group_size` rows is repeated for each. Raises ContainerError, SpecError or TensorError, one
    line, where config and headers disagree, and at a lookup where the data is invalid.

    Codes have to be what aqlm writes: of fewer bits than their dtype, sign-extended. aqlm's own
    torch path takes any others modulo 2^bits, while its Triton kernel reads beyond the codebook.

    skip_bad: pass over modules whose headers are wrong; `refused` then says why, by name.
    """

    def __init__(self, checkpoint: Checkpoint, *, skip_bad: bool = False) -> None:
        super().__init__(checkpoint, "aqlm")
        config = checkpoint.folder / CONFIG
        try:
            self._scheme = Scheme.from_config(checkpoint.quantization)
        except SpecError as error:
            raise SpecError(f"{config}: {error}; correct the config") from error
        self._keys = _keys_by_module(checkpoint)
        if not self._keys:
            raise ContainerError(f"{checkpoint.folder}: holds no codes, so no AQLM layer; {_AGAIN}")
        kept = _kept(checkpoint)
        for name in self._keys:
            try:
                if not kept.isdisjoint((name, f"{name}.weight")):
                    raise ContainerError(
                        f"{config}: {KEPT} names {name!r}, which has codes; correct the config"
                    )
                self._outlines[name] = self._check_headers(name)
            except VqError as error:
                if not skip_bad:
                    raise
                self.refused[name] = str(error)

    def __getitem__(self, name: str) -> QuantizedTensor:
        outline = self._outlines[name]
        spec, bits = outline.spec, self._scheme.nbits_per_codebook
        parts = {"codes": self._codes(f"{name}.codes", bits)}
        for stage, book in enumerate(self._floats(f"{name}.codebooks")):
            # a copy each, so that none keeps the others in memory
            parts[f"codebook_{stage}"] = book.reshape(1, 1, 1 << bits, spec.vector_size).clone()
        scales = self._floats(f"{name}.scales").reshape(-1)
        parts["scale"] = scales.repeat_interleave(spec.vector_width)
        if outline.bias:
            parts["bias"] = self._floats(f"{name}.bias").to(torch.float32)
        return QuantizedTensor(spec, outline.n, outline.k, parts)

    def _check_headers(self, name: str) -> Outline:
        """The module's outline, once its tensors are those that its config asks for."""
        checkpoint, scheme = self.checkpoint, self._scheme
        shape, dtype = checkpoint.shape(f"{name}.codes"), checkpoint.dtype(f"{name}.codebooks")
        if len(shape) != 3 or 0 in shape:
            raise self._wrong(f"{name}.codes", "[rows, columns, codebooks]")
        if dtype not in FLOATS:
            raise self._wrong(f"{name}.codebooks", "float16, bfloat16 or float32")
        outline = Outline(
            spec=scheme.spec(dtype),
            n=shape[0] * scheme.out_group_size,
            k=shape[1] * scheme.in_group_size,
            bias=f"{name}.bias" in self._keys[name],
        )
        self._check_turned(name, shape)
        table = scheme.stored(outline)
        for suffix, (shape, dtype) in table.items():
            key = f"{name}.{suffix}"
            if (checkpoint.shape(key), checkpoint.dtype(key)) != (shape, dtype):
                raise self._wrong(key, f"{str(dtype).removeprefix('torch.')} {list(shape)}")
        if extra := sorted(self._keys[name] - {f"{name}.{suffix}" for suffix in table}):
            raise ContainerError(
                f"{checkpoint.file(extra[0])}: tensor {extra[0]!r} lies in module {name!r}, which "
                f"is quantised; remove it"
            )
        return outline

    def _check_turned(self, name: str, shape: tuple[int, ...]) -> None:
        # only 256 entries; of a square layer nothing shows it
        rows = self.checkpoint.shape(f"{name}.scales")[:1]
        if self._scheme.nbits_per_codebook == 8 and rows == shape[1:2] != shape[:1]:
            raise ContainerError(
                f"{self.checkpoint.file(f'{name}.codes')}: tensor {f'{name}.codes'!r} has rows and "
                f"columns exchanged, as aqlm leaves it after a forward pass on a CPU; save the "
                f"checkpoint again from a model that made none"
            )

    def _wrong(self, key: str, wanted: str) -> ContainerError:
        checkpoint = self.checkpoint
        dtype = str(checkpoint.dtype(key)).removeprefix("torch.")
        return ContainerError(
            f"{checkpoint.file(key)}: tensor {key!r} is {dtype} {list(checkpoint.shape(key))}, but "
            f"should be {wanted} by {CONFIG} and the module's other tensors; {_AGAIN}, or correct "
            f"{CONFIG}"
        )

    def _codes(self, key: str, bits: int) -> Tensor:
        """Codes as uint8 or uint16, from 0."""
        codes, half = self.checkpoint.read(key), 1 << (bits - 1)
        low, high = (int(value) for value in codes.aminmax())
        if low < -half or high >= half:
            raise self._damaged(
                key, f"holds code {low if low < -half else high}, outside of {-half}..{half - 1}"
            )
        if bits < codes.dtype.itemsize * 8:
            codes &= (1 << bits) - 1
        return codes.view(torch.uint8 if bits <= 8 else torch.uint16)

    def _floats(self, key: str) -> Tensor:
        values = self.checkpoint.read(key)
        if not bool(torch.isfinite(values).all()):
            raise self._damaged(key, "holds NaN or infinity")
        return values

    def _damaged(self, key: str, what: str) -> TensorError:
        return TensorError(f"{self.checkpoint.file(key)}: tensor {key!r} {what}; {_AGAIN}")


def _keys_by_module(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """The keys right under each module that has codes or codebooks."""
    modules: dict[str, set[str]] = {}
    for key in checkpoint.keys():  # noqa: SIM118
        modules.setdefault(key.rpartition(".")[0], set()).add(key)
    return {
        name: keys
        for name, keys in modules.items()
        if not keys.isdisjoint((f"{name}.codes", f"{name}.codebooks"))
    }


def _kept(checkpoint: Checkpoint) -> frozenset[str]:
    value = checkpoint.quantization.get(KEPT)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ContainerError(f"{checkpoint.folder / CONFIG}: {KEPT} is no list of names; {_AGAIN}")
    return frozenset(value)


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """The weight `[n, k]` in the dtype of its codebooks, with the roundings of aqlm on a CPU.

    There `embedding_bag` sums the entries from a zero on, in float32 and in order, and rounds once:
    to float16 half to even, to bfloat16 half up (away from zero). The scale is one more rounding.
    Raises UnsupportedError for what is no AQLM layer.
    """
    spec = tensor.spec
    Scheme.from_outline(Outline(spec=spec, n=tensor.n, k=tensor.k))
    dtype: torch.dtype = getattr(torch, spec.codebook_dtype)
    weight = torch.empty(tensor.n, tensor.k, dtype=dtype, device=tensor.parts["codes"].device)
    step = row_step(spec) * max(1, _PIECE // (row_step(spec) * tensor.k))
    for start in range(0, tensor.n, step):
        piece = tensor.rows(start, min(start + step, tensor.n))
        # 0 + -0 is 0
        sums = _rounded(piece.main_rows(torch.float32) + 0.0, dtype)
        weight[start : start + step] = sums * piece.parts["scale"][:, None]
    return weight


def _rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.bfloat16:
        return sums.to(dtype)
    return ((sums.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
