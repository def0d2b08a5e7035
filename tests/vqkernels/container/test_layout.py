"""Where parts lie in a file: at multiples of 64 bytes, with zeros between them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.strategies import quantized_tensors
from tests.vqkernels.container.crafted import (
    Entry,
    assemble,
    description_of,
    header_of,
    parts_of,
    refused,
    with_pads,
)
from vqkernels import container
from vqkernels.errors import ContainerError
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPEC = CodebookSpec(vector_length=2, stages=(5, 3), scale_axis="row")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    container.save(path, {name: random_tensor(SPEC, 6, 9, bias=True) for name in "ab"})
    return path


def places(path: Path) -> dict[str, tuple[int, int]]:
    """First byte in the file, and length, of each tensor."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    offsets = {key: entry["data_offsets"] for key, entry in header.items() if key[:2] != "__"}
    return {key: (start + first, last - first) for key, (first, last) in offsets.items()}


@settings(max_examples=30)
@given(st.lists(quantized_tensors(max_side=12), min_size=1, max_size=3))
def test_every_part_lies_at_a_multiple_of_64(tensors: list[QuantizedTensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        container.save(path, {f"~{number}": tensor for number, tensor in enumerate(tensors)})
        found, content = places(path), path.read_bytes()
    pads = [key for key in found if "/" not in key]
    assert pads == [f"~{number}" for number in range(len(pads))]
    for key, (start, length) in found.items():
        if key in pads:
            assert 0 < length < 64
            assert content[start : start + length] == bytes(length)
        else:
            assert start % 64 == 0
    assert max(start + length for start, length in found.values()) == len(content)


def test_parts_follow_their_matrix_in_order(path: Path) -> None:
    parts = ["codes", "usage_0", "usage_1", "codebook_0", "codebook_1", "scale", "bias"]
    assert list(parts_of(path)) == [f"{name}/{part}" for name in "ab" for part in parts]


def test_a_pad_is_read_with_the_part_before_it(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        order = file.offset_keys()
    pad = next(key for key in order[order.index("b/codes") :] if key[0] == "~")
    content[places(path)[pad][0]] = 1
    path.write_bytes(content)
    source = container.open_container(path)
    source["a"]
    with pytest.raises(ContainerError, match=f"tensor 'b': '{pad}', behind .*more than zeros"):
        source["b"]


def test_each_byte_of_each_pad_is_checked(path: Path) -> None:
    whole, pads = path.read_bytes(), [key for key in places(path) if key[0] == "~"]
    assert len(pads) > 5
    for pad in pads:
        first, length = places(path)[pad]
        for place in (first, first + length - 1):
            content = bytearray(whole)
            content[place] = 0x80
            path.write_bytes(content)
            refused(path, ContainerError, f"'{pad}', behind .*, holds more than zeros")
        path.write_bytes(whole)


def pad_at(entries: list[Entry], number: int) -> int:
    return [at for at, entry in enumerate(entries) if entry[0][0] == "~"][number]


def rename(entries: list[Entry]) -> None:
    at = pad_at(entries, 1)
    entries[at] = ("~99", *entries[at][1:])


def retype(entries: list[Entry]) -> None:
    key, _, shape, data = entries[(at := pad_at(entries, 0))]
    entries[at] = (key, "I8", shape, data)


def reshape(entries: list[Entry]) -> None:
    key, dtype, shape, data = entries[(at := pad_at(entries, 0))]
    entries[at] = (key, dtype, [1, *shape], data)


def lengthen(entries: list[Entry]) -> None:
    key, dtype, (length,), data = entries[(at := pad_at(entries, 0))]
    entries[at] = (key, dtype, [length + 64], data + bytes(64))


def cut_in_two(entries: list[Entry]) -> None:
    key, dtype, (length,), data = entries[(at := pad_at(entries, 0))]
    entries[at : at + 1] = [(key, dtype, [length - 1], data[1:]), (key, dtype, [1], data[:1])]
    for number in range(sum(entry[0][0] == "~" for entry in entries)):
        at = pad_at(entries, number)
        entries[at] = (f"~{number}", *entries[at][1:])


def append(entries: list[Entry]) -> None:
    """The next pad, as if another part followed."""
    number = sum(entry[0][0] == "~" for entry in entries)
    gap = -sum(len(entry[3]) for entry in entries) % 64
    assert gap
    entries.append((f"~{number}", "U8", [gap], bytes(gap)))


CHANGES: dict[str, tuple[Callable[[list[Entry]], object], str]] = {
    "renamed": (rename, "'~99' is no pad number 1"),
    "of signed bytes": (retype, r"'~0' is I8 \[\d+\], no pad"),
    "of two axes": (reshape, r"'~0' is U8 \[1, \d+\], no pad"),
    "64 longer": (lengthen, r"'~0' is U8 \[\d+\], no pad of 1 to 63"),
    "cut in two": (cut_in_two, "'~0' is no pad number 0"),
    "missing": (lambda found: found.pop(pad_at(found, 0)), "lies at byte .*, no multiple of 64"),
    "at the end": (append, "is no pad number"),
    "at the start": (lambda found: found.insert(0, ("~99", "U8", [0], b"")), "no pad of 1 to 63"),
    "of no name": (lambda found: found.append(("more", "U8", [1], b"a")), "'more' belongs to no"),
    "a pad's part": (lambda found: found.append(("~1/x", "U8", [1], b"a")), "'~1/x' belongs to no"),
    "a part": (lambda found: found.append(("a/more", "U8", [1], b"a")), "'a/more' belongs to no"),
}


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_other_layouts_are_refused(change: Any, says: str, path: Path) -> None:
    entries = with_pads(parts_of(path))
    header = header_of(json.dumps(description_of(path)))
    path.write_bytes(assemble(header, entries))
    container.load(path, decoded=True)
    change(entries)
    path.write_bytes(assemble(header, entries))
    refused(path, ContainerError, says)
    with pytest.raises(ContainerError, match=says):
        container.describe(path)


@pytest.mark.parametrize("align", [1, 8, 32])
def test_data_that_starts_elsewhere_is_refused(align: int, path: Path) -> None:
    entries = with_pads(parts_of(path))
    text = json.dumps(description_of(path))
    while True:
        content = assemble(header_of(text), entries, align=align)
        if (8 + int.from_bytes(content[:8], "little")) % 64:
            break
        text += " " * align
    path.write_bytes(content)
    refused(path, ContainerError, "'a/codes' lies at byte .*, no multiple of 64")
