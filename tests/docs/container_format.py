"""A reader of the container format, written from docs/container-format.md alone: sections 1 to 6.

Section numbers are those of that page, as are the names.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from bisect import bisect_right
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors import deserialize

SLOTS = 2**24
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "<i1", "U8": "<u1"}
NUMPY |= {"U16": "<u2", "U32": "<u4", "I32": "<i4"}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
DEFAULTS: dict[str, Any] = {
    "vector_length": 0,  # must be there, as must stages: these two aren't taken
    "stages": [],
    "vector_axis": "in",
    "vector_width": 1,
    "method": "vq",
    "subspaces": 1,
    "group_axis": "tensor",
    "group_size": 0,
    "coefficients": [],
    "code_bits": [],
    "codebook_dtype": "float16",
    "distance": "l2",
    "traversal": "row",
    "stride": 1,
    "scale_axis": "none",
    "zero_axis": "none",
    "side_dtype": "float16",
    "rotation_size": 0,
    "permuted": False,
    "outlier_columns": 0,
    "outlier_entries": 0,
    "outlier_vector_length": 0,
    "uniform_columns": 0,
    "uniform_bits": 8,
}
AXES = ("none", "tensor", "row", "column")
CHOICES: dict[str, tuple[str, ...]] = {
    "vector_axis": ("in", "out"),
    "traversal": ("row", "column"),
    "group_axis": AXES[1:],
    "method": ("vq", "pq", "opq", "rq", "additive", "vptq"),
    "distance": ("l2", "cosine"),
    "codebook_dtype": tuple(DTYPES),
    "side_dtype": tuple(DTYPES)[:3],
    "scale_axis": AXES,
    "zero_axis": AXES,
}
POSITIVE = ("vector_length", "vector_width", "subspaces", "stride")
Array = np.ndarray[Any, Any]
Json = dict[str, Any]
Tensors = dict[str, tuple[str, Array]]  # of each key the dtype and the numbers, bfloat16 as bits
Matrix = SimpleNamespace  # fields and numbers of section 3, `entry`, `parts` and `codes`


def need(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)


def sha(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def checked(holder: Json) -> Json:
    """The object in `vqbench`, with which `vqbench_sha256` has to agree."""
    need(sha(holder.get("vqbench", "")) == holder.get("vqbench_sha256"), "checksum of vqbench")
    inner = json.loads(holder["vqbench"])
    if not isinstance(inner, dict):
        raise ValueError("vqbench is no object")
    return inner


# Sections 1 to 4: the file, the description, the parts.


def check_layout(header: Json, start: int, data: bytes) -> None:
    """Section 1: alignment and pads."""
    need(start % 64 == 0, "header's length")
    keys = list(header)
    pads = [key for key in keys if "/" not in key]
    need(pads == [f"~{i}" for i in range(len(pads))], "names of pads")
    need(not {keys[0], keys[-1]} & set(pads), "a pad at an end")
    for key, tensor in header.items():
        begin, end = (start + at for at in tensor["data_offsets"])
        if "/" in key:
            need(begin % 64 == 0, f"{key}: alignment")
        else:
            need(end % 64 == 0 and 1 <= end - begin <= 63, f"{key}: length")
            need(tensor["dtype"] == "U8" and tensor["shape"] == [end - begin], f"{key}: kind")
            need(not any(data[begin:end]), f"{key}: not 0")


def plain(data: bytes) -> Tensors:
    """The tensors of a safetensors file."""
    stored: list[tuple[str, Json]] = deserialize(data)  # type: ignore[no-untyped-call]
    return {
        key: (x["dtype"], np.frombuffer(x["data"], NUMPY[x["dtype"]]).reshape(x["shape"]))
        for key, x in stored
    }


def read_tensors(data: bytes) -> tuple[Json, Tensors, str]:
    """Sections 1 and 9: the description, the tensors without pads, the description's text."""
    stored = plain(data)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    description = checked(metadata)
    version = description["container_version"]
    need(version in (1, 2), "container_version")
    need(description["spec_version"] in (1, 2), "spec_version")
    header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    if version == 2:
        check_layout(header, start, data)
    tensors = {key: stored[key] for key in header if "/" in key or version == 1}
    return description, tensors, metadata["vqbench"]


def check_fields(m: Matrix) -> None:
    """Section 3: what each field may be."""
    for field, default in DEFAULTS.items():
        given = getattr(m, field)
        need(type(given) is type(default), field)
        if isinstance(given, str):
            need(given in CHOICES[field], field)
        elif isinstance(given, list):
            kinds = (int, float) if field == "coefficients" else (int,)
            need(all(type(x) in kinds and math.isfinite(x) for x in given), field)
        else:
            need(given >= (field in POSITIVE), field)


def sizes(entry: Json, spec_version: int = 2) -> Matrix:
    """Section 3: the format of a matrix, and what follows from it."""
    m = Matrix(entry=entry, name=entry["name"], n=entry["n"])
    vars(m).update({field: entry["spec"].get(field, DEFAULTS[field]) for field in DEFAULTS})
    check_fields(m)
    m.k, m.bias, m.usage = entry["k"], entry["bias"], entry.get("usage", False)
    m.coding = entry.get("coding", ["packed"] * len(m.stages))
    m.vector_width = 1 if spec_version == 1 else m.vector_width
    m.code_bits = m.code_bits or [max(1, (e - 1).bit_length()) for e in m.stages]
    m.main = m.k - m.outlier_columns - m.uniform_columns
    m.block, m.size = m.vector_length * m.stride, m.vector_width * m.vector_length
    m.inwards = m.vector_axis == "in"
    if m.inwards:
        m.R, m.C = math.ceil(m.n / m.vector_width), math.ceil(m.main / m.block) * m.stride
    else:
        m.R, m.C = math.ceil(m.n / m.block) * m.stride, m.main
    grouped = {"tensor": 1, "row": m.n, "column": m.main}[m.group_axis]
    m.sets = math.ceil(grouped / (m.group_size or 1))
    m.along = m.group_axis == ("column" if m.inwards else "row")
    m.rows, m.columns = (m.R, m.C) if m.traversal == "row" else (m.C, m.R)
    return m


def printable(character: str) -> bool:
    return character == " " or unicodedata.category(character) not in {"Cc", "Zl", "Zp", "Zs"}


def check_entry(m: Matrix) -> None:
    """Sections 2 and 3: what is said of single numbers."""
    need(1 <= len(m.name) <= 1024 and all(map(printable, m.name)), "name")
    need(type(m.n) is type(m.k) is int and type(m.bias) is type(m.usage) is bool, "types")
    need(1 <= m.n < 2**31 and 1 <= m.main <= m.k < 2**31, "n, k")
    need(len(m.coding) == len(m.code_bits) == len(m.stages) >= 1, "lengths of lists")
    need(len(m.coefficients) in (0, len(m.stages)), "coefficients")
    for entries, bits, coding in zip(m.stages, m.code_bits, m.coding, strict=True):
        need(1 <= entries <= 65536 and (entries - 1).bit_length() <= bits <= 16, "code_bits")
        need(coding == "packed" or (coding == "ans" and entries >= 2), "coding")
    need(m.vector_width == 1 or m.inwards, "vector_width")
    need((m.group_axis == "tensor") == (m.group_size == 0), "group_size")
    outliers = m.outlier_entries, m.outlier_vector_length, m.outlier_columns
    need(outliers[:2] == (0, 0) or min(outliers) > 0, "outliers' codebook")
    need(m.outlier_entries <= 65536 and 1 <= m.uniform_bits <= 8, "outlier_entries, uniform_bits")
    need(not m.rotation_size or m.main % m.rotation_size == 0, "rotation_size")
    need(m.group_size % (m.block if m.along else m.vector_width) == 0, "group_size")
    for value in m.entry.get("made", {}).values():
        numbers = value if isinstance(value, list) else [value]
        need(isinstance(value, str) or all(map(math.isfinite, numbers)), "made")


def implied(m: Matrix) -> dict[str, tuple[tuple[int, ...], str]]:
    """Section 4: of each part its shape (a part that isn't there has a 0 in it) and dtype."""
    bits = sum(b for b, c in zip(m.code_bits, m.coding, strict=True) if c == "packed")
    book, side, coded = DTYPES[m.codebook_dtype], DTYPES[m.side_dtype], m.outlier_entries > 0
    axes = {"none": 0, "tensor": 1, "row": m.n, "column": m.k}
    lines = math.ceil(m.n / (m.outlier_vector_length or 1))
    parts: dict[str, tuple[tuple[int, ...], str]] = {
        "codes": ((m.rows, math.ceil(m.columns * bits / 32)), "I32"),
        "codebook_scale": ((m.sets, m.subspaces, len(m.stages) * (book == "I8")), "F32"),
        "outlier_codes": (
            (lines, m.outlier_columns * coded),
            "U8" if m.outlier_entries <= 256 else "U16",
        ),
        "outlier_codebook": ((m.outlier_entries, m.outlier_vector_length), side),
        "outliers": ((m.n, m.outlier_columns * (not coded)), side),
        "uniform_codes": ((m.n, m.uniform_columns), "U8"),
        "uniform_scale": ((m.uniform_columns,), side),
        "uniform_zero": ((m.uniform_columns,), side),
        "rotation": ((m.rotation_size, m.rotation_size), side),
        "permutation": ((m.k * m.permuted,), "U16" if m.k <= 65536 else "I32"),
        "scale": ((axes[m.scale_axis],), side),
        "zero": ((axes[m.zero_axis],), side),
        "bias": ((m.n * m.bias,), "F32"),
    }
    for s, entries in enumerate(m.stages):
        ans = m.coding[s] == "ans"
        parts[f"ans_{s}"] = ((-ans,), "U32")  # -1: as long as it is
        parts[f"usage_{s}"] = ((entries * (m.usage or ans),), "U8 U16 U32")
        parts[f"codebook_{s}"] = ((m.sets, m.subspaces, entries, m.size), book)
    return {part: (shape, dtypes) for part, (shape, dtypes) in parts.items() if 0 not in shape}


# Section 5: codes.


def unpack(words: Array, columns: int, widths: list[int]) -> list[Array]:
    bits = np.unpackbits(words.view("<u1").reshape(len(words), -1), axis=1, bitorder="little")
    used = columns * sum(widths)
    need(not bits[:, used:].any(), "rest of the last word")
    cells = bits[:, :used].reshape(len(words), columns, sum(widths)).astype(np.int64)
    ends = zip(accumulate(widths), widths, strict=True)
    return [(cells[..., end - b : end] @ (1 << np.arange(b))).reshape(-1) for end, b in ends]


def ans_slots(u: list[int], cells: int) -> list[int]:
    need(sum(u) == cells < 2**31, "sum of usage")
    return [i + below * (SLOTS - len(u)) // cells for i, below in enumerate([0, *accumulate(u)])]


def ans_decode(words: list[int], u: list[int], cells: int) -> list[int]:
    slots, state, codes = ans_slots(u, cells), 0, []
    need(len(words) * 64 >= cells and words[-1] != 0, "length of the stream")
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    for _ in range(cells):
        q = state % SLOTS
        code = bisect_right(slots, q) - 1
        state = (slots[code + 1] - slots[code]) * (state // SLOTS) + q - slots[code]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
        codes.append(code)
    need(not words and state == 0, "end of the stream")
    return codes


def ans_encode(codes: list[int], u: list[int]) -> list[int]:
    slots, words, state = ans_slots(u, len(codes)), [], 0
    for code in reversed(codes):
        f = slots[code + 1] - slots[code]
        if state >= f << 40:
            words.append(state % 2**32)
            state >>= 32
        state = (state // f) * SLOTS + state % f + slots[code]
    while state:
        words.append(state % 2**32)
        state >>= 32
    return words


def read_codes(m: Matrix) -> Array:
    """All codes, `[R, C, S]`, checked against the entries and `usage` (section 8)."""
    packed = [b for b, coding in zip(m.code_bits, m.coding, strict=True) if coding == "packed"]
    streams = iter(unpack(m.parts["codes"][1], m.columns, packed) if packed else ())
    stages = []
    for s, entries in enumerate(m.stages):
        dtype, usage = m.parts.get(f"usage_{s}", ("", np.zeros(0, int)))
        if m.coding[s] == "ans":
            words, cells = m.parts[f"ans_{s}"][1].tolist(), m.rows * m.columns
            codes = np.array(ans_decode(words, usage.tolist(), cells))
        else:
            codes = next(streams)
        need(codes.max() < entries, "code out of range")
        if dtype:
            need(np.array_equal(np.bincount(codes, minlength=entries), usage), "usage counts")
            large = int(usage.max()) >= 2**8, int(usage.max()) >= 2**16
            need(dtype == ["U8", "U16", "U32"][sum(large)], "dtype of usage")
        stages.append(codes.reshape(m.rows, m.columns))
    grid = np.stack(stages, axis=-1)
    return grid if m.traversal == "row" else grid.swapaxes(0, 1)


# Sections 8 and 6: the checks, and decoding.


def value(m: Matrix, part: str) -> Array:
    """A part in float64."""
    dtype: str
    numbers: Array
    dtype, numbers = m.parts[part]
    if dtype == "BF16":
        numbers = (numbers.astype("<u4") << 16).view("<f4")
    return numbers.astype(np.float64)


def read_matrix(entry: Json, tensors: Tensors, spec_version: int) -> Matrix:
    """Takes a matrix's parts out of `tensors`, and checks them."""
    m = sizes(entry, spec_version)
    check_entry(m)
    m.parts = {}
    for part, (shape, dtypes) in implied(m).items():
        dtype, numbers = m.parts[part] = tensors.pop(f"{m.name}/{part}", ("", np.zeros(0)))
        fits = numbers.shape == shape or (shape == (-1,) and numbers.ndim == 1)
        need(dtype in dtypes.split() and fits, f"{part}: dtype or shape")
        need(sha(numbers.tobytes()) == entry["sha256"].get(part), f"{part}: checksum")
        need(bool(np.isfinite(value(m, part)).all()), f"{part}: infinite or NaN")
    need(set(m.parts) == set(entry["sha256"]), "names in sha256")
    for part, limit in (("outlier_codes", m.outlier_entries), ("uniform_codes", 2**m.uniform_bits)):
        need(part not in m.parts or m.parts[part][1].max() < limit, f"{part}: out of range")
    if m.permuted:
        need(sorted(m.parts["permutation"][1].tolist()) == list(range(m.k)), "permutation")
    m.codes = read_codes(m)
    need(sha(stored(m).astype("<f4").tobytes()) == entry["decoded_sha256"], "decoded_sha256")
    return m


def read_container(data: bytes) -> dict[str, Matrix]:
    description, tensors, _ = read_tensors(data)
    provenance, entries = description["provenance"], description["tensors"]
    strings = all(isinstance(text, str) for text in provenance.values())
    need("creator" in provenance and strings, "provenance")
    need(len({entry["name"] for entry in entries}) == len(entries), "a name twice")
    version, coded = description["spec_version"], description["container_version"] == 2
    named = [("coding" in entry, "usage" in entry) == (coded, coded) for entry in entries]
    need(all(named), "coding, usage")
    matrices = {entry["name"]: read_matrix(entry, tensors, version) for entry in entries}
    need(not tensors, "tensors that the description doesn't imply")
    return matrices


def decode_main(m: Matrix) -> Array:
    """Steps 1 and 2: `M`, `[n, main]`."""
    r, c = np.indices((m.R, m.C))
    a, o = (c, r * m.vector_width) if m.inwards else (r, c)
    begin = a // m.stride * m.block
    group = (begin if m.along else o) // m.group_size if m.group_size else np.zeros_like(a)
    cells = np.zeros((m.R, m.C, m.size))
    for s in range(len(m.stages)):
        book = value(m, f"codebook_{s}")
        if m.codebook_dtype == "int8":
            book = book * value(m, "codebook_scale")[:, :, s, None, None]
        book = book * (m.coefficients[s] if m.coefficients else 1.0)
        cells += book[group, a % m.subspaces, m.codes[..., s]]
    place = (begin + a % m.stride)[..., None, None] + np.arange(m.vector_length) * m.stride
    other = o[..., None, None] + np.arange(m.vector_width)[:, None]
    row, column = np.broadcast_arrays(*((other, place) if m.inwards else (place, other)))
    result = np.full((row.max() + 1, column.max() + 1), np.nan)
    result[row, column] = cells.reshape(row.shape)
    main: Array = result[: m.n, : m.main]
    return main


def stored(m: Matrix) -> Array:
    """Steps 3 and 4: `[outliers | uniform | M]`."""
    columns = [value(m, "outliers")] if "outliers" in m.parts else []
    if m.outlier_entries:
        i = np.arange(m.n)
        codes = m.parts["outlier_codes"][1][i // m.outlier_vector_length]
        columns.append(value(m, "outlier_codebook")[codes, i[:, None] % m.outlier_vector_length])
    if m.uniform_columns:
        uniform = value(m, "uniform_codes") * value(m, "uniform_scale") + value(m, "uniform_zero")
        columns.append(uniform)
    return np.hstack([*columns, decode_main(m)])


def decode(m: Matrix) -> Array:
    """Section 6, all of it."""
    w = stored(m)
    if m.rotation_size:
        runs = w[:, m.k - m.main :].reshape(m.n, -1, m.rotation_size) @ value(m, "rotation")
        w[:, m.k - m.main :] = runs.reshape(m.n, m.main)
    if m.permuted:
        w = w[:, np.argsort(m.parts["permutation"][1])]
    if m.scale_axis != "none":
        w = w * value(m, "scale").reshape((-1, 1) if m.scale_axis == "row" else (1, -1))
    if m.zero_axis != "none":
        w = w + value(m, "zero").reshape((-1, 1) if m.zero_axis == "row" else (1, -1))
    return w
