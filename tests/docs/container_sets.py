"""A reader of the container format, written from docs/container-format.md alone: section 7."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.docs.container_format import (
    DEFAULTS,
    Array,
    Json,
    Matrix,
    check_entry,
    checked,
    implied,
    need,
    read_container,
    read_tensors,
    sha,
    sizes,
)

Folder = tuple[Json, dict[str, bytes]]  # an index and its files


def load_set(folder: Path) -> Folder:
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    names = set(index["weight_map"].values())
    need(all(Path(name).name == name for name in names), "files")
    return index, {name: (folder / name).read_bytes() for name in names}


def load_parallel(folder: Path) -> tuple[Json, list[Folder]]:
    parallel = json.loads((folder / "parallel.json").read_text("utf-8"))
    inner = checked(parallel)
    count = len(inner["indexes"])
    names = [f"rank-{rank}-of-{count}" for rank in range(count)]
    return parallel, [load_set(folder / inner["folder"] / name) for name in names]


def set_id(shards: list[bytes]) -> str:
    """The name that a writer gives to a set."""
    checksums = []
    for data in shards:
        description, _, text = read_tensors(data)
        old, new = description["shard"], description["shard"] | {"set": "0" * 64, "count": 99999}
        before, after = (json.dumps(x, separators=(",", ":")) for x in (old, new))
        need(text.count(before) == 1, "shard as text")
        checksums.append(sha(text.replace(before, after)))
    return sha("".join(checksums))


def read_shard(index: Json, at: int, data: bytes) -> dict[str, Matrix]:
    """A shard against its index."""
    inner = checked(index["metadata"])
    matrices, (description, tensors, text) = read_container(data), read_tensors(data)
    shard = {"set": inner["set"], "number": at + 1, "count": len(inner["shards"])}
    need(description["shard"] == shard, "set, number, count")
    file = f"model-{inner['set'][:16]}-{at + 1:05}-of-{shard['count']:05}.safetensors"
    said = {"file": file, "bytes": len(data), "sha256": sha(text), "names": list(matrices)}
    need(inner["shards"][at] == said, "what the index says of the shard")
    mine = {key for key, name in index["weight_map"].items() if name == file}
    need(mine == set(tensors), "weight_map")
    return matrices


def read_set(index: Json, files: dict[str, bytes]) -> dict[str, Matrix]:
    inner = checked(index["metadata"])
    need(inner["index_version"] == 1, "index_version")
    names = [shard["file"] for shard in inner["shards"]]
    need(set(files) >= set(names) == set(index["weight_map"].values()), "files")
    shards = [read_shard(index, at, files[name]) for at, name in enumerate(names)]
    matrices = {name: m for shard in shards for name, m in shard.items()}
    total = sum(numbers.nbytes for m in matrices.values() for _, numbers in m.parts.values())
    need(total == index["metadata"]["total_size"], "total_size")
    return matrices


def owners(whole: Json) -> Array:
    """Of each stored column of a whole that is cut by column, the rank that has it."""
    cuts = whole["cuts"]
    return np.array(whole.get("owners", np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))))


def check_rank(whole: Json, rank: int, m: Matrix) -> None:
    """A rank's sizes and format against those of the whole."""
    by_row, spec = whole["axis"] == "row", DEFAULTS | whole["spec"]
    share = whole["cuts"][rank + 1] - whole["cuts"][rank]
    need((m.n, m.k) == ((share, whole["k"]) if by_row else (whole["n"], share)), "cuts")
    need(m.bias == (whole["bias"] and (by_row or rank == 0)), "bias")
    need(("owners" in whole) == (spec["permuted"] and not by_row), "owners")
    if not by_row:
        mine, first = owners(whole) == rank, spec["outlier_columns"]
        spec["uniform_columns"] = mine[first : first + spec["uniform_columns"]].sum()
        spec["outlier_columns"] = mine[:first].sum()
        if not spec["outlier_columns"]:
            spec["outlier_entries"] = spec["outlier_vector_length"] = 0
    need(DEFAULTS | m.entry["spec"] == spec, "spec of a rank")


def owned(whole: Json, m: Matrix) -> dict[str, Array]:
    """Of the parts that are cut by stored column: the rank that has each column (or cell)."""
    outliers, uniform, main = np.split(owners(whole), [m.outlier_columns, m.k - m.main])
    a = np.arange(m.C)
    first = np.minimum(a // m.stride * m.block + a % m.stride, m.main - 1) if m.inwards else a
    return {
        "codes": main[first],
        "permutation": owners(whole),
        **dict.fromkeys(("outliers", "outlier_codes"), outliers),
        **dict.fromkeys(("uniform_codes", "uniform_scale", "uniform_zero"), uniform),
    }


def join_sets(whole: Json, m: Matrix, pieces: list[Array], ranks: list[Matrix]) -> Array:
    """The codebooks of groups of columns, each from the ranks that have columns of its group."""
    group = np.arange(m.main) // m.group_size
    main = owners(whole)[m.k - m.main :]
    sets: dict[int, Array] = {}
    for rank, (piece, x) in enumerate(zip(pieces, ranks, strict=True)):
        mine = group[main == rank].tolist()
        for at, its in enumerate(mine):
            book = piece[at // x.group_size]
            need(np.array_equal(book, sets.setdefault(its, book)), "codebooks: not alike")
    return np.stack([sets[at] for at in range(m.sets)])


def join(whole: Json, m: Matrix, part: str, ranks: list[Matrix]) -> Array:
    """A part of the whole from the ranks', codes as the grid."""
    axis, wide = whole["axis"], max(m.stages) > 256
    pieces: list[Array] = [x.parts[part][1] for x in ranks if part in x.parts]
    if part == "codes":
        pieces = [x.codes.astype("<u2" if wide else "<u1") for x in ranks]
    if part == "permutation" and axis == "column":
        cuts = zip(pieces, whole["cuts"][:-1], strict=True)
        pieces = [piece + piece.dtype.type(cut) for piece, cut in cuts]
    of = owned(whole, m) if axis == "column" else {}
    rows = {"codes", "outliers", "outlier_codes", "uniform_codes", "bias"}
    sided = (
        m.group_axis if part.startswith("codebook") else getattr(m, f"{part}_axis", "")
    ) == axis
    if part in of:
        along = min(1, pieces[0].ndim - 1)
        back = np.argsort(np.argsort(of[part], kind="stable"))
        joined: Array = np.concatenate(pieces, along)
        return joined[back] if along == 0 else joined[:, back]
    if part.startswith("codebook") and sided and axis == "column":
        return join_sets(whole, m, pieces, ranks)
    if sided or (axis == "row" and part in rows):
        return np.concatenate(pieces)
    need(len({piece.tobytes() for piece in pieces}) == 1, f"{part}: not alike in the ranks")
    return pieces[0]


def read_whole(whole: Json, ranks: list[Matrix]) -> Matrix:
    """A matrix of `parallel.json`, put together from its ranks."""
    m, cuts = sizes(whole), whole["cuts"]
    need(whole["axis"] in {"row", "column"}, "axis")
    ends = [0, m.n if whole["axis"] == "row" else m.k]
    need(len(cuts) == len(ranks) + 1 and [cuts[0], cuts[-1]] == ends, "number of cuts")
    check_entry(m)
    for rank, x in enumerate(ranks):
        check_rank(whole, rank, x)
    need(set(whole["sha256"]) == set(implied(m)), "names in sha256")
    m.parts = {}
    for part in implied(m):
        dtype = next((x.parts[part][0] for x in ranks if part in x.parts), "")
        m.parts[part] = dtype, (numbers := join(whole, m, part, ranks))
        need(sha(numbers.tobytes()) == whole["sha256"][part], f"{part}: checksum of the whole's")
    m.codes = m.parts["codes"][1]
    return m


def read_parallel(parallel: Json, sets: list[Folder]) -> list[tuple[Matrix, list[Matrix]]]:
    inner = checked(parallel)
    need(inner["parallel_version"] == 1, "parallel_version")
    indexes = [index["metadata"]["vqbench_sha256"] for index, _ in sets]
    need(inner["indexes"] == indexes, "indexes")
    ranks = [read_set(*rank) for rank in sets]
    names = [whole["name"] for whole in inner["tensors"]]
    need(all(list(rank) == names for rank in ranks), "names")
    pieces = [[rank[name] for rank in ranks] for name in names]
    return [(read_whole(*pair), pair[1]) for pair in zip(inner["tensors"], pieces, strict=True)]
