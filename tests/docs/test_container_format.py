"""The vectors of docs/container-format.md, with a reader that was written from that page alone.

Section numbers are those of that page. The reader is in container_format.py and container_sets.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from tests.docs.container_format import (
    Array,
    Json,
    Matrix,
    Tensors,
    ans_encode,
    checked,
    decode,
    plain,
    read_container,
    read_tensors,
    sha,
)
from tests.docs.container_sets import (
    load_parallel,
    load_set,
    read_parallel,
    read_set,
    read_whole,
    set_id,
)

VECTORS = Path(__file__).parents[2] / "docs" / "vectors"

# Section 10: the vectors.


@cache
def read(name: str) -> dict[str, Matrix]:
    return read_container((VECTORS / name).read_bytes())


@cache
def expected() -> dict[str, dict[str, Array]]:
    """expected.safetensors: for each prefix the matrices."""
    found: dict[str, dict[str, Array]] = {"": {}, "version-1": {}, "shards": {}, "ranks": {}}
    for key, (dtype, w) in plain((VECTORS / "expected.safetensors").read_bytes()).items():
        assert dtype == "F64"
        prefix, _, rest = key.partition("/")
        found[prefix if prefix in found else ""][rest if prefix in found else key] = w
    return found


def check_alike(name: str, w: Array, want: Array, rotated: bool) -> None:
    """Bit for bit, unless it is rotated."""
    if rotated:
        np.testing.assert_allclose(w, want, rtol=1e-12, atol=1e-12)
    else:
        assert (w.shape, w.tobytes()) == (want.shape, want.tobytes()), name


def check_expected(prefix: str, matrices: dict[str, Matrix]) -> None:
    want = expected()[prefix]
    assert set(want) == set(matrices)
    for name, m in matrices.items():
        check_alike(name, decode(m), want[name], m.rotation_size > 0)


@pytest.mark.parametrize(("name", "prefix"), [("packed", ""), ("version-1", "version-1")])
def test_decoded(name: str, prefix: str) -> None:
    check_expected(prefix, read(f"{name}.safetensors"))


def test_few_words_say_the_same() -> None:
    few, full = read("few-words.safetensors"), read("packed.safetensors")
    assert set(few) == {name for name, m in full.items() if m.vector_width == 1}
    for name, m in few.items():
        assert len(m.entry["spec"]) < len(full[name].entry["spec"])
        assert set(m.entry) - set(full[name].entry)  # an unknown name
        assert np.array_equal(m.codes, full[name].codes)
        assert m.entry["sha256"] == full[name].entry["sha256"]
        check_alike(name, decode(m), expected()[""][name], m.rotation_size > 0)


def test_a_width_is_unknown_to_spec_version_1() -> None:
    description, tensors, _ = read_tensors((VECTORS / "few-words.safetensors").read_bytes())
    description["tensors"][0]["spec"]["vector_width"] = 2
    assert set(read_container(write(description, tensors))) == set(read("few-words.safetensors"))
    description["spec_version"] = 2
    with pytest.raises(ValueError, match="dtype or shape"):
        read_container(write(description, tensors))


@pytest.mark.parametrize(("name", "usage"), [("ans", False), ("ans-usage", True)])
def test_ans_is_encoded_to_the_same_words(name: str, usage: bool) -> None:
    found = 0
    for m in read(f"{name}.safetensors").values():
        assert m.usage == usage
        stored = {s for s in range(len(m.stages)) if usage or m.coding[s] == "ans"}
        assert {f"usage_{s}" for s in stored} == {p for p in m.parts if p.startswith("usage")}
        grid = m.codes if m.traversal == "row" else m.codes.swapaxes(0, 1)
        for s in (s for s, coding in enumerate(m.coding) if coding == "ans"):
            words = ans_encode(grid[..., s].ravel().tolist(), m.parts[f"usage_{s}"][1].tolist())
            assert words == m.parts[f"ans_{s}"][1].tolist()
            found += 1
    assert found


def test_shards() -> None:
    check_expected("shards", read_set(*load_set(VECTORS / "shards")))


def test_ranks() -> None:
    """Put together before decoding, and after: either way the whole is as expected."""
    wholes = read_parallel(*load_parallel(VECTORS / "ranks"))
    check_expected("ranks", {whole.name: whole for whole, _ in wholes})
    for whole, ranks in wholes:
        assert len(ranks) == 3
        w = np.concatenate([decode(m) for m in ranks], 0 if whole.entry["axis"] == "row" else 1)
        check_alike(whole.name, w, expected()["ranks"][whole.name], whole.rotation_size > 0)


def test_names_of_sets_and_ranks() -> None:
    """Made as the page says that a writer makes them, which a reader doesn't check."""
    parallel, sets = load_parallel(VECTORS / "ranks")
    for index, files in (load_set(VECTORS / "shards"), *sets):
        inner = checked(index["metadata"])
        assert inner["set"] == set_id([files[shard["file"]] for shard in inner["shards"]])
    inner = checked(parallel)
    text = json.dumps({x: inner[x] for x in ("indexes", "tensors")}, separators=(",", ":"))
    assert inner["folder"] == f"ranks-{sha(text)[:16]}"


# Section 8: what a reader must not take.


def write(description: Json, tensors: Tensors, align: int = 64, pad: bytes = b"\0") -> bytes:
    """A container with the right checksums of whatever it holds."""
    for entry in description["tensors"]:
        for part in entry["sha256"]:
            if (key := f"{entry['name']}/{part}") in tensors:
                entry["sha256"][part] = sha(tensors[key][1].tobytes())
    text, body, pads = json.dumps(description, separators=(",", ":")), b"", 0
    header: Json = {"__metadata__": {"vqbench": text, "vqbench_sha256": sha(text)}}
    for key, (dtype, numbers) in tensors.items():
        if gap := -len(body) % align:
            offsets = [len(body), len(body) + gap]
            header[f"~{pads}"] = {"dtype": "U8", "shape": [gap], "data_offsets": offsets}
            body, pads = body + pad * gap, pads + 1
        offsets = [len(body), len(body) + numbers.nbytes]
        header[key] = {"dtype": dtype, "shape": list(numbers.shape), "data_offsets": offsets}
        body += numbers.tobytes()
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % 64)
    return len(head).to_bytes(8, "little") + head + body


Change = Callable[[Json, Tensors], object]


def put(key: str, number: float) -> Change:
    """The first number of a part."""
    return lambda _, tensors: tensors[key][1].put(0, number)


def say(name: str, value: object, matrix: bool = True) -> Change:
    return lambda description, _: (description["tensors"][0] if matrix else description).update(
        {name: value}
    )


def wider(tensor: tuple[str, Array]) -> tuple[str, Array]:
    return "U16", tensor[1].astype("<u2")


def spec(**fields: object) -> Change:
    return lambda description, _: description["tensors"][0]["spec"].update(fields)


CHANGES: list[tuple[str, Change, str]] = [
    ("packed", put("plain/codes", 7), "code out of range"),
    ("packed", put("plain/codes", 1 << 12), "rest of the last word"),
    ("packed", put("plain/usage_0", 200), "usage counts"),
    ("packed", put("plain/codebook_0", 3), "decoded_sha256"),
    ("packed", put("plain/codebook_0", math.inf), "infinite"),
    ("packed", put("ragged/codebook_1", 0x7FC0), "infinite"),
    ("packed", put("uniform/uniform_codes", 32), "uniform_codes: out of range"),
    ("packed", put("outliers of a codebook/outlier_codes", 5), "outlier_codes: out of range"),
    ("packed", lambda _, t: t["permuted/permutation"][1].put([0, 1], 5), "permutation"),
    ("packed", lambda _, t: t.pop("permuted/permutation"), "permutation: dtype or shape"),
    ("packed", lambda _, t: t.update({"plain/more": t["plain/codes"]}), "doesn't imply"),
    ("packed", lambda _, t: t.update({"plain/codes": t["ragged/codes"]}), "codes: dtype or shape"),
    ("packed", lambda d, _: d["tensors"].append(d["tensors"][0]), "a name twice"),
    ("packed", say("made", {"error": math.inf}), "made"),
    ("packed", say("name", "a\nb"), "name"),
    ("packed", say("n", 0), "n, k"),
    ("packed", say("coding", []), "lengths"),
    ("packed", say("coding", ["rans"]), "coding"),
    ("packed", spec(coefficients=[1, 1]), "coefficients"),
    ("packed", spec(code_bits=[2]), "code_bits"),
    ("packed", spec(vector_axis="out", vector_width=2), "vector_width"),
    ("packed", spec(rotation_size=3), "rotation_size"),
    ("packed", spec(group_axis="column", group_size=6), "group_size"),
    ("packed", spec(outlier_columns=16), "n, k"),
    ("packed", spec(outlier_columns=2, outlier_entries=3), "outliers' codebook"),
    ("packed", spec(outlier_entries=3, outlier_vector_length=4), "outliers' codebook"),
    ("packed", spec(uniform_bits=9), "uniform_bits"),
    ("packed", spec(group_size=4), "group_size"),
    ("packed", spec(group_axis="row"), "group_size"),
    ("packed", spec(stages=[]), "lengths"),
    ("packed", spec(stages=[65537], code_bits=[16]), "code_bits"),
    ("packed", spec(stages=[True]), "stages"),
    ("packed", spec(coefficients=[math.nan]), "coefficients"),
    ("packed", spec(stride=0), "stride"),
    ("packed", spec(vector_length=4.0), "vector_length"),
    ("packed", spec(rotation_size=-4), "rotation_size"),
    ("packed", spec(method="other"), "method"),
    ("packed", spec(side_dtype="int8"), "side_dtype"),
    ("packed", say("k", 2**31), "n, k"),
    ("packed", say("bias", 0), "types"),
    ("packed", say("name", "a" * 1025), "name"),
    ("packed", lambda d, _: d["tensors"][0].pop("usage"), "coding, usage"),
    ("packed", say("container_version", 1, False), "coding, usage"),
    ("packed", lambda d, _: d["tensors"][0]["spec"].pop("stages"), "lengths"),
    ("packed", lambda d, _: d["tensors"][0]["spec"].pop("vector_length"), "vector_length"),
    ("version-1", say("spec_version", 3, False), "spec_version"),
    ("packed", say("provenance", {"creator": 1}, False), "provenance"),
    ("packed", lambda d, _: d["tensors"][0]["sha256"].update(more=""), "names in sha256"),
    ("packed", lambda _, t: t.update({"plain/usage_0": wider(t["plain/usage_0"])}), "dtype of"),
    ("packed", say("bias", True), "bias: dtype or shape"),
    ("packed", say("container_version", 3, False), "container_version"),
    ("packed", say("spec_version", 3, False), "spec_version"),
    ("packed", say("provenance", {}, False), "provenance"),
    ("ans", put("one stage/ans_0", 5), "end of the stream"),
    ("ans", lambda _, t: t["one stage/ans_0"][1].put(-1, 0), "length of the stream"),
    ("ans", put("one stage/usage_0", 0), "sum of usage"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES)
def test_refused(name: str, change: Change, message: str) -> None:
    description, tensors, _ = read_tensors((VECTORS / f"{name}.safetensors").read_bytes())
    tensors = {key: (dtype, numbers.copy()) for key, (dtype, numbers) in tensors.items()}
    align = 1 if name == "version-1" else 64
    assert read_container(write(description, tensors, align))  # only the change isn't taken
    change(description, tensors)
    with pytest.raises(ValueError, match=message):
        read_container(write(description, tensors, align))


@pytest.mark.parametrize(
    ("align", "pad", "message"),
    [(1, b"\0", "alignment"), (128, b"\0", "length"), (64, b"\1", "not 0")],
)
@pytest.mark.parametrize("name", ["ans", "packed"])
def test_refused_layout(name: str, align: int, pad: bytes, message: str) -> None:
    description, tensors, _ = read_tensors((VECTORS / f"{name}.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        read_container(write(description, tensors, align, pad))


@pytest.mark.parametrize(
    ("spaces", "last", "dtype", "message"),
    [(8, 0, "U8", "header's"), (0, 1, "U8", "a pad at an end"), (0, 0, "I8", "kind")],
)
def test_refused_header(spaces: int, last: int, dtype: str, message: str) -> None:
    data = (VECTORS / "packed.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8:start]), len(data) - start
    gap = (-end % 64 or 64) * last  # a pad after all
    header["~0"]["dtype"] = dtype
    if last:
        pads = sum("/" not in key for key in header) - 1
        header[f"~{pads}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % 64 + spaces)
    changed = len(head).to_bytes(8, "little") + head + data[start:] + bytes(gap)
    with pytest.raises(ValueError, match=message):
        read_container(changed)


@pytest.mark.parametrize("name", ["ans", "packed", "few-words", "version-1"])
def test_a_flipped_bit_is_seen(name: str) -> None:
    data = (VECTORS / f"{name}.safetensors").read_bytes()
    for at in range(0, len(data), len(data) // 61):
        damaged = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        in_header = at < 8 + int.from_bytes(data[:8], "little")
        with pytest.raises(
            (ValueError, SafetensorError), match=r"." if in_header else r"checksum|not 0"
        ):
            read_container(damaged)


def change(holder: Json, path: list[str | int], value: object) -> None:
    """A value in the object of `vqbench`, with the right checksum after it."""
    inner = checked(holder)
    at: Any = inner
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    holder["vqbench"] = json.dumps(inner)
    holder["vqbench_sha256"] = sha(holder["vqbench"])


INDEX: list[tuple[Callable[[Json], object], str]] = [
    (lambda x: x["weight_map"].pop("first/codes"), "weight_map"),
    (lambda x: x["weight_map"].update({"a/b": x["weight_map"]["first/codes"]}), "weight_map"),
    (lambda x: x["weight_map"].update({"a/b": "c"}), "files"),
    (lambda x: x["metadata"].update(total_size=1), "total_size"),
    (lambda x: x["metadata"].update(vqbench="{}"), "checksum of vqbench"),
    (lambda x: change(x["metadata"], ["index_version"], 2), "index_version"),
    (lambda x: change(x["metadata"], ["set"], "0" * 64), "set, number"),
    (lambda x: change(x["metadata"], ["shards", 1, "bytes"], 7), "index says"),
    (lambda x: change(x["metadata"], ["shards", 1, "sha256"], "0" * 64), "index says"),
    (lambda x: change(x["metadata"], ["shards", 0, "names"], ["second", "first"]), "index says"),
]


@pytest.mark.parametrize(("damage", "message"), INDEX)
def test_refused_index(damage: Callable[[Json], object], message: str) -> None:
    index, files = load_set(VECTORS / "shards")
    damage(index)
    with pytest.raises(ValueError, match=message):
        read_set(index, files)


def test_a_set_has_all_its_shards_and_its_own() -> None:
    index, files = load_set(VECTORS / "shards")
    one, two = sorted(files)[:2]
    with pytest.raises(ValueError, match="set, number"):
        read_set(index, files | {one: files[two]})
    with pytest.raises(ValueError, match="files"):
        read_set(index, {one: files[one]})
    assert list(read_set(index, files | {"other": b""})) == list(read_set(index, files))


def test_a_set_by_another_name() -> None:
    """It may have any name, if the index and all shards have it."""
    index, files = load_set(VECTORS / "shards")
    inner, other, others = checked(index["metadata"]), "1" * 64, {}
    for shard in inner["shards"]:
        description, tensors, _ = read_tensors(files[shard["file"]])
        description["shard"]["set"] = other
        data, old = write(description, tensors), shard["file"]
        name = old.replace(inner["set"][:16], other[:16])
        index["weight_map"] = {k: name if v == old else v for k, v in index["weight_map"].items()}
        shard |= {"file": name, "bytes": len(data), "sha256": sha(read_tensors(data)[2])}
        others[name] = data
    change(index["metadata"], ["shards"], inner["shards"])
    change(index["metadata"], ["set"], other)
    assert list(read_set(index, others)) == list(read_set(*load_set(VECTORS / "shards")))
    change(index["metadata"], ["set"], "2" * 64)
    with pytest.raises(ValueError, match="set, number"):
        read_set(index, others)


def test_ranks_that_differ_in_what_is_not_cut() -> None:
    parallel, sets = load_parallel(VECTORS / "ranks")
    ranks = [read_set(*rank)["0.q_proj"] for rank in sets]
    whole = checked(parallel)["tensors"][0]
    assert read_whole(whole, ranks).name == "0.q_proj"
    ranks[1].parts["codebook_0"] = "F16", ranks[0].parts["codebook_0"][1] + 1
    with pytest.raises(ValueError, match="not alike"):
        read_whole(whole, ranks)


PARALLEL: list[tuple[list[str | int], object, str]] = [
    (["parallel_version"], 2, "parallel_version"),
    (["indexes"], ["0" * 64] * 3, "indexes"),
    (["tensors", 0, "name"], "other", "names"),
    (["tensors", 0, "axis"], "none", "axis"),
    (["tensors", 0, "cuts"], [0, 8, 15, 22], "cuts"),
    (["tensors", 0, "cuts"], [0, 8, 22], "number of cuts"),
    (["tensors", 0, "sha256", "codes"], "0" * 64, "codes: checksum"),
    (["tensors", 0, "sha256", "more"], "0" * 64, "names in sha256"),
    (["tensors", 0, "spec", "distance"], "cosine", "spec of a rank"),
    (["tensors", 0, "spec", "stages"], [7, 7], "lengths"),
    (["tensors", 0, "owners"], [0] * 22, "owners"),
    (["tensors", 4, "bias"], False, "bias"),
    (["tensors", 9, "owners", 0], 0, "spec of a rank"),
    (["tensors", 10, "owners"], [1, 1, 2, 2, 0, 0], "checksum"),
    (["tensors", 10, "owners"], [1, 0, 0, 1, 2, 2], "not alike|checksum"),
]


@pytest.mark.parametrize(("path", "value", "message"), PARALLEL)
def test_refused_ranks(path: list[str | int], value: object, message: str) -> None:
    parallel, sets = load_parallel(VECTORS / "ranks")
    change(parallel, path, value)
    with pytest.raises(ValueError, match=message):
        read_parallel(parallel, sets)
