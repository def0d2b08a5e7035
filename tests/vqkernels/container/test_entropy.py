"""Codes by ANS: the streams that the format describes, and those that nobody should trust."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.vqkernels.container.crafted import Tensors, parts_of, rebuild, refused
from tests.vqkernels.container.test_container import assert_same
from vqkernels import container
from vqkernels.container import codes as stored_codes
from vqkernels.container import entropy
from vqkernels.errors import BackendError, ContainerError, VqError
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SLOTS = 1 << 24


def edges_of(counts: Sequence[int]) -> list[int]:
    """`F` of the format's description, in whole numbers of any size."""
    before = [sum(counts[:entry]) for entry in range(len(counts) + 1)]
    return [i + u * (SLOTS - len(counts)) // before[-1] for i, u in enumerate(before)]


def decoded(words: Sequence[int], counts: Sequence[int], number: int) -> list[int]:
    """The decoder of the format's description; it shares nothing with the library's."""
    edges, left = edges_of(counts), list(words)
    state, found = 0, []
    for _ in range(min(2, len(left))):
        state = state << 32 | left.pop()
    for _ in range(number):
        slot = state % SLOTS
        entry = max(i for i, edge in enumerate(edges[:-1]) if edge <= slot)
        state = (edges[entry + 1] - edges[entry]) * (state // SLOTS) + slot - edges[entry]
        if state < 1 << 32 and left:
            state = state << 32 | left.pop()
        found.append(entry)
    assert (state, left) == (0, [])
    return found


def encoded(symbols: Sequence[int], entries: int) -> tuple[Any, list[int]]:
    array = np.array(symbols, np.int32)
    counts = np.bincount(array, minlength=entries)
    return entropy.encode(array, counts), [int(count) for count in counts]


@st.composite
def messages(draw: st.DrawFn) -> tuple[list[int], int]:
    """Symbols, some of them far more often than others, and the entries of their alphabet."""
    entries = draw(st.integers(2, 40))
    used = draw(st.lists(st.integers(0, entries - 1), min_size=1, max_size=6))
    return draw(st.lists(st.sampled_from(used), min_size=1, max_size=300)), entries


@given(messages())
@example(([0], 2))
@example(([1], 2))
@example(([1] * 5000, 2))
@example(([0] * 4000 + [1], 2))
@example(([299], 300))
@example(([*range(300), 7, 7, 7], 300))
def test_streams_are_those_of_the_description(message: tuple[list[int], int]) -> None:
    symbols, entries = message
    words, counts = encoded(symbols, entries)
    assert words.dtype == np.uint32
    assert decoded(words.tolist(), counts, len(symbols)) == symbols
    found = entropy.decode(words, np.array(counts), len(symbols), "x")
    assert found.tolist() == symbols


def test_the_largest_alphabet() -> None:
    # one slot for each entry that is never used: 65,535 of 16.8 million
    symbols = np.array([65535, 0, 65535, 12345], np.int32)
    counts = np.bincount(symbols, minlength=65536)
    words = entropy.encode(symbols, counts)
    assert entropy.decode(words, counts, 4, "x").tolist() == symbols.tolist()


def test_a_stream_takes_what_its_entropy_asks_for() -> None:
    generator = np.random.default_rng(0)
    symbols = np.minimum(generator.geometric(0.05, 20_000) - 1, 255).astype(np.int32)
    counts = np.bincount(symbols, minlength=256)
    shares = counts[counts > 0] / len(symbols)
    bits = -(shares * np.log2(shares)).sum() * len(symbols)
    assert bits < len(entropy.encode(symbols, counts)) * 32 < bits * 1.001 + 64


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.lists(st.integers(0, 99), min_size=2))
def test_any_words_are_an_error_or_codes_in_range(words: list[int], counts: list[int]) -> None:
    counts[0] += 1
    try:
        found = entropy.decode(np.array(words, np.uint32), np.array(counts), 50, "x")
    except ContainerError:
        if words and not words[-1]:  # which no encoder leaves
            return
        with pytest.raises(AssertionError):
            decoded(words, counts, 50)
    else:
        assert 0 <= found.min() <= found.max() < len(counts)
        assert decoded(words, counts, 50) == found.tolist()


# ------------------------------------------------------------------------------------------------
# in a container

SPEC = CodebookSpec(vector_length=2, stages=(200, 20, 1, 256))


def uneven(spec: CodebookSpec = SPEC, n: int = 96, k: int = 160) -> QuantizedTensor:
    """Codes of which few entries are frequent, but for the last stage's."""
    tensor = random_tensor(spec, n, k)
    codes = tensor.parts["codes"].clone()
    for stage, entries in enumerate(spec.stages[:-1]):
        codes[..., stage] = (codes[..., stage].int() ** 2 // entries // 4).to(codes.dtype)
    return tensor.replace_parts(codes=codes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    container.save(path, {"layer": uneven()}, codes="ans")
    return path


@pytest.mark.parametrize("traversal", ["row", "column"])
@pytest.mark.parametrize("usage", [True, False])
def test_stages_that_gain_are_coded_and_come_back(
    usage: bool, traversal: Any, tmp_path: Path
) -> None:
    tensor = uneven(dataclasses.replace(SPEC, traversal=traversal))
    paths = {codes: tmp_path / codes for codes in ("packed", "ans")}
    for codes, path in paths.items():
        container.save(path, {"layer": tensor}, codes=codes, usage=usage)  # type: ignore[arg-type]
        assert_same(container.load(path, decoded=True)["layer"], tensor)
    entry = container.describe(paths["ans"]).tensors[0]
    assert entry.coding == ("ans", "ans", "packed", "packed")
    assert [part for part in entry.checksums if part.startswith("usage")] == [
        f"usage_{stage}" for stage in (range(4) if usage else range(2))
    ]
    assert paths["ans"].stat().st_size < paths["packed"].stat().st_size
    parts = parts_of(paths["ans"])
    codes = (
        tensor.parts["codes"].transpose(0, 1) if traversal == "column" else tensor.parts["codes"]
    )
    for stage in (0, 1):
        stream = parts[f"layer/ans_{stage}"].tolist()
        counts = parts[f"layer/usage_{stage}"].tolist()
        symbols = codes[..., stage].flatten().tolist()
        assert decoded(stream, counts, len(symbols)) == symbols


@settings(max_examples=40)
@given(st.integers(0, 9), st.sampled_from([1, 2, 3, 60]), st.sampled_from([1, 40, 2000]))
def test_any_stage_comes_back_coded_or_not(seed: int, entries: int, cells: int) -> None:
    # with nothing charged for a part, whatever may be coded is
    spec = CodebookSpec(vector_length=1, stages=(entries,), code_bits=(9,))
    tensor = random_tensor(spec, 1, cells, seed=seed, fit=False)
    codes = torch.minimum(tensor.parts["codes"], tensor.parts["codes"].flip(1))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_codes, "_PART_COST", -99)
        container.save(Path(folder, "x"), {"layer": tensor.replace_parts(codes=codes)}, codes="ans")
        source = container.open_container(Path(folder, "x"))
        assert_same(source.verify("layer"), tensor.replace_parts(codes=codes))
        assert (source.info.tensors[0].coding == ("ans",)) == (entries > 1)


def test_codes_that_tell_nothing_stay_packed(tmp_path: Path) -> None:
    # 2,000 equal codes take one word, from which a damaged file could ask for any number
    spec = CodebookSpec(vector_length=1, stages=(2,), code_bits=(16,))
    tensor = random_tensor(spec, 1, 2000)
    equal = tensor.replace_parts(codes=torch.zeros_like(tensor.parts["codes"]))
    container.save(tmp_path / "x", {"layer": equal}, codes="ans")
    assert container.describe(tmp_path / "x").tensors[0].coding == ("packed",)


def test_a_small_layer_gains_nothing(tmp_path: Path) -> None:
    small = uneven(n=8, k=80)
    for codes in ("packed", "ans"):
        container.save(tmp_path / codes, {"layer": small}, codes=codes)  # type: ignore[arg-type]
    assert (tmp_path / "ans").read_bytes() == (tmp_path / "packed").read_bytes()


def test_usage_counts_where_only_decoding_needs_it(tmp_path: Path) -> None:
    # 8 bits a code of 7.6: 0.5 KB of 12, which the usage would take again
    tensor = random_tensor(CodebookSpec(vector_length=1, stages=(200,)), 100, 120)
    for usage, coding in ((True, "ans"), (False, "packed")):
        container.save(tmp_path / "x", {"layer": tensor}, codes="ans", usage=usage)
        assert container.describe(tmp_path / "x").tensors[0].coding == (coding,)


def test_a_grid_too_large_for_the_arithmetic(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_codes, "_MAX_CELLS", 7680)
    refused(path, ContainerError, "ans_0 has .* words for 7,680 codes")
    container.save(tmp_path / "packed", {"layer": uneven()}, codes="ans")
    assert "ans" not in container.describe(tmp_path / "packed").tensors[0].coding


def test_without_constriction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    says = "need the package constriction: pip install 'vqbench.entropy.'"
    assert container.describe(path).tensors[0].coding[0] == "ans"
    with pytest.raises(BackendError, match=says) as caught:
        container.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    whole = path.read_bytes()
    with pytest.raises(BackendError, match=says):
        container.save(path, {"layer": uneven()}, codes="ans")
    assert path.read_bytes() == whole
    container.save(path, {"layer": uneven()})
    container.load(path)


# ------------------------------------------------------------------------------------------------
# streams that lie, with every checksum right


def change_stream(change: Any) -> Any:
    def apply(_: object, tensors: Tensors) -> None:
        words = tensors["layer/ans_0"].numpy().copy()
        tensors["layer/ans_0"] = torch.from_numpy(np.array(change(words), np.uint32))

    return apply


STREAMS = {
    "cut": (lambda words: words[:-1], "ans_0 is not of 7,680 codes"),
    "cut at the start": (lambda words: words[1:], "ans_0 is not of 7,680 codes"),
    "longer": (lambda words: [*words, 1], "ans_0 is not of 7,680 codes"),
    "longer at the start": (lambda words: [1, *words], "ans_0 is not of 7,680 codes"),
    "ending in 0": (lambda words: [*words, 0], "ans_0 ends in a zero"),
    "reversed": (lambda words: words[::-1], "ans_0 is not of 7,680 codes"),
    "other words": (lambda words: words ^ 1, "ans_0 is not of 7,680 codes"),
    # from state 0 on, which this one comes to early, all codes are 0
    "ones": (lambda words: words | 0xFFFFFFFF, "usage_0 is not of its codes"),
    "too short": (lambda words: words[:119], "ans_0 has 119 words for 7,680 codes"),
    "empty": (lambda words: [], "ans_0 has 0 words for 7,680 codes"),
}


@pytest.mark.parametrize(("change", "says"), STREAMS.values(), ids=STREAMS)
def test_a_stream_that_lies(change: Any, says: str, path: Path) -> None:
    rebuild(path, change_stream(change))
    refused(path, ContainerError, f"tensor 'layer': {says}")


def test_a_stream_with_another_usage(path: Path) -> None:
    def swap(_: object, tensors: Tensors) -> None:
        counts = tensors["layer/usage_0"].numpy()
        tensors["layer/usage_0"] = torch.from_numpy(counts[::-1].copy())

    rebuild(path, swap)
    refused(path, ContainerError, "tensor 'layer': ans_0 is not of 7,680 codes with this usage")


@pytest.mark.parametrize("n", [2**31 - 1, 2**20])
def test_a_matrix_too_large_for_its_stream(n: int, tmp_path: Path) -> None:
    # nothing else in this file grows with n
    spec = CodebookSpec(vector_length=1, stages=(9, 1))
    path = tmp_path / "x"
    container.save(path, {"layer": uneven(spec)}, codes="ans")
    assert container.describe(path).tensors[0].coding == ("ans", "packed")

    def grow(content: dict[str, Any], tensors: Tensors) -> None:
        entry = content["tensors"][0]
        entry["n"], entry["coding"] = n, ["ans", "ans"]
        entry["spec"] |= {"stages": [9, 9], "code_bits": []}
        del entry["sha256"]["codes"], tensors["layer/codes"]
        for part in ("ans", "usage", "codebook"):
            tensors[f"layer/{part}_1"] = tensors[f"layer/{part}_0"].clone()
            entry["sha256"][f"{part}_1"] = ""

    rebuild(path, grow)
    with pytest.raises(VqError, match=f"ans_0 has .* words for {n * 160:,} codes"):
        container.describe(path)
