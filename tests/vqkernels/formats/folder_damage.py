"""Damage to a checkpoint's folder, at random, and what reading it comes to."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vqkernels.errors import VqError
from vqkernels.formats import open_source
from vqkernels.tensor import QuantizedTensor

__all__ = ["assert_met_and_told", "check", "outcome"]

ODD_VALUES: list[Any] = [
    None, True, False, -1, -2, 0, 1, 2, 3, 8, 17, 1 << 16, 1 << 31, 1 << 63, 10**300, 1.5, "", "x",
    "../x", [], [1], [-1, 3], [1 << 40, 1 << 40], {}, {"a": 1}, "model.safetensors", "vptq", "aqlm",
]  # fmt: skip


def outcome(folder: Path, dequantize: Callable[[QuantizedTensor], Tensor]) -> str:
    """What opening and reading all of it comes to; anything but these two is a failure."""
    try:
        source = open_source(folder)
        for name in source:
            tensor, outline = source[name], source.outline(name)
            tensor.validate()
            assert (tensor.spec, tensor.n, tensor.k) == (outline.spec, outline.n, outline.k)
            assert dequantize(tensor).shape == (tensor.n, tensor.k)
    except VqError as error:
        message = str(error)
        assert "\n" not in message, message
        assert message.startswith(str(folder)), message
        assert ";" in message, message
        return "refused"
    return "loads"


def damage(folder: Path, draw: random.Random) -> str:
    """Change the checkpoint somehow; what was done."""
    kind = draw.choice([_flip, _flip, _cut, _swap, _remove, _edit_json, _edit_json, _edit_header])
    return f"{kind.__name__}: {kind(folder, draw)}"


def _pick(folder: Path, draw: random.Random, suffix: str = "") -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.name.endswith(suffix)))


def _flip(folder: Path, draw: random.Random) -> str:
    path = _pick(folder, draw)
    data = bytearray(path.read_bytes())
    # half of them early: a header is where they matter most
    end = draw.choice([len(data), min(len(data), 300)])
    places = [draw.randrange(end * 8) for _ in range(draw.choice([1, 1, 5]))]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"{path.name} {places}"


def _cut(folder: Path, draw: random.Random) -> str:
    path = _pick(folder, draw)
    data = path.read_bytes()
    size = draw.randrange(len(data) + 64)
    path.write_bytes(data[:size] + b"\0" * max(0, size - len(data)))
    return f"{path.name} {size}"


def _swap(folder: Path, draw: random.Random) -> str:
    first, second = _pick(folder, draw), _pick(folder, draw)
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    if draw.random() < 0.5:
        first.write_bytes(contents[1])
    return f"{first.name} {second.name}"


def _remove(folder: Path, draw: random.Random) -> str:
    path = _pick(folder, draw)
    path.unlink()
    return path.name


def _edit_json(folder: Path, draw: random.Random) -> str:
    path = _pick(folder, draw, ".json")
    content = json.loads(path.read_text())
    said = _edit(content, draw)
    path.write_text(json.dumps(content))
    return f"{path.name} {said}"


def _edit_header(folder: Path, draw: random.Random) -> str:
    path = _pick(folder, draw, ".safetensors")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + size])
    said = _edit(content, draw)
    text = json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return f"{path.name} {said}"


def _edit(content: Any, draw: random.Random) -> str:
    """Set, remove, rename or swap something at a random depth."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return "nothing"
        key = draw.choice(keys)
        inner = content[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            content = inner
            continue
        action = draw.choice(["set", "set", "remove", "rename", "swap"])
        if action == "set":
            content[key] = draw.choice([*ODD_VALUES, "I16", "F16", "BF16", "I32", "U64"])
            return f"{key} = {content[key]!r}"
        other = draw.choice(keys)
        if action == "swap":
            content[key], content[other] = content[other], content[key]
        elif action == "remove":
            del content[key]
        elif isinstance(content, dict):
            content[str(other) + draw.choice(["", "x", "/", ".weight"])] = content.pop(key)
        return f"{action} {key} {other}"


def check(
    originals: Sequence[Path],
    scratch: Path,
    seeds: range,
    dequantize: Callable[[QuantizedTensor], Tensor],
) -> Counter[str]:
    """How many checkpoints, each damaged in another way, came to what."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        draw = random.Random(seed)
        folder = scratch / "damaged"
        shutil.copytree(draw.choice(originals), folder)
        what = damage(folder, draw)
        try:
            seen[f"{what.partition(':')[0]} {outcome(folder, dequantize)}"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {what}") from error
        shutil.rmtree(folder)
    return seen


def assert_met_and_told(seen: Counter[str]) -> None:
    """Each kind of damage was met, and told where it can be."""
    for kind in ("_flip", "_cut", "_swap", "_remove", "_edit_json", "_edit_header"):
        assert seen[f"{kind} refused"] > 2, seen
    assert seen["_flip loads"] > 0, seen  # of a codebook's value, which nothing here can tell
