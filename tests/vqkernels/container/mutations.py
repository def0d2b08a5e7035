"""Random damage to containers: what a disk, a copy that stopped, or a person may do to files.

Each mutation takes files by name, those of another model, and a random generator, and gives the
files as they are afterwards, or None where it can't be done to these.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files, Files], Files | None]

HUGE = (2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64 - 1, 10**30)


def is_json(name: str) -> bool:
    return name.endswith(".json")


def pick(rng: random.Random, files: Files, *, json_only: bool | None = None) -> str | None:
    """A file's name; of JSON files or of the others only, where asked for."""
    names = [name for name in files if json_only is None or is_json(name) == json_only]
    return rng.choice(names) if names else None


def changed(files: Files, name: str, content: bytes | None) -> Files:
    rest = {one: data for one, data in files.items() if one != name}
    return rest if content is None else {**rest, name: content}


# ------------------------------------------------------------------------------------------------
# bytes


def flip_bits(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files)
    assert name is not None
    data = bytearray(files[name])
    for _flip in range(rng.choice((1, 1, 1, 2, 9))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return changed(files, name, bytes(data))


def overwrite(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files)
    assert name is not None
    data = bytearray(files[name])
    start, size = rng.randrange(len(data)), rng.choice((1, 4, 64, 512))
    stop = min(start + size, len(data))
    fill = rng.choice((b"\0", b"\xff", None))
    data[start:stop] = rng.randbytes(stop - start) if fill is None else fill * (stop - start)
    return changed(files, name, bytes(data))


def truncate(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files)
    assert name is not None
    return changed(files, name, files[name][: rng.randrange(len(files[name]))])


def lengthen(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files)
    assert name is not None
    return changed(files, name, files[name] + rng.choice((b"\0", b"{}", rng.randbytes(64))))


def repeat_or_drop(rng: random.Random, files: Files, _: Files) -> Files | None:
    """A piece twice, or not at all: what follows moves."""
    name = pick(rng, files)
    assert name is not None
    data = files[name]
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 8, 64, 500)))
    middle = data[start:stop] * rng.choice((0, 2))
    return changed(files, name, data[:start] + middle + data[stop:])


# ------------------------------------------------------------------------------------------------
# the header of a safetensors file


def parts_of(data: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def assembled(header: Any, data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


def huge_header(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files, json_only=False)
    if name is None:
        return None
    data = files[name]
    size = rng.choice((0, 1, 7, len(data) - 8, len(data), 10**8, 10**8 + 1, *HUGE[:-1]))
    return changed(files, name, size.to_bytes(8, "little") + data[8:])


def huge_shape(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files, json_only=False)
    if name is None:
        return None
    header, data = parts_of(files[name])
    key = rng.choice([one for one in header if one != "__metadata__"])
    numbers = header[key][rng.choice(("shape", "data_offsets"))]
    numbers[rng.randrange(len(numbers))] = rng.choice((-1, 0, 1, len(data) + 1, *HUGE))
    return changed(files, name, assembled(header, data))


def swap_tensors(rng: random.Random, files: Files, _: Files) -> Files | None:
    """Two tensors' data, or what the header says of them, or one tensor's data in both places."""
    name = pick(rng, files, json_only=False)
    if name is None:
        return None
    header, data = parts_of(files[name])
    one, other = rng.sample([key for key in header if key != "__metadata__"], 2)
    if rng.random() < 0.3:
        header[one], header[other] = header[other], header[one]
        return changed(files, name, assembled(header, data))
    (a, b), (c, d) = header[one]["data_offsets"], header[other]["data_offsets"]
    size = min(b - a, d - c)
    moved = bytearray(data)
    moved[a : a + size] = data[c : c + size]
    if rng.random() < 0.5:
        moved[c : c + size] = data[a : a + size]
    return changed(files, name, assembled(header, bytes(moved)))


def edit_header(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files, json_only=False)
    if name is None:
        return None
    header, data = parts_of(files[name])
    edit(rng, header)
    return changed(files, name, assembled(header, data))


# ------------------------------------------------------------------------------------------------
# JSON


def places(content: Any) -> list[tuple[Any, Any]]:
    """`(owner, key)` of every value in `content`."""
    found = []
    keys: Any = ()
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = range(len(content))
    for key in keys:
        found += [(content, key), *places(content[key])]
    return found


def edit(rng: random.Random, content: Any) -> None:
    """Change one value somewhere in `content`."""
    owner, key = rng.choice(places(content))
    old = owner[key]
    kind = rng.randrange(6)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(old))
    elif kind == 1:
        owner[rng.choice(("x", "é", "a\nb", str(key).upper()))] = owner.pop(key)
    elif kind == 2:
        another, place = rng.choice(places(content))
        owner[key] = copy.deepcopy(another[place])
    elif kind == 3 and isinstance(old, int):
        owner[key] = old + rng.choice((-1, 1))
    elif kind == 3 and isinstance(old, str) and old:
        place = rng.randrange(len(old))
        owner[key] = old[:place] + rng.choice("0aé/.\n") + old[place + 1 :]
    else:
        values = (None, True, False, -1, 0, 1.5, "", "x", "../x", [], {}, [[]], 1e308, *HUGE)
        owner[key] = rng.choice(values)


def seal(content: Any) -> dict[str, str]:
    text = json.dumps(content, separators=(",", ":"))
    return {"vqbench": text, "vqbench_sha256": hashlib.sha256(text.encode()).hexdigest()}


def edit_json(rng: random.Random, files: Files, _: Files) -> Files | None:
    """A value of an index or a mapping, its checksum left as it was."""
    name = pick(rng, files, json_only=True)
    if name is None:
        return None
    content = json.loads(files[name])
    holder = content.get("metadata", content)
    if rng.random() < 0.5:
        edit(rng, content)
    else:
        described = json.loads(holder["vqbench"])
        edit(rng, described)
        holder["vqbench"] = seal(described)["vqbench"]
    return changed(files, name, json.dumps(content).encode())


def forge_json(rng: random.Random, files: Files, _: Files) -> Files | None:
    """A value of an index or a mapping, with a checksum that fits again."""
    name = pick(rng, files, json_only=True)
    if name is None:
        return None
    content = json.loads(files[name])
    described = json.loads(content.get("metadata", content)["vqbench"])
    edit(rng, described)
    content.get("metadata", content).update(seal(described))
    return changed(files, name, json.dumps(content).encode())


def forge_description(rng: random.Random, files: Files, _: Files) -> Files | None:
    """A value of a container's description, with a checksum that fits again."""
    name = pick(rng, files, json_only=False)
    if name is None:
        return None
    header, data = parts_of(files[name])
    described = json.loads(header["__metadata__"]["vqbench"])
    edit(rng, described)
    header["__metadata__"] = seal(described)
    return changed(files, name, assembled(header, data))


# ------------------------------------------------------------------------------------------------
# files


def lose(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files)
    assert name is not None
    return changed(files, name, None)


def empty(rng: random.Random, files: Files, _: Files) -> Files | None:
    name = pick(rng, files)
    assert name is not None
    return changed(files, name, b"")


def swap_files(rng: random.Random, files: Files, _: Files) -> Files | None:
    if len(files) < 2:
        return None
    one, other = rng.sample(list(files), 2)
    return {**files, one: files[other], other: files[one]}


def another_model(rng: random.Random, files: Files, others: Files) -> Files | None:
    """Files of another model of the same shapes, under the names of these."""
    pairs = list(zip(sorted(files), sorted(others), strict=True))
    if len(pairs) == 1:  # a whole container of another model is a whole container
        return None
    count = rng.randrange(1, len(pairs))
    return {**files, **{name: others[other] for name, other in rng.sample(pairs, count)}}


def another_file(rng: random.Random, files: Files, others: Files) -> Files | None:
    name = pick(rng, files)
    assert name is not None
    content = rng.choice((b"PK\x03\x04", b"\x80\x02", b"{}", b"[]", b"null", b"\0" * 200))
    if rng.random() < 0.3 and len(files) > 1:
        content = rng.choice(list(others.values()))
    return changed(files, name, content)


# What nothing can be loaded from but what was there before.
DAMAGE: tuple[Mutation, ...] = (
    flip_bits,
    flip_bits,
    flip_bits,
    overwrite,
    truncate,
    lengthen,
    repeat_or_drop,
    huge_header,
    huge_shape,
    swap_tensors,
    edit_header,
    edit_json,
    edit_json,
    forge_json,
    lose,
    empty,
    swap_files,
    another_model,
    another_file,
)
