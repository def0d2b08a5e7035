"""Several files as one container: what is written comes back, and files that disagree don't."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.strategies import quantized_tensors
from vqkernels import container
from vqkernels.atomic import locked
from vqkernels.container import shards
from vqkernels.container.index import INDEX, is_shard_name
from vqkernels.errors import ContainerError, TensorError, VqError
from vqkernels.presets import PRESETS
from vqkernels.source import TensorSource
from vqkernels.tensor import QuantizedTensor, random_tensor

Tensors = dict[str, QuantizedTensor]


def some(count: int = 5, seed: int = 0) -> Tensors:
    return {
        f"layers.{number}.é": random_tensor(
            PRESETS["toy-16-4"], 16, 16 + 8 * number, seed=seed + number, bias=number % 2 == 0
        )
        for number in range(count)
    }


def assert_holds(source: container.Container, tensors: Tensors) -> None:
    assert list(source) == list(tensors)
    for name, tensor in tensors.items():
        found = source.verify(name)
        assert (found.spec, found.n, found.k) == (tensor.spec, tensor.n, tensor.k)
        assert list(found.parts) == list(tensor.parts)
        for part, value in tensor.parts.items():
            assert torch.equal(found.parts[part], value), (name, part)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_shard_name(path.name))


# ------------------------------------------------------------------------------------------------
# what is written


@settings(max_examples=8)
@given(
    st.lists(quantized_tensors(max_side=16, max_entries=40), min_size=1, max_size=5),
    st.integers(1, 6000),
    st.sampled_from(["packed", "ans"]),
)
def test_any_tensors_come_back(tensors: list[QuantizedTensor], limit: int, codes: Any) -> None:
    named = {f"m.{number}": tensor for number, tensor in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder:
        container.save_shards(folder, named, shard_bytes=limit, codes=codes)
        assert_holds(container.open_container(folder), named)
        for path in shard_files(Path(folder)):
            sizes = [tensor.stored_bytes for tensor in container.describe(path).tensors]
            assert len(sizes) == 1 or sum(sizes) <= limit


def test_a_set_says_what_it_is(tmp_path: Path) -> None:
    tensors, made = some(), {"layers.1.é": {"seed": 3}}
    container.save_shards(
        tmp_path, tensors, shard_bytes=1000, provenance={"note": "ä"}, made=made, usage=False
    )
    files = shard_files(tmp_path)
    assert len(files) == 3
    info = container.describe(tmp_path)
    assert [tensor.name for tensor in info.tensors] == list(tensors)
    assert info.provenance["note"] == "ä"
    assert dict(info.tensors[1].made) == {"seed": 3}
    assert not info.tensors[0].usage
    assert info.extra["shards"] == [path.name for path in files]
    index = json.loads((tmp_path / INDEX).read_text("utf-8"))
    # as transformers and accelerate read it: every key, and the bytes of all of them
    found, size = {}, 0
    for path in files:
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if "/" in key]  # noqa: SIM118
            size += sum(file.get_tensor(key).nbytes for key in keys)
        found |= dict.fromkeys(keys, path.name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == size
    assert index["metadata"]["vqbench_sha256"] == info.digest
    described = json.loads(index["metadata"]["vqbench"])
    for number, (entry, path) in enumerate(zip(described["shards"], files, strict=True), start=1):
        with safe_open(path, "pt") as file:
            header = file.metadata()
        assert entry["file"] == path.name
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == header["vqbench_sha256"]
        label = {"set": described["set"], "number": number, "count": 3}
        assert json.loads(header["vqbench"])["shard"] == label
        assert container.describe(path).extra == {"shard": label}


def test_the_set_s_id_is_of_what_it_holds(tmp_path: Path) -> None:
    """As `index` says, from the files alone."""
    container.save_shards(tmp_path, some(), shard_bytes=1000)
    described = json.loads(json.loads((tmp_path / INDEX).read_text())["metadata"]["vqbench"])
    digests = ""
    for path in shard_files(tmp_path):
        with safe_open(path, "pt") as file:
            text = json.loads(file.metadata()["vqbench"])
        text["shard"] |= {"set": "0" * 64, "count": 99999}
        digests += hashlib.sha256(json.dumps(text, separators=(",", ":")).encode()).hexdigest()
    assert hashlib.sha256(digests.encode()).hexdigest() == described["set"]


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        container.save_shards(tmp_path / folder, some(), shard_bytes=1000, codes="ans")
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "b")
    container.save_shards(tmp_path / "a", some(), shard_bytes=1000, codes="ans")
    assert before == contents(tmp_path / "a")


def test_any_way_to_name_a_set(tmp_path: Path) -> None:
    container.save_shards(tmp_path / "set", some(), shard_bytes=1)
    for path in (tmp_path / "set", str(tmp_path / "set"), tmp_path / "set" / INDEX):
        assert_holds(container.open_container(path), some())
        assert list(container.load(path, names=["layers.2.é"])) == ["layers.2.é"]
        assert len(container.describe(path).tensors) == 5
    source = container.open_container(tmp_path / "set")
    assert source.outline("layers.3.é").k == 40
    assert source.usage("layers.3.é")[0].sum() == 2 * 40
    with pytest.raises(KeyError):
        source["layers.3"]


def test_one_shard_alone_is_not_a_container(tmp_path: Path) -> None:
    container.save_shards(tmp_path, some(), shard_bytes=1000)
    for path in shard_files(tmp_path):
        with pytest.raises(ContainerError, match=f"one shard of several; open {INDEX}") as caught:
            container.open_container(path)
        assert str(caught.value).startswith(f"{path}: ")
        with pytest.raises(ContainerError, match="one shard"):
            container.load(path)


class Lazy(TensorSource):
    """Counts lookups, and how many of the matrices it gave are still held."""

    def __init__(self, count: int) -> None:
        self.looked_up: list[str] = []
        self.most = 0
        self._names = [str(number) for number in range(count)]
        self._alive: list[Any] = []

    def __getitem__(self, name: str) -> QuantizedTensor:
        self.looked_up.append(name)
        tensor = random_tensor(PRESETS["toy-16-4"], 16, 16, seed=int(name))
        self._alive.append(weakref.ref(tensor.parts["codebook_0"].untyped_storage()))
        self.most = max(self.most, sum(one() is not None for one in self._alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def outline(self, name: str) -> Any:
        raise NotImplementedError


def test_a_source_is_read_once_and_a_shard_at_a_time(tmp_path: Path) -> None:
    source = Lazy(30)
    size = container_bytes(source["0"])
    source.looked_up.clear()
    container.save_shards(tmp_path, source, shard_bytes=3 * size)
    assert source.looked_up == list(source)
    assert len(shard_files(tmp_path)) == 10
    assert source.most <= 5  # a shard, the next matrix, and the one that is being prepared


def container_bytes(tensor: QuantizedTensor) -> int:
    with tempfile.TemporaryDirectory() as folder:
        container.save(Path(folder, "x"), {"x": tensor})
        return container.describe(Path(folder, "x")).tensors[0].stored_bytes


# ------------------------------------------------------------------------------------------------
# what isn't written


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_what_was_there(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    if there:
        container.save_shards(folder, some(3), shard_bytes=1000)
    before = contents(folder) if there else {}
    good = some(seed=7)
    bad = good["layers.4.é"]
    bad = bad.replace_parts(codes=bad.parts["codes"].clone().fill_(255))
    long = {"note": "x" * (1 << 25)}
    cases: list[tuple[Any, dict[str, Any], type[VqError], str]] = [
        ({}, {}, ContainerError, "no tensors"),
        ({**good, "layers.4.é": bad}, {}, TensorError, "tensor 'layers.4.é': codes"),
        ({**good, "a\nb": good["layers.0.é"]}, {}, ContainerError, "can't name a tensor"),
        (good, {"provenance": {"a": 1}}, ContainerError, "than strings"),
        (good, {"provenance": long}, ContainerError, "the description takes"),
        (good, {"made": {"x": {}}}, ContainerError, "made is of 'x'"),
        (good, {"shard_bytes": 0}, ContainerError, "shards of 0 bytes"),
    ]
    for tensors, options, kind, says in cases:
        with pytest.raises(kind, match=says) as caught:
            container.save_shards(folder, tensors, **{"shard_bytes": 1, **options})
        assert str(caught.value).startswith(f"{folder}: ")
        assert "\n" not in str(caught.value)
        assert contents(folder) == before if there else not folder.exists()


def test_an_empty_folder_stays(tmp_path: Path) -> None:
    with pytest.raises(ContainerError):
        container.save_shards(tmp_path, {}, shard_bytes=1)
    assert left(tmp_path) == []
    assert tmp_path.exists()


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container.save_shards(tmp_path, some(3), shard_bytes=1000)
    before = contents(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    room = iter([10**9, 10**9, 100])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(room)))
    with pytest.raises(
        ContainerError, match=r"needs .* bytes, but its disk has 100 left"
    ) as caught:
        container.save_shards(tmp_path, some(5), shard_bytes=1)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, says in (
        (tmp_path / "a" / "b", "make the folder first"),
        (tmp_path / "file", "File exists"),
    ):
        with pytest.raises(ContainerError, match=says) as caught:
            container.save_shards(folder, some(), shard_bytes=1)
        assert str(caught.value).startswith(f"{folder}: ")


@pytest.mark.parametrize("text", ["{}", '{"metadata": {}, "weight_map": {}}', "no JSON"])
def test_an_index_of_somebody_else_is_not_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ContainerError) as caught:
        container.save_shards(tmp_path, some(), shard_bytes=1)
    assert str(caught.value).startswith(f"{tmp_path / INDEX}: ")
    assert contents(tmp_path) == {INDEX: text.encode()}


def test_a_set_over_another_one(tmp_path: Path) -> None:
    container.save_shards(tmp_path, some(5), shard_bytes=1000)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"somebody else's")
    (tmp_path / "config.json").write_bytes(b"{}")
    # what killed writers left
    (tmp_path / f"model-{'0' * 16}-00001-of-00001.safetensors").touch()
    (tmp_path / f"{shards.TEMPORARY}0.tmp").touch()
    source = container.open_container(tmp_path)
    container.save_shards(tmp_path, some(2, seed=9), shard_bytes=1)
    assert_holds(container.open_container(tmp_path), some(2, seed=9))
    assert_holds(source, some(5))  # mapped, and readable as it was
    names = [INDEX, "config.json", "model-00001-of-00002.safetensors"]
    assert left(tmp_path) == sorted([*names, *(path.name for path in shard_files(tmp_path))])
    assert len(shard_files(tmp_path)) == 2


def test_a_writer_that_fails_at_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container.save_shards(tmp_path, some(3), shard_bytes=1000)
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_atomically", fail)
    for tensors in (some(2), some(3)):  # another set, and the same
        with pytest.raises(KeyboardInterrupt):
            container.save_shards(tmp_path, tensors, shard_bytes=1000)
        assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------
# an index and shards that disagree


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    container.save_shards(folder, some(), shard_bytes=1000)
    assert len(shard_files(folder)) == 3
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "set"))


def refused(folder: Path, file: str, says: str) -> None:
    for use in (container.open_container, container.load, container.describe):
        with pytest.raises(ContainerError, match=says) as caught:
            use(folder)
        assert str(caught.value).startswith(f"{folder / file}: ")
        assert "\n" not in str(caught.value)


def test_a_shard_that_is_missing(folder: Path) -> None:
    path = shard_files(folder)[1]
    path.unlink()
    refused(folder, path.name, "is missing, with tensor 'layers.2.é' and 1 more, but .*; copy")


def test_a_shard_that_is_truncated_or_longer(folder: Path) -> None:
    path = shard_files(folder)[1]
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", b""):
        path.write_bytes(wrong)
        refused(folder, path.name, "bytes long, but .* says")


def test_shards_that_were_swapped(folder: Path) -> None:
    tensors = some(4, seed=3)
    tensors["layers.1.é"] = tensors["layers.0.é"]  # shards of one size
    container.save_shards(folder, tensors, shard_bytes=1)
    one, other = shard_files(folder)[:2]
    assert one.stat().st_size == other.stat().st_size
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    refused(folder, one.name, "says of itself shard 2 of 4.* wants shard 1 of 4.*swapped")


def test_a_shard_of_another_model(folder: Path, tmp_path: Path) -> None:
    container.save_shards(tmp_path / "other", some(seed=100), shard_bytes=1000)
    one, other = shard_files(folder)[2], shard_files(tmp_path / "other")[2]
    assert one.stat().st_size == other.stat().st_size
    shutil.copy(other, one)
    refused(folder, one.name, "says of itself shard 3 of 3, set .*another model")
    # and a container that is no shard
    container.save(one, {"x": some()["layers.0.é"]})
    edit_index(folder, lambda c: c["shards"][2].update(bytes=one.stat().st_size))
    refused(folder, one.name, "says of itself no shard")


def edit_index(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the index's description, and give it its checksum again."""
    content = json.loads((folder / INDEX).read_text("utf-8"))
    described = json.loads(content["metadata"]["vqbench"])
    change(described)
    text = json.dumps(described)
    digest = hashlib.sha256(text.encode()).hexdigest()
    content["metadata"] |= {"vqbench": text, "vqbench_sha256": digest}
    (folder / INDEX).write_text(json.dumps(content), "utf-8")


def test_an_index_edited_to_the_same_is_good(folder: Path) -> None:
    edit_index(folder, lambda _: None)
    assert_holds(container.open_container(folder), some())


EDITS: dict[str, tuple[Callable[[Any], Any], str | int, str]] = {
    "newer": (lambda c: c.update(index_version=2), INDEX, "index_version is 2, .*; upgrade"),
    "no version": (lambda c: c.pop("index_version"), INDEX, "index_version should be"),
    "no set": (lambda c: c.pop("set"), INDEX, "set should be"),
    "set of words": (lambda c: c.update(set="abc"), INDEX, "set is no SHA-256"),
    "another set": (lambda c: c.update(set="a" * 64), INDEX, "a shard is not called"),
    "no shards": (lambda c: c.update(shards=[]), INDEX, "0 shards"),
    "a shard less": (lambda c: c["shards"].pop(), INDEX, "a shard is not called"),
    "shards turned": (lambda c: c["shards"].reverse(), INDEX, "a shard is not called"),
    "a shard of text": (lambda c: c["shards"].insert(0, "x"), INDEX, "a shard is not called"),
    "a path": (lambda c: c["shards"][0].update(file="../x"), INDEX, "a shard is not called"),
    "bytes of text": (lambda c: c["shards"][0].update(bytes="1"), INDEX, "bytes should be"),
    "other bytes": (lambda c: c["shards"][1].update(bytes=1), 1, "bytes long, but .* says 1:"),
    "huge bytes": (lambda c: c["shards"][1].update(bytes=10**30), 1, "bytes long, but"),
    "another digest": (
        lambda c: c["shards"][1].update(sha256="0" * 64),
        1,
        "its description isn't the one",
    ),
    "digest of words": (lambda c: c["shards"][1].update(sha256="x"), INDEX, "no SHA-256"),
    "another name": (
        lambda c: c["shards"][1]["names"].__setitem__(0, "x"),
        1,
        "tensor 'layers.2.é': .* disagree",
    ),
    "names turned": (lambda c: c["shards"][1]["names"].reverse(), 1, "tensor .* disagree"),
    "a name less": (lambda c: c["shards"][1]["names"].pop(), 1, "tensor 'layers.3.é'.* disagree"),
    "no names": (lambda c: c["shards"][1].update(names=[]), INDEX, "names should be"),
    "names of numbers": (lambda c: c["shards"][1].update(names=[1]), INDEX, "names should be"),
    "a name of two lines": (
        lambda c: c["shards"][1].update(names=["a\nb"]),
        INDEX,
        "can't name a tensor",
    ),
    "a name twice": (
        lambda c: c["shards"][1]["names"].append("layers.0.é"),
        INDEX,
        "tensor 'layers.0.é' is in two shards",
    ),
}


@pytest.mark.parametrize(("change", "where", "says"), EDITS.values(), ids=EDITS)
def test_an_edited_description(
    change: Callable[[Any], Any], where: str | int, says: str, folder: Path
) -> None:
    edit_index(folder, change)
    file = shard_files(folder)[where].name if isinstance(where, int) else where
    refused(folder, file, says)


def drop_file(content: Any) -> None:
    content["weight_map"]["layers.2.é/codes"] = "elsewhere.safetensors"


RAW_EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a key less": (
        lambda c: c["weight_map"].pop("layers.2.é/codes"),
        "tensor 'layers.2.é': 'layers.2.é/codes' is not in weight_map, but it is in model-",
    ),
    "a key more": (
        lambda c: c["weight_map"].update({"x/codes": "y"}),
        "weight_map names 'x/codes', which is in no shard",
    ),
    "another file": (drop_file, "tensor 'layers.2.é': .* is in 'elsewhere.safetensors' by"),
    "no map": (lambda c: c.pop("weight_map"), "weight_map should be"),
    "another size": (lambda c: c["metadata"].update(total_size=7), "total_size is 7, but parts"),
    "no size": (lambda c: c["metadata"].pop("total_size"), "total_size should be"),
    "no digest": (lambda c: c["metadata"].pop("vqbench_sha256"), "index of a checkpoint, not"),
    "another digest": (
        lambda c: c["metadata"].update(vqbench_sha256="0" * 64),
        "doesn't match its checksum",
    ),
    "no text": (lambda c: c["metadata"].update(vqbench=1), "doesn't match its checksum"),
    "metadata a list": (lambda c: c.update(metadata=[]), "metadata should be"),
}


@pytest.mark.parametrize(("change", "says"), RAW_EDITS.values(), ids=RAW_EDITS)
def test_an_edited_index(change: Callable[[Any], Any], says: str, folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text("utf-8"))
    change(content)
    (folder / INDEX).write_text(json.dumps(content), "utf-8")
    refused(folder, INDEX, says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "no UTF-8"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"metadata": {}, "metadata": {}}', "given twice"),
        (b'{"metadata": NaN}', "not JSON"),
        (b"1" * 10_000, "not JSON"),
    ],
)
def test_an_index_of_other_bytes(data: bytes, says: str, folder: Path) -> None:
    (folder / INDEX).write_bytes(data)
    refused(folder, INDEX, says)


def test_an_index_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqkernels.container.signed.MAX_FILE", 800)
    refused(folder, INDEX, "json: is .* bytes long, over 800")


def test_an_index_that_is_missing(folder: Path) -> None:
    (folder / INDEX).unlink()
    for path, says in ((folder, f"a folder without {INDEX}"), (folder / INDEX, "No such file")):
        with pytest.raises(ContainerError, match=says) as caught:
            container.open_container(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_shard_with_a_damaged_matrix_gives_the_others(folder: Path) -> None:
    path = shard_files(folder)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    source = container.open_container(folder)
    with pytest.raises(ContainerError, match=r"tensor 'layers.1.é': .* checksum") as caught:
        source["layers.1.é"]
    assert str(caught.value).startswith(f"{path}: ")
    for name in set(source) - {"layers.1.é"}:
        source.verify(name)


def test_two_writers_wait_for_each_other(tmp_path: Path) -> None:
    with locked(tmp_path / INDEX):
        writer = threading.Thread(
            target=container.save_shards, args=(tmp_path, some(2)), kwargs={"shard_bytes": 1}
        )
        writer.start()
        writer.join(0.2)
        assert left(tmp_path) == []
    writer.join(30)
    assert_holds(container.open_container(tmp_path), some(2))
