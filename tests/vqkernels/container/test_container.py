from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import vqkernels
from tests.strategies import quantized_tensors
from tests.vqkernels.container.crafted import parts_of, raw
from vqkernels import container
from vqkernels.container import checksums, codes, read
from vqkernels.errors import ContainerError, TensorError, VqError
from vqkernels.presets import PRESETS
from vqkernels.spec import SPEC_VERSION, CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

# The smallest round shapes that hold 65,536 entries, or 256 a row; 256 x 128 holds the others.
SHAPES = {
    "aqlm-1x16": (1024, 512),
    "vptq-65536-256": (1024, 512),
    "vq-256x8-channel": (3, 2048),
    "vq-256x32": (64, 256),
    "pq-m16": (256, 128),
    "toy-16-4": (16, 16),
}


def preset_tensor(name: str, **options: Any) -> QuantizedTensor:
    n, k = SHAPES.get(name, (256, 128))
    return random_tensor(PRESETS[name], n, k, **options)


def assert_same(loaded: QuantizedTensor, saved: QuantizedTensor) -> None:
    assert (loaded.spec, loaded.n, loaded.k) == (saved.spec, saved.n, saved.k)
    assert set(loaded.parts) == set(saved.parts)
    for name, value in saved.parts.items():
        found = loaded.parts[name]
        assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        assert raw(found) == raw(value), name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layer.safetensors"


# ------------------------------------------------------------------------------------------------
# round trips


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives(name: str, path: Path) -> None:
    tensor = preset_tensor(name, bias=True)
    container.save(path, {"layer": tensor})
    assert_same(container.load(path, decoded=True)["layer"], tensor)


@given(st.lists(quantized_tensors(max_side=12), min_size=1, max_size=3))
def test_any_format_survives(tensors: list[QuantizedTensor]) -> None:
    saved = {f"layer.{number}": tensor for number, tensor in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        container.save(path, saved)
        loaded = container.load(path, decoded=True)
        info = container.describe(path)
    assert list(loaded) == list(saved)
    for name, tensor in saved.items():
        assert_same(loaded[name], tensor)
    assert [entry.bits for entry in info.tensors] == [tensor.bits for tensor in tensors]


@pytest.mark.parametrize("traversal", ["row", "column"])
def test_large_codes_are_packed_piece_by_piece(
    traversal: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(PRESETS["aqlm-2x8"], traversal=traversal)
    tensor = random_tensor(spec, 37, 100 * 8)
    container.save(path, {"layer": tensor})
    whole = path.read_bytes()
    for module in (codes, checksums):  # some rows of codes, or of weights, at once
        monkeypatch.setattr(module, "_PIECE", 5000)
    container.save(path, {"layer": tensor})
    assert path.read_bytes() == whole
    assert_same(container.load(path, decoded=True)["layer"], tensor)


def test_parts_that_share_memory_or_lie_transposed_survive(path: Path) -> None:
    tensor = preset_tensor("vq-256x8")
    turned = tensor.parts["codes"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    container.save(path, {"a": tensor, "b": tensor.replace_parts(codes=turned)})
    loaded = container.load(path)
    assert_same(loaded["a"], tensor)
    assert_same(loaded["b"], tensor)


def test_a_part_of_one_number_survives_whatever_its_stride(path: Path) -> None:
    spec = CodebookSpec(vector_length=2, stages=(2,), scale_axis="row")
    scale = torch.tensor([1.0, 2.0], dtype=torch.float16)[::2]
    assert scale.is_contiguous() and scale.stride() == (2,)
    tensor = random_tensor(spec, 1, 4, fit=False).replace_parts(scale=scale)
    container.save(path, {"a": tensor})
    assert torch.equal(container.load(path)["a"].parts["scale"], scale)


def test_names_may_hold_slashes_spaces_quotes_and_letters_of_any_script(path: Path) -> None:
    names = ["a/codes", "a", "a b", 'say "hi"', "back\\slash", "слой.0", "__metadata__"]
    tensors = {name: preset_tensor("toy-16-4", seed=seed) for seed, name in enumerate(names)}
    container.save(path, tensors)
    loaded = container.load(path)
    assert list(loaded) == names
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)


def test_some_of_the_tensors(path: Path) -> None:
    tensors = {name: preset_tensor("toy-16-4", seed=seed) for seed, name in enumerate("abc")}
    container.save(path, tensors)
    loaded = container.load(path, names=["c", "a", "c"])
    assert list(loaded) == ["c", "a"]
    assert_same(loaded["c"], tensors["c"])
    assert container.load(path, names=[]) == {}
    with pytest.raises(ContainerError, match="no tensor 'd'; the file holds a, b, c"):
        container.load(path, names=["a", "d"])


def test_loaded_tensors_do_not_follow_the_file(path: Path) -> None:
    tensor = preset_tensor("vq-256x8")
    container.save(path, {"layer": tensor})
    loaded = container.load(path)["layer"]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(loaded, tensor)


# ------------------------------------------------------------------------------------------------
# one matrix at a time


def test_a_container_reads_what_is_looked_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: preset_tensor("toy-16-4", seed=seed) for seed, name in enumerate("ba")}
    container.save(path, tensors)
    source = container.open_container(path)
    assert source.info == container.describe(path)
    assert list(source) == ["b", "a"]
    assert (len(source), "a" in source, "c" in source) == (2, True, False)
    assert source.outline("a") is source.info.tensors[1]
    assert_same(source["a"], tensors["a"])
    assert source["a"].parts["codes"].data_ptr() != source["a"].parts["codes"].data_ptr()
    assert_same(source.verify("b"), tensors["b"])
    for ask in (source.__getitem__, source.outline, source.verify):
        with pytest.raises(KeyError):
            ask("c")


def test_a_container_says_at_lookup_what_is_damaged(path: Path) -> None:
    container.save(path, {name: preset_tensor("toy-16-4") for name in "ab"})
    path.write_bytes(path.read_bytes()[:-1] + b"\xa5")
    source = container.open_container(path)
    source["a"]
    with pytest.raises(ContainerError, match=r"tensor .b.: .* doesn.t match") as caught:
        source["b"]
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_replaced_while_it_is_open_stays_as_it_was(path: Path) -> None:
    old, new = preset_tensor("toy-16-4", seed=1), preset_tensor("toy-16-4", seed=2)
    container.save(path, {"layer": old})
    source = container.open_container(path)
    container.save(path, {"layer": new})
    assert_same(source["layer"], old)
    assert_same(container.load(path)["layer"], new)


# ------------------------------------------------------------------------------------------------
# what is in the file


@pytest.mark.parametrize("traversal", ["row", "column"])
def test_codes_are_a_bitstream_in_the_order_of_traversal(traversal: Any, path: Path) -> None:
    spec = CodebookSpec(vector_length=2, stages=(9, 300), traversal=traversal)
    tensor = random_tensor(spec, 20, 34)
    container.save(path, {"layer": tensor})
    words = parts_of(path)["layer/codes"]
    assert words.dtype == torch.int32
    codes = tensor.parts["codes"].tolist()
    rows = codes if traversal == "row" else list(zip(*codes, strict=True))
    assert words.shape == (len(rows), -(-len(rows[0]) * (4 + 9) // 32))
    for row, packed in zip(rows, words.numpy(), strict=True):
        stream = int.from_bytes(packed.astype("<i4").tobytes(), "little")
        for first, second in row:
            assert (stream % 16, stream // 16 % 512) == (first, second)
            stream //= 16 * 512
        assert stream == 0


def test_other_parts_are_stored_as_they_are(path: Path) -> None:
    tensor = preset_tensor("opq-m8", bias=True)
    container.save(path, {"block.0/q_proj": tensor})
    stored = parts_of(path)
    parts = set(tensor.parts) | {"usage_0"}
    assert set(stored) == {f"block.0/q_proj/{part}" for part in parts}
    for part in set(tensor.parts) - {"codes"}:
        assert torch.equal(stored[f"block.0/q_proj/{part}"], tensor.parts[part])


def test_a_description_needs_no_data(path: Path) -> None:
    tensors = {"a": preset_tensor("aqlm-2x8", bias=True), "b": preset_tensor("vq-256x8")}
    container.save(path, tensors, provenance={"date": "2025-01-31", "seed": "7", "тема": "\x0b"})
    damaged = path.read_bytes()[:-1] + b"\xa5"
    path.write_bytes(damaged)
    with pytest.raises(ContainerError):
        container.load(path)

    info = container.describe(path)
    creator = f"vqbench {vqkernels.__version__}"
    assert info.provenance == {
        "creator": creator,
        "date": "2025-01-31",
        "seed": "7",
        "тема": "\x0b",
    }
    assert (info.version, info.spec_version) == (container.CONTAINER_VERSION, SPEC_VERSION)
    assert [entry.name for entry in info.tensors] == ["a", "b"]
    for entry in info.tensors:
        tensor = tensors[entry.name]
        assert (entry.spec, entry.n, entry.k) == (tensor.spec, tensor.n, tensor.k)
        assert entry.bias == ("bias" in tensor.parts)
        assert entry.bits == tensor.bits
    # 256 x 16 vectors of 2 bytes; two codebooks of 256 x 8 in fp16, and how often each entry is
    # used, in a byte; fp16 scales, an fp32 bias
    parts = (256 * 16 * 2, 2 * 256 * 8 * 2, 2 * 256, 256 * 2, 256 * 4)
    assert info.tensors[0].stored_bytes == sum(parts)


def test_checksums_are_of_stored_and_of_dequantised_bytes(path: Path) -> None:
    spec = CodebookSpec(
        vector_length=3,
        stages=(5, 4),
        vector_axis="out",
        group_axis="row",
        group_size=6,
        outlier_columns=2,
        rotation_size=4,
        scale_axis="row",
    )
    tensor = random_tensor(spec, 20, 30)
    container.save(path, {"layer": tensor})
    entry = container.describe(path).tensors[0]
    stored = parts_of(path)
    assert set(tensor.parts) < set(entry.checksums)
    assert entry.checksums == {
        key.removeprefix("layer/"): hashlib.sha256(raw(value)).hexdigest()
        for key, value in stored.items()
    }
    weight = tensor.stored_weight().numpy().astype("<f4")
    assert weight.dtype == np.float32
    assert entry.decoded_checksum == hashlib.sha256(weight.tobytes()).hexdigest()


def test_equal_arguments_make_equal_files(tmp_path: Path) -> None:
    tensors = {"a": preset_tensor("opq-m8"), "b": preset_tensor("rq-3x256x8")}
    for name in ("1", "2"):
        container.save(tmp_path / name, tensors, provenance={"date": "2025-01-31"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


class Counting(dict[str, QuantizedTensor]):
    """A mapping that knows what was looked up."""

    def __init__(self, tensors: dict[str, QuantizedTensor]) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> QuantizedTensor:
        self.asked.append(name)
        return super().__getitem__(name)

    def items(self) -> Any:
        return Mapping.items(self)

    def values(self) -> Any:
        return Mapping.values(self)


def test_each_tensor_of_a_source_is_looked_up_once(path: Path) -> None:
    tensors = Counting(
        {name: preset_tensor("toy-16-4", seed=seed) for seed, name in enumerate("ba")}
    )
    container.save(path, tensors, made={"a": {"seed": 1}})
    assert tensors.asked == ["b", "a"]
    # and a file can be saved from itself
    before = path.read_bytes()
    source = container.open_container(path)
    container.save(path, source, made={"a": source.outline("a").made})
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------
# what can't be saved


def refused(path: Path, tensors: dict[str, Any], **options: Any) -> str:
    with pytest.raises(VqError) as caught:
        container.save(path, tensors, **options)
    assert not path.exists()
    assert list(path.parent.iterdir()) == []
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00", "\ud800", "a\tb", "x" * 2000])
def test_a_name_that_no_message_could_hold(name: str, path: Path) -> None:
    assert "can't name a tensor" in refused(path, {name: preset_tensor("toy-16-4")})


def test_nothing_to_save(path: Path) -> None:
    assert "no tensors" in refused(path, {})


@pytest.mark.parametrize("provenance", [{"seed": 1}, {1: "seed"}, {"date": None}])
def test_provenance_is_text(provenance: Any, path: Path) -> None:
    tensors = {"layer": preset_tensor("toy-16-4")}
    assert "provenance" in refused(path, tensors, provenance=provenance)


def test_too_much_provenance(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqkernels.container.signed.MAX_TEXT", 2000)
    tensors = {"layer": preset_tensor("toy-16-4")}
    container.save(path, tensors, provenance={"note": "x" * 100})
    path.unlink()
    assert "2,000" in refused(path, tensors, provenance={"note": "x" * 2000})


def test_an_invalid_tensor_is_named_and_nothing_is_written(path: Path) -> None:
    good = preset_tensor("toy-16-4")
    codes = good.parts["codes"].clone()
    codes[0, 0, 1] = 4
    message = refused(path, {"a": good, "layer.7": good.replace_parts(codes=codes)})
    assert "tensor 'layer.7': codes of stage 1 reach 4" in message


def test_weights_that_overflow_are_refused(path: Path) -> None:
    spec = CodebookSpec(vector_length=4, stages=(4,), coefficients=(1e39,))
    with pytest.raises(TensorError, match="'layer': dequantises to infinity"):
        container.save(path, {"layer": random_tensor(spec, 16, 16)})


def test_groups_too_large_to_check_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_MAX_PIECE", 16 * 8 - 1)
    spec = CodebookSpec(vector_length=4, stages=(4,), group_axis="row", group_size=16)
    assert "16 rows and 8 columns are too large" in refused(
        path, {"layer": random_tensor(spec, 32, 8)}
    )
    container.save(path, {"layer": random_tensor(PRESETS["toy-16-4"], 16, 15)})


# ------------------------------------------------------------------------------------------------
# what isn't a container at all


def not_loaded(path: Path, says: str) -> None:
    for ask in (container.load, container.describe):
        with pytest.raises(ContainerError, match=says) as caught:
            ask(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


class Trap:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a file was unpickled",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_loaded(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"layer": Trap()}, path, _use_new_zipfile_serialization=zipped)
    not_loaded(path, "zip or pickle file.*never loads")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    not_loaded(tmp_path / "none", "no such file")


def test_a_folder(tmp_path: Path) -> None:
    not_loaded(tmp_path, "a folder without model.safetensors.index.json")


def test_a_device() -> None:
    not_loaded(Path("/dev/zero"), "not a file")


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    not_loaded(path, "is empty")


def test_another_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2, 2)}, path, metadata=metadata)
        not_loaded(path, "not a vqbench container; make one with")


def test_a_file_that_may_not_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    path.touch()
    monkeypatch.setattr(read, "safe_open", deny)
    not_loaded(path, "can't be read .Permission denied")
