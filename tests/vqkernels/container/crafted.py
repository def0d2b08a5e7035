"""Container files taken apart and put together again, with every checksum right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vqkernels import container
from vqkernels.errors import VqError

Tensors = dict[str, torch.Tensor]


def raw(tensor: torch.Tensor) -> bytes:
    """Its bytes; torch views no empty tensor as bytes."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def parts_of(path: Path) -> Tensors:
    """The tensors of a file but its pads, in the order of the file."""
    with safe_open(path, "pt") as file:
        keys = [key for key in file.offset_keys() if "/" in key]
        return {key: file.get_tensor(key).clone() for key in keys}


def description_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()["vqbench"])
    return content


def header_of(text: str) -> dict[str, str]:
    return {"vqbench": text, "vqbench_sha256": hashlib.sha256(text.encode()).hexdigest()}


Entry = tuple[str, str, list[int], bytes]  # key, dtype, shape, data

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
}


def with_pads(tensors: Tensors) -> list[Entry]:
    """The tensors as the format wants them: at multiples of 64, counted from the first."""
    entries: list[Entry] = []
    end = pads = 0
    for key, value in tensors.items():
        if gap := -end % 64:
            entries.append((f"~{pads}", "U8", [gap], bytes(gap)))
            pads += 1
        entries.append((key, NAMES[value.dtype], list(value.shape), raw(value)))
        end += gap + value.nbytes
    return entries


def assemble(header: Mapping[str, str], entries: list[Entry], *, align: int = 64) -> bytes:
    """A safetensors file; its data starts at a multiple of `align`."""
    content: dict[str, Any] = {"__metadata__": dict(header)}
    data = b""
    for key, dtype, shape, piece in entries:
        offsets = [len(data), len(data) + len(piece)]
        content[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += piece
    text = json.dumps(content).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text + data


def write(path: Path, header: Mapping[str, str], tensors: Tensors) -> None:
    path.write_bytes(assemble(header, with_pads(tensors)))


def rebuild(path: Path, change: Callable[[dict[str, Any], Tensors], object]) -> None:
    """Change the container at `path`, checksums included; `change` may return another text."""
    content: Any = description_of(path)
    tensors = parts_of(path)
    result = change(content, tensors)
    if isinstance(result, str):
        content = result
    for entry in content.get("tensors", ()) if isinstance(content, dict) else ():
        for part in entry.get("sha256", ()) if isinstance(entry, dict) else ():
            if (value := tensors.get(f"{entry.get('name')}/{part}")) is not None:
                entry["sha256"][part] = hashlib.sha256(raw(value)).hexdigest()
    text = content if isinstance(content, str) else json.dumps(content)
    write(path, header_of(text), tensors)


def refused(path: Path, kind: type[VqError], says: str, *, decoded: bool = False) -> None:
    with pytest.raises(kind, match=says) as caught:
        container.load(path, decoded=decoded)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
