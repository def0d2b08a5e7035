"""The test vectors of docs/container-format.md: `python -m tests.docs.vectors FOLDER` writes them.

Each field of a format has a matrix that needs it, small and ragged: neither side is a multiple of
anything. `expected.safetensors` has what they decode to, in float64. `version-1.safetensors`
has to be there: vqbench 0.1.0 wrote it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.format_text import changed_fields
from vqkernels import container
from vqkernels.parallel import save_parallel
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

Tensors = dict[str, QuantizedTensor]

ORIGIN = {
    "creator": "vqbench test vectors",
    "created": "2026-11-22",
    "author": "the authors of vqbench",
    "note": "random codes and codebooks, for readers to be tried on",
}
MADE = {"method": "random", "seed": 1, "clip": [-4.0, 4.5], "clip_percentiles": [0.1, 99.9]}


def tensor(n: int, k: int, *, bias: bool = False, **fields: object) -> QuantizedTensor:
    spec = CodebookSpec.from_dict({"vector_length": 4, "stages": [7], **fields})
    return random_tensor(spec, n, k, seed=n + k, bias=bias, fit=False)


def packed() -> Tensors:
    """A matrix a field of the format."""
    return {
        "plain": tensor(5, 16),
        "out": tensor(10, 7, vector_axis="out"),
        "ragged": tensor(9, 11, stages=[9, 3], codebook_dtype="bfloat16", bias=True),
        "wide codes": tensor(
            6, 13, stages=[5, 700], code_bits=[16, 10], vector_length=3, method="rq"
        ),
        "by column": tensor(7, 18, stages=[6, 2], traversal="column"),
        "out by column": tensor(11, 6, vector_axis="out", traversal="column"),
        "stride/in": tensor(6, 22, stride=2, vector_length=3),
        "stride/out": tensor(25, 5, stride=3, vector_length=2, vector_axis="out"),
        "subspaces/in": tensor(8, 30, subspaces=3, stages=[5]),
        "subspaces/out": tensor(30, 8, subspaces=2, stages=[5], vector_axis="out"),
        "subspaces and stride": tensor(8, 50, subspaces=3, stages=[5], stride=2, vector_length=3),
        "rows in groups": tensor(10, 12, group_axis="row", group_size=4, stages=[3]),
        "columns in groups": tensor(9, 20, group_axis="column", group_size=8, stages=[6]),
        "rows in groups/out": tensor(
            21, 6, group_axis="row", group_size=8, vector_axis="out", stages=[6]
        ),
        "columns in groups/out": tensor(
            13, 9, group_axis="column", group_size=4, vector_axis="out", stages=[3], subspaces=2
        ),
        "columns in groups, stride": tensor(
            7, 26, group_axis="column", group_size=12, stride=3, vector_length=2, stages=[5]
        ),
        "int8": tensor(8, 12, stages=[6, 4], codebook_dtype="int8", group_axis="row", group_size=3),
        "coefficients": tensor(6, 9, stages=[6, 4, 2], coefficients=[1.0, -0.3, 0.1]),
        "one entry": tensor(3, 8, stages=[1, 5]),
        "scale and zero a row": tensor(7, 10, scale_axis="row", zero_axis="row"),
        "scale and zero a column": tensor(7, 10, scale_axis="column", zero_axis="column"),
        "scale and zero": tensor(
            7, 10, scale_axis="tensor", zero_axis="tensor", side_dtype="bfloat16"
        ),
        "permuted": tensor(7, 17, permuted=True, scale_axis="column"),
        "rotated": tensor(6, 16, rotation_size=4, side_dtype="float32"),
        "outliers": tensor(7, 15, outlier_columns=2, permuted=True),
        "outliers of a codebook": tensor(
            14,
            9,
            vector_axis="out",
            outlier_columns=3,
            outlier_entries=5,
            outlier_vector_length=4,
            permuted=True,
            method="vptq",
        ),
        "uniform": tensor(9, 14, uniform_columns=3, uniform_bits=5, outlier_columns=1),
        "two rows a vector": tensor(
            9, 14, vector_width=2, vector_length=3, stages=[6, 4], scale_axis="row"
        ),
        "rows in groups of two": tensor(
            10, 12, vector_width=2, group_axis="row", group_size=4, stages=[3]
        ),
        "many outliers' entries": tensor(
            300, 3, vector_axis="out", outlier_columns=1, outlier_entries=290,
            outlier_vector_length=1, codebook_dtype="float32",
        ),
        "columns in groups, sides": tensor(
            9, 23, group_axis="column", group_size=8, stages=[4], outlier_columns=2,
            uniform_columns=1, permuted=True,
        ),
        "columns in groups, sides/out": tensor(
            9, 14, vector_axis="out", group_axis="column", group_size=4, stages=[4],
            outlier_columns=3, permuted=True, side_dtype="bfloat16",
        ),
        "strides by column": tensor(10, 29, stride=2, vector_length=3, traversal="column"),
        "two rows a vector, strides by column": tensor(
            11, 27, vector_width=2, stride=3, vector_length=2, subspaces=2, stages=[3, 2],
            traversal="column", method="additive",
        ),
        "two rows a vector, columns in groups": tensor(
            7, 26, vector_width=3, group_axis="column", group_size=8, stages=[3],
        ),
        "rotated, permuted, with sides": tensor(
            7, 15, rotation_size=6, outlier_columns=1, uniform_columns=2, permuted=True,
            method="opq", subspaces=3, vector_length=2, stages=[4],
        ),
        "int8 in subspaces": tensor(
            8, 24, stages=[4, 3], codebook_dtype="int8", subspaces=3, coefficients=[0.7, -1.3],
            method="pq", distance="cosine",
        ),
        "scale a row, zero a column": tensor(
            7, 10, scale_axis="row", zero_axis="column", side_dtype="float32"
        ),
        "scale a column, zero": tensor(7, 10, scale_axis="column", zero_axis="tensor"),
        "outliers of a codebook, uniform": tensor(
            10, 12, outlier_columns=2, outlier_entries=3, outlier_vector_length=3,
            uniform_columns=3, uniform_bits=2, side_dtype="float32",
        ),
        "é/weight": tensor(4, 8),
    }  # fmt: skip


def skewed(n: int, k: int, **fields: object) -> QuantizedTensor:
    """Most codes are 0: worth coding."""
    made = tensor(n, k, **fields)
    codes = made.parts["codes"]
    drawn = torch.rand(codes.shape, generator=torch.Generator().manual_seed(n * k))
    few = codes.to(torch.int32) * (drawn > 0.6)
    return made.replace_parts(codes=few.to(codes.dtype))


def coded() -> Tensors:
    """Codes as ANS streams, some beside packed ones."""
    shapes: dict[str, tuple[int, int, dict[str, object]]] = {
        "one stage": (48, 200, {"stages": [11]}),
        "two stages": (48, 201, {"stages": [16, 200]}),
        "by column": (240, 97, {"stages": [16], "traversal": "column", "bias": True}),
        "out": (97, 240, {"stages": [16], "vector_axis": "out", "group_axis": "row",
                         "group_size": 32}),
        "two stages by column": (90, 90, {"stages": [16, 30], "traversal": "column"}),
        "two entries": (120, 200, {"stages": [2], "vector_length": 1}),
    }  # fmt: skip
    made = {name: skewed(n, k, **fields) for name, (n, k, fields) in shapes.items()}
    # uniform codes of 4 entries gain nothing: the second stage stays packed
    mixed = tensor(48, 320, stages=[16, 4])
    codes = mixed.parts["codes"].clone()
    codes[..., 0] = skewed(48, 320, stages=[16, 4]).parts["codes"][..., 0]
    made["one coded, one packed"] = mixed.replace_parts(codes=codes)
    mixed = tensor(48, 320, stages=[4, 16], traversal="column")
    codes = mixed.parts["codes"].clone()
    codes[..., 1] = made["one coded, one packed"].parts["codes"][..., 0]
    made["one packed, one coded"] = mixed.replace_parts(codes=codes)
    return made


def sharded() -> Tensors:
    return {
        "first": tensor(12, 24),
        "second": tensor(12, 24, vector_axis="out", bias=True),
        "third": tensor(16, 32, stages=[6, 4], scale_axis="row"),
        "fourth": tensor(5, 9, permuted=True),
    }


def ranked() -> Tensors:
    """Names say how they are cut: q_proj and such by row, o_proj and down_proj by column."""
    vptq: dict[str, object] = {"vector_axis": "out", "permuted": True, "scale_axis": "column"}
    coded = {"outlier_columns": 4, "outlier_entries": 6, "outlier_vector_length": 2}
    return {
        "0.q_proj": tensor(22, 12, vector_axis="out", scale_axis="row", bias=True),
        "1.q_proj": tensor(
            20, 13, group_axis="row", group_size=4, stages=[3, 300], permuted=True,
            outlier_columns=1, uniform_columns=2, zero_axis="row",
        ),
        "2.q_proj": tensor(25, 7, vector_axis="out", stride=2, vector_length=2, **coded),
        "3.q_proj": tensor(21, 16, vector_width=2, traversal="column"),
        "0.o_proj": tensor(8, 40, stages=[5, 3], uniform_columns=3, zero_axis="column", bias=True),
        "1.o_proj": tensor(6, 50, stride=2, subspaces=2, outlier_columns=2, scale_axis="tensor"),
        "2.o_proj": tensor(5, 48, group_axis="column", group_size=8, stages=[3], rotation_size=4),
        "3.o_proj": tensor(9, 36, vector_width=2, vector_length=3, traversal="column"),
        "0.down_proj": tensor(9, 31, bias=True, **vptq, **coded),
        "1.down_proj": tensor(7, 30, outlier_columns=1, **vptq),
        # groups that a permutation leaves together can be cut between
        "2.down_proj": tensor(
            5, 6, group_axis="column", group_size=2, stages=[4], **vptq
        ).replace_parts(permutation=torch.tensor([3, 2, 0, 1, 5, 4], dtype=torch.uint16)),
    }  # fmt: skip


def shorten(path: Path) -> None:
    """Drop what is as a reader assumes it from the descriptions in `path`; add unknown names."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    description = json.loads(header["__metadata__"]["vqbench"])
    assert not any("vector_width" in one["spec"] for one in description["tensors"])
    for one in description["tensors"]:
        spec = CodebookSpec.from_dict(one["spec"])
        one["spec"] = {
            "vector_length": spec.vector_length, "stages": spec.stages, **changed_fields(spec)
        }  # fmt: skip
        one["colour"] = ["unknown", 1]
    description |= {"spec_version": 1, "weather": {"unknown": None}}
    text = json.dumps(description)
    digest = hashlib.sha256(text.encode()).hexdigest()
    header["__metadata__"] = {"vqbench": text, "vqbench_sha256": digest}
    head = json.dumps(header, ensure_ascii=False).encode()
    head += b" " * (-(8 + len(head)) % 64)
    path.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + size :])


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = dict.fromkeys(("plain", "out"), MADE)
    container.save(folder / "packed.safetensors", packed(), provenance=ORIGIN, made=made)
    container.save(folder / "ans.safetensors", coded(), provenance=ORIGIN, codes="ans", usage=False)
    two = {"one coded, one packed": coded()["one coded, one packed"]}
    container.save(folder / "ans-usage.safetensors", two, provenance=ORIGIN, codes="ans")
    container.save_shards(folder / "shards", sharded(), shard_bytes=400, provenance=ORIGIN)
    save_parallel(folder / "ranks", ranked(), ranks=3, shard_bytes=9000, provenance=ORIGIN)
    few = {name: one for name, one in packed().items() if one.spec.vector_width == 1}
    container.save(folder / "few-words.safetensors", few, provenance=ORIGIN)
    shorten(folder / "few-words.safetensors")
    first = container.load(folder / "version-1.safetensors")
    # of the others decoded_sha256 is enough: nothing follows the sum there
    sets = {"": packed(), "shards/": sharded(), "ranks/": ranked(), "version-1/": first}
    expected = {
        f"{prefix}{name}": one.decode()
        for prefix, tensors in sets.items()
        for name, one in tensors.items()
    }
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
