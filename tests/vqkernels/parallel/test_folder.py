"""Ranks on the disk: each its own container, the whole merged from all, and nothing mixed up."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import quantized_tensors
from vqkernels import container
from vqkernels.container.index import INDEX
from vqkernels.errors import ContainerError, TensorError, UnsupportedError, VqError
from vqkernels.formats import open_source
from vqkernels.parallel import (
    MAPPING,
    Slice,
    axis_of,
    folder,
    open_parallel,
    open_rank,
    save_parallel,
    split,
)
from vqkernels.source import TensorSource
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

Tensors = dict[str, QuantizedTensor]

# As VPTQ stores a layer: vectors along the outputs, outliers, columns permuted.
VPTQ = CodebookSpec(
    vector_length=8,
    vector_axis="out",
    stages=(16, 4),
    scale_axis="column",
    permuted=True,
    outlier_columns=5,
    outlier_entries=6,
    outlier_vector_length=4,
)


def some(seed: int = 0, k: int = 40) -> Tensors:
    """Two layers: q by row, o by column."""
    return {
        f"layers.{layer}.{name}": random_tensor(
            VPTQ, 32, k, seed=seed + layer, bias=name == "o_proj"
        )
        for layer in range(2)
        for name in ("q_proj", "o_proj")
    }


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert (one.spec, one.n, one.k) == (other.spec, other.n, other.k)
    assert list(one.parts) == list(other.parts)
    for part, value in one.parts.items():
        assert (value.dtype, value.shape) == (other.parts[part].dtype, other.parts[part].shape)
        flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (value, other.parts[part])]
        assert torch.equal(*flat), part


def assert_holds(source: TensorSource, tensors: Tensors) -> None:
    assert list(source) == list(tensors)
    for name, tensor in tensors.items():
        assert name in source
        outline = source.outline(name)
        assert (outline.spec, outline.n, outline.k) == (tensor.spec, tensor.n, tensor.k)
        assert outline.bias == (tensor.bias is not None)
        assert_same(source[name], tensor)


def contents(top: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


def homes(top: Path) -> list[Path]:
    return sorted(top.glob("ranks-*/rank-*"))


def index_of(top: Path, rank: int) -> Path:
    return homes(top)[rank] / INDEX


# ------------------------------------------------------------------------------------------------
# what is written


@settings(max_examples=8)
@given(
    st.lists(quantized_tensors(max_side=24, max_entries=40), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from(["row", "column"]),
    st.integers(1, 5000),
)
def test_any_tensors_come_back(
    tensors: list[QuantizedTensor], ranks: int, axis: Any, limit: int
) -> None:
    named = {}
    for number, tensor in enumerate(tensors):
        try:
            split(tensor, ranks, axis)
        except UnsupportedError:
            continue
        named[f"m.{number}"] = tensor
    if not named:
        return
    with tempfile.TemporaryDirectory() as top:
        save_parallel(top, named, ranks=ranks, axis_of=lambda _: axis, shard_bytes=limit)
        assert_holds(open_parallel(top), named)


def test_a_rank_is_an_ordinary_container(tmp_path: Path) -> None:
    tensors, made = some(), {"layers.1.q_proj": {"seed": 3}}
    save_parallel(
        tmp_path,
        tensors,
        ranks=3,
        shard_bytes=3000,
        provenance={"note": "ä"},
        made=made,
        usage=False,
    )
    assert [home.name for home in homes(tmp_path)] == [f"rank-{r}-of-3" for r in range(3)]
    slices: dict[str, list[Slice]] = {
        name: split(tensor, 3, axis_of(name)) for name, tensor in tensors.items()
    }
    assert {one[0].axis for one in slices.values()} == {"row", "column"}
    for rank, home in enumerate(homes(tmp_path)):
        source = open_rank(tmp_path, rank)
        assert list(source) == list(tensors)
        for name in tensors:
            assert_same(source.verify(name), slices[name][rank].tensor)
        info = container.describe(home)
        assert info.provenance["note"] == "ä"
        assert dict(info.tensors[2].made) == {"seed": 3}
        assert not info.tensors[0].usage
        assert len(info.extra["shards"]) > 1
    for path in (tmp_path / MAPPING, tmp_path):
        assert_holds(open_parallel(path), tensors)
        assert_holds(open_source(path), tensors)


def test_a_rank_touches_only_its_own_files(tmp_path: Path) -> None:
    save_parallel(tmp_path, some(), ranks=3)
    for rank in (0, 2):
        shutil.rmtree(homes(tmp_path)[1 if rank == 0 else 0])
        source = open_rank(tmp_path, rank)
        for name in source:
            source.verify(name)


def test_ranks_there_are_not(tmp_path: Path) -> None:
    save_parallel(tmp_path, some(), ranks=2)
    for rank in (2, -1):
        with pytest.raises(ContainerError, match=f"no rank {rank}; there are ranks 0 to 1"):
            open_rank(tmp_path, rank)


def test_the_folder_s_name_is_of_what_it_holds(tmp_path: Path) -> None:
    save_parallel(tmp_path, some(), ranks=2)
    content = json.loads(json.loads((tmp_path / MAPPING).read_text())["vqbench"])
    held = {"indexes": content["indexes"], "tensors": content["tensors"]}
    digest = hashlib.sha256(json.dumps(held, separators=(",", ":")).encode()).hexdigest()
    assert content["folder"] == f"ranks-{digest[:16]}" == homes(tmp_path)[0].parent.name


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_parallel(tmp_path / name, some(), ranks=2, shard_bytes=3000)
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "b")
    # over itself, where a file is damaged or lost
    index_of(tmp_path / "a", 0).unlink()
    save_parallel(tmp_path / "a", some(), ranks=2, shard_bytes=3000)
    assert before == contents(tmp_path / "a")


def test_one_set_over_another(tmp_path: Path) -> None:
    save_parallel(tmp_path, some(), ranks=2)
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "ranks-0123456789abcdef" / "rank-0-of-1").mkdir(parents=True)  # a killed writer's
    (tmp_path / f"{folder._TEMPORARY}0.tmp" / "rank-0-of-1").mkdir(parents=True)
    source = open_parallel(tmp_path)
    save_parallel(tmp_path, some(seed=9), ranks=4)
    assert_holds(open_parallel(tmp_path), some(seed=9))
    assert_holds(source, some())  # mapped, and readable as it was
    ranks = homes(tmp_path)[0].parent.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["config.json", MAPPING, ranks]
    )


# ------------------------------------------------------------------------------------------------
# what isn't written


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_what_was_there(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "set"
    if there:
        save_parallel(top, some(), ranks=2)
    before = contents(top) if there else {}
    good = some(seed=5)
    bad = good["layers.1.o_proj"]
    lost = bad.replace_parts(permutation=bad.parts["permutation"].clone().fill_(0))
    bad = bad.replace_parts(codes=bad.parts["codes"].clone().fill_(255))
    cases: list[tuple[Any, dict[str, Any], type[VqError], str]] = [
        ({}, {}, ContainerError, "no tensors"),
        ({**good, "layers.1.o_proj": bad}, {}, TensorError, "tensor 'layers.1.o_proj': codes"),
        ({"a.o_proj": lost}, {}, TensorError, "tensor 'a.o_proj': permutation names"),
        (good, {"ranks": 0}, ContainerError, "0 ranks; use 1"),
        (good, {"ranks": 9}, UnsupportedError, "tensor 'layers.0.q_proj': 32 outputs"),
        (good, {"provenance": {"a": 1}}, ContainerError, "than strings"),
        (good, {"provenance": {"a": "x" * (1 << 25)}}, ContainerError, "the description takes"),
        (good, {"made": {"x": {}}}, ContainerError, "made is of 'x'"),
        (good, {"shard_bytes": 0}, ContainerError, "shards of 0 bytes"),
    ]
    for tensors, options, kind, says in cases:
        with pytest.raises(kind, match=says) as caught:
            save_parallel(top, tensors, **{"ranks": 2, "shard_bytes": 1, **options})
        assert str(caught.value).startswith((f"{top}: ", f"{top}/rank-"))
        assert ".tmp" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert contents(top) == before if there else not top.exists()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_atomically", fail)
    for tensors in (good, some()):
        with pytest.raises(KeyboardInterrupt):
            save_parallel(top, tensors, ranks=2)
        assert contents(top) == before if there else not top.exists()


def test_a_mapping_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / MAPPING).write_text("{}")
    with pytest.raises(ContainerError) as caught:
        save_parallel(tmp_path, some(), ranks=2)
    assert str(caught.value).startswith(f"{tmp_path / MAPPING}: ")
    assert contents(tmp_path) == {MAPPING: b"{}"}


# ------------------------------------------------------------------------------------------------
# files that don't belong together


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("ranks") / "set"
    save_parallel(top, some(), ranks=3)
    return top


@pytest.fixture
def top(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "set"))


def refused(top: Path, file: Path, says: str, use: Callable[[Path], Any] = open_parallel) -> None:
    with pytest.raises(ContainerError, match=says) as caught:
        use(top)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_rank_that_is_missing(top: Path) -> None:
    home = homes(top)[1]
    shutil.rmtree(home)
    refused(top, home / INDEX, "is missing, but parallel.json wants it; copy")
    refused(
        top,
        home / INDEX,
        "is missing, but parallel.json wants it; copy",
        lambda top: open_rank(top, 1),
    )


def test_ranks_that_were_swapped(top: Path) -> None:
    one, other, _ = homes(top)
    one.rename(top / "x")
    other.rename(one)
    (top / "x").rename(other)
    refused(top, one / INDEX, "isn't the index that .* ranks were swapped")
    refused(top, other / INDEX, "ranks were swapped", lambda top: open_rank(top, 1))
    open_rank(top, 2)


def test_a_rank_of_another_model(top: Path, tmp_path: Path) -> None:
    save_parallel(tmp_path / "other", some(seed=50), ranks=3)
    home = homes(top)[2]
    shutil.rmtree(home)
    shutil.copytree(homes(tmp_path / "other")[2], home)
    refused(top, home / INDEX, "are of another model")


def edit(top: Path, change: Callable[[Any], Any]) -> None:
    """Change what parallel.json says, and give it its checksum again."""
    content = json.loads((top / MAPPING).read_text())
    described = json.loads(content["vqbench"])
    change(described)
    text = json.dumps(described)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (top / MAPPING).write_text(json.dumps({"vqbench": text, "vqbench_sha256": digest}))


def test_a_mapping_edited_to_the_same_is_good(top: Path) -> None:
    edit(top, lambda _: None)
    assert_holds(open_parallel(top), some())


# tensors are q, o, q, o: 0 is cut by row, 1 by column
def entry(number: int, **fields: Any) -> Callable[[Any], Any]:
    return lambda content: content["tensors"][number].update(fields)


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "newer": (lambda c: c.update(parallel_version=2), "parallel_version is 2, .* upgrade"),
    "a path": (lambda c: c.update(folder="../ranks"), "folder '../ranks' is no name"),
    "no folder": (lambda c: c.pop("folder"), "folder should be"),
    "no indexes": (lambda c: c.update(indexes=[]), "indexes should be 1 to"),
    "indexes of numbers": (lambda c: c.update(indexes=[1, 2, 3]), "indexes should be 1 to"),
    "no tensors": (lambda c: c.update(tensors=[]), "tensors are none"),
    "a tensor twice": (lambda c: c["tensors"].append(c["tensors"][0]), "the same name"),
    "a tensor of text": (lambda c: c["tensors"].append("x"), "something else than an object"),
    "no name": (lambda c: c["tensors"][0].pop("name"), "name should be"),
    "k too small": (entry(0, k=5), "'layers.0.q_proj': 5 outlier and uniform columns leave"),
    "a spec that can't be": (
        lambda c: c["tensors"][0]["spec"].update(stages=[]),
        "stages is empty",
    ),
    "another axis": (entry(0, axis="in"), "'layers.0.q_proj': axis 'in' is not"),
    "the other axis": (entry(0, axis="column"), "cuts don't share 40 features"),
    "cuts of text": (entry(0, cuts="x"), "cuts should be a JSON list"),
    "cuts of halves": (entry(0, cuts=[0, 8.5, 16, 32]), "cuts should be whole"),
    "cuts of true": (entry(0, cuts=[0, True, 16, 32]), "cuts should be whole"),
    "a cut less": (entry(0, cuts=[0, 8, 32]), "cuts don't share 32"),
    "cuts that fall": (entry(0, cuts=[0, 16, 8, 32]), "cuts don't share 32"),
    "no owners": (lambda c: c["tensors"][1].pop("owners"), "'layers.0.o_proj': owners should be"),
    "owners too few": (lambda c: c["tensors"][1]["owners"].pop(), "owners don't go with cuts"),
    "owners of one": (entry(1, owners=[0] * 40), "owners don't go with cuts"),
    "no checksums": (entry(1, sha256={}), "checksums don't go with"),
    "checksums of words": (
        lambda c: c["tensors"][1]["sha256"].update(codes="x"),
        "a checksum is no SHA-256",
    ),
}


@pytest.mark.parametrize(("change", "says"), EDITS.values(), ids=EDITS)
def test_an_edited_mapping(change: Callable[[Any], Any], says: str, top: Path) -> None:
    edit(top, change)
    refused(top, top / MAPPING, says)
    refused(top, top / MAPPING, says, lambda top: open_rank(top, 0))


RANK_EDITS: dict[str, tuple[Callable[[Any], Any], int, str]] = {
    "another digest": (lambda c: c["indexes"].__setitem__(1, "x"), 1, "isn't the index"),
    "indexes turned": (lambda c: c["indexes"].reverse(), 0, "isn't the index"),
    "a tensor less": (
        lambda c: c["tensors"].pop(),
        0,
        "tensor 'layers.1.o_proj': .* disagree about it",
    ),
    "another name": (entry(2, name="x"), 0, "tensor 'layers.1.q_proj': .* disagree"),
    "tensors turned": (lambda c: c["tensors"].reverse(), 0, "tensor .* disagree about it"),
    "other cuts": (
        entry(0, cuts=[0, 16, 24, 32]),
        0,
        "tensor 'layers.0.q_proj' is 8 x 40, but .* 16 x 40",
    ),
}


@pytest.mark.parametrize(("change", "rank", "says"), RANK_EDITS.values(), ids=RANK_EDITS)
def test_a_mapping_that_disagrees_with_a_rank(
    change: Callable[[Any], Any], rank: int, says: str, top: Path
) -> None:
    edit(top, change)
    refused(top, index_of(top, rank), says)


def turned_owners(content: Any) -> None:
    owners = content["tensors"][1]["owners"]
    one, other = owners.index(0, 5), owners.index(1, 5)
    owners[one], owners[other] = 1, 0


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (turned_owners, "layers.0.o_proj", "doesn't match its checksum"),
        (
            lambda c: c["tensors"][0]["sha256"].update(codes="0" * 64),
            "layers.0.q_proj",
            "merged codes doesn't match its checksum",
        ),
        (
            lambda c: c["tensors"][0]["spec"].update(side_dtype="float32"),
            "layers.0.q_proj",
            "another format",
        ),
        (entry(0, bias=True), "layers.0.q_proj", "checksums don't go with"),
    ],
)
def test_what_a_merge_shows(change: Callable[[Any], Any], name: str, says: str, top: Path) -> None:
    edit(top, change)

    with pytest.raises(VqError, match=f"tensor '{name}': .*{says}") as caught:
        open_parallel(top)[name]
    assert str(caught.value).startswith(f"{top / MAPPING}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("vqbench_sha256"),
        lambda content: content.update(vqbench=content["vqbench"].replace("q_proj", "k_proj", 1)),
        lambda content: content.update(vqbench=1),
        lambda content: content.clear(),
    ],
)
def test_a_mapping_without_its_checksum(change: Callable[[Any], Any], top: Path) -> None:
    content = json.loads((top / MAPPING).read_text())
    change(content)
    (top / MAPPING).write_text(json.dumps(content))
    refused(top, top / MAPPING, "doesn't match its checksum")


def test_verifying_looks_at_what_each_rank_decodes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_parallel(tmp_path, some(), ranks=2)
    source = open_parallel(tmp_path)
    name = next(iter(source))
    assert torch.equal(source.verify(name).decode(), source[name].decode())
    monkeypatch.setattr("vqkernels.container.read.decoded_sha256", lambda *_: "0" * 64)
    assert source[name].n == 32
    with pytest.raises(ContainerError, match="the dequantised values don't match"):
        source.verify(name)
