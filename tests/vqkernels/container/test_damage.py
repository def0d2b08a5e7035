"""Containers that somebody, or a disk, changed: an error of ours, and never other weights."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.vqkernels.container.crafted import (
    Tensors,
    description_of,
    header_of,
    rebuild,
    refused,
    write,
)
from vqkernels import container
from vqkernels.container import codes
from vqkernels.errors import ContainerError, TensorError, VqError
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPEC = CodebookSpec(
    vector_length=2,
    stages=(5, 3),
    code_bits=(9, 4),
    scale_axis="row",
    permuted=True,
    uniform_columns=1,
    uniform_bits=3,
)


def small() -> QuantizedTensor:
    return random_tensor(SPEC, 6, 9, bias=True)


def saved(tensor: QuantizedTensor, **options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        options["provenance"] = {"note": 'ä "quoted" \x0b text'}
        container.save(path, {"é/layer": tensor}, made={"é/layer": {"error": 0.25}}, **options)
        return path.read_bytes()


def coded() -> bytes:
    """With an ANS stream: only a matrix of some size has one by itself."""
    tensor = random_tensor(dataclasses.replace(SPEC, stages=(5, 1)), 6, 60)
    few = torch.minimum(tensor.parts["codes"], tensor.parts["codes"].flip(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "_PART_COST", 0)
        content = saved(tensor.replace_parts(codes=few), codes="ans", usage=False)
    assert b'/ans_0"' in content
    assert b'/ans_1"' not in content
    return content


WHOLE = saved(small())
CODED = coded()


def load_bytes(content: bytes) -> str:
    """The message with which a file of these bytes is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bad.safetensors")
        path.write_bytes(content)
        with pytest.raises(VqError) as caught:
            container.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# ------------------------------------------------------------------------------------------------
# random damage


@settings(max_examples=1500)
@given(st.booleans(), st.integers(0, len(WHOLE) * 8 - 1))
@example(False, 0)
@example(False, 63)
@example(False, len(WHOLE) * 8 - 1)
def test_any_flipped_bit_is_an_error(from_end: bool, bit: int) -> None:
    load_bytes(flip(CODED, len(CODED) * 8 - 1 - bit) if from_end else flip(WHOLE, bit))


def test_a_letter_of_the_header_in_another_case_is_an_error() -> None:
    # JSON's escapes don't care (\u00e9 is \u00E9), so the header must have none
    size = int.from_bytes(WHOLE[:8], "little")
    start = WHOLE.index(b"}", 8)
    assert start < 8 + size
    for place in range(start, 8 + size):
        if chr(WHOLE[place]).isascii() and chr(WHOLE[place]).isalpha():
            load_bytes(flip(WHOLE, place * 8 + 5))


@pytest.mark.sweep
@pytest.mark.parametrize(("content", "step"), [(WHOLE, 3), (CODED, 5)], ids=["packed", "ans"])
def test_every_few_bits_a_flipped_one_is_an_error(content: bytes, step: int) -> None:
    for bit in range(0, len(content) * 8, step):
        load_bytes(flip(content, bit))


@settings(max_examples=400)
@given(st.sampled_from([WHOLE, CODED]), st.integers(0, len(WHOLE) - 1))
@example(WHOLE, 0)
@example(WHOLE, 7)
@example(WHOLE, 8)
@example(WHOLE, len(WHOLE) - 1)
@example(CODED, len(CODED) - 1)
def test_any_truncation_is_an_error(content: bytes, length: int) -> None:
    load_bytes(content[: min(length, len(content) - 1)])


@given(st.binary(min_size=1, max_size=64))
def test_bytes_at_the_end_are_an_error(extra: bytes) -> None:
    load_bytes(WHOLE + extra)


@settings(max_examples=400)
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=40))
def test_overwritten_bytes_are_an_error_unless_they_are_equal(start: int, new: bytes) -> None:
    changed = (WHOLE[:start] + new + WHOLE[start + len(new) :])[: len(WHOLE)]
    if changed != WHOLE:
        load_bytes(changed)


@given(st.binary(max_size=200))
def test_bytes_that_were_never_a_container_are_an_error(content: bytes) -> None:
    load_bytes(content)


# ------------------------------------------------------------------------------------------------
# files made by hand, with every checksum right: each check on its own


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    container.save(path, {"layer": small()})
    return path


def test_a_file_rebuilt_without_a_change_is_good(path: Path) -> None:
    rebuild(path, lambda _content, _tensors: None)
    assert torch.equal(container.load(path, decoded=True)["layer"].decode(), small().decode())


@pytest.mark.parametrize(
    ("stage", "says"),
    [(0, "codes reach 261, but the largest codebook has 5"), (1, "stage 1 reach 3")],
)
def test_a_code_out_of_range(stage: int, says: str, path: Path) -> None:
    def change(_content: object, tensors: Tensors) -> None:
        # 9 bits hold 5 + 256, which a byte would turn back into 5; 4 bits after them hold a 3
        cleared, code = ((511, 261), (15 << 9, 3 << 9))[stage]
        tensors["layer/codes"][0, 0] = int(tensors["layer/codes"][0, 0]) & ~cleared | code

    rebuild(path, change)
    refused(path, TensorError, f"tensor 'layer': .*{says}")


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("uniform_codes", 8, "uniform_codes reach 8"),
        ("permutation", 9, "permutation"),
        ("codebook_1", float("nan"), "codebook_1 holds NaN"),
        ("scale", float("inf"), "scale holds NaN or infinity"),
        ("bias", float("nan"), "bias holds NaN"),
    ],
)
def test_a_value_out_of_range(part: str, value: float, says: str, path: Path) -> None:
    rebuild(path, lambda _, tensors: tensors[f"layer/{part}"].view(-1)[:1].fill_(value))
    refused(path, TensorError, f"tensor 'layer': {says}")


def test_stored_data_that_does_not_match_its_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last part is the bias, still a number
    path.write_bytes(content)
    refused(path, ContainerError, "tensor 'layer': bias doesn't match its checksum")


def test_the_dequantised_checksum_is_checked_on_request(path: Path) -> None:
    rebuild(path, lambda _, tensors: tensors["layer/codebook_0"].mul_(2).nan_to_num_())
    container.load(path)
    with pytest.raises(ContainerError, match="'layer': the dequantised values don't match"):
        container.load(path, decoded=True)


@pytest.mark.parametrize("part", ["codes", "codebook_0", "scale", "permutation", "bias"])
def test_a_wrong_shape_or_dtype(part: str, path: Path) -> None:
    original = path.read_bytes()
    for wrong in (lambda t: t[:-1].clone(), lambda t: t.unsqueeze(0), lambda t: t.double()):
        path.write_bytes(original)

        def change(_: object, tensors: Tensors, wrong: Any = wrong) -> None:
            tensors[f"layer/{part}"] = wrong(tensors[f"layer/{part}"])

        rebuild(path, change)
        refused(path, ContainerError, f"tensor 'layer': {part} is .* but the format needs")
        with pytest.raises(ContainerError, match="the format needs"):
            container.describe(path)


def test_a_tensor_missing_or_too_many(path: Path) -> None:
    original = path.read_bytes()
    rebuild(path, lambda _, tensors: tensors.pop("layer/scale"))
    refused(path, ContainerError, "tensor 'layer': 'layer/scale' is missing")
    path.write_bytes(original)
    rebuild(path, lambda _, tensors: tensors.update({"other/codes": torch.zeros(1)}))
    refused(path, ContainerError, "'other/codes' belongs to no tensor")


def edit(**fields: Any) -> Callable[[Any, Tensors], None]:
    """Set fields of the description."""
    return lambda content, _: content.update(fields)


def edit_layer(**fields: Any) -> Callable[[Any, Tensors], None]:
    """Set fields of the only tensor's entry."""
    return lambda content, _: content["tensors"][0].update(fields)


def edit_spec(**fields: Any) -> Callable[[Any, Tensors], None]:
    """Set fields of the only tensor's spec."""
    return lambda content, _: content["tensors"][0]["spec"].update(fields)


HUGE = 10**18
EDITS: dict[str, tuple[Callable[[Any, Tensors], Any], str]] = {
    "newer container": (edit(container_version=3), "container_version is 3.*reads 1 to 2; upgrade"),
    "newer spec": (edit(spec_version=9), "spec_version is 9.*reads 1 to 2; upgrade"),
    "version 0": (
        edit(container_version=0),
        "container_version is 0.*reads 1 to 2; it was damaged",
    ),
    "version true": (edit(container_version=True), "container_version should be"),
    "version of text": (edit(spec_version="1"), "spec_version should be"),
    "no JSON": (lambda *_: "{", "not JSON"),
    "NaN in JSON": (lambda *_: '{"container_version": NaN}', "not JSON"),
    "deep JSON": (lambda *_: "[" * 100_000, "not JSON"),
    "long number": (lambda *_: "1" * 10_000, "not JSON"),
    "a list": (lambda *_: "[]", "not a JSON object"),
    "an empty object": (lambda *_: "{}", "container_version should be"),
    "tensors an object": (edit(tensors={}), "tensors should be"),
    "tensors of text": (edit(tensors=["x"]), "something else than an object"),
    "no tensors": (edit(tensors=[]), "belongs to no tensor"),
    "twice the same": (lambda c, _: c["tensors"].append(c["tensors"][0]), "the same name"),
    "provenance a list": (edit(provenance=[]), "provenance should be"),
    "provenance of numbers": (edit(provenance={"seed": 1}), "only strings"),
    "no name": (lambda c, _: c["tensors"][0].pop("name") and 0, "name should be"),
    "name with a line break": (edit_layer(name="a\nb"), "can't name a tensor"),
    "another name": (edit_layer(name="other"), "'other': 'other/bias' is missing"),
    "n of text": (edit_layer(n="6"), "'layer': n should be"),
    "n zero": (edit_layer(n=0), "'layer': n is 0"),
    "k negative": (edit_layer(k=-9), "'layer': k is -9"),
    "k infinite": (edit_layer(k=float("inf")), "not JSON"),
    "n huge": (edit_layer(n=HUGE), f"'layer': n is {HUGE}"),
    "n and k large": (edit_layer(n=2**31 - 1, k=2**31 - 1), "the format needs"),
    "n one more": (edit_layer(n=7), "the format needs"),
    "k too small": (edit_layer(k=1), "leave nothing of 1"),
    "bias of 1": (edit_layer(bias=1), "bias should be"),
    "no bias": (edit_layer(bias=False), "parts don't go with its format"),
    "coding of text": (edit_layer(coding="packed"), "coding should be"),
    "coding of one stage": (edit_layer(coding=["packed"]), "coding should give packed or ans for"),
    "coding by nothing": (edit_layer(coding=["packed", "zip"]), "coding should give packed or ans"),
    "coding of objects": (edit_layer(coding=[{}, []]), "coding should give packed or ans"),
    "coding another": (edit_layer(coding=["packed", "ans"]), "parts don't go with its format"),
    "ans of one entry": (
        lambda c, t: (edit_spec(stages=[5, 1])(c, t), edit_layer(coding=["packed", "ans"])(c, t)),
        "coding of a stage with one entry can't be ans",
    ),
    "usage of 1": (edit_layer(usage=1), "usage should be"),
    "no usage": (edit_layer(usage=False), "parts don't go with its format"),
    "made a list": (edit_layer(made=[]), "'layer': made is no object"),
    "no checksums": (edit_layer(sha256={}), "parts don't go with its format"),
    "checksums a list": (edit_layer(sha256=[]), "sha256 should be"),
    "a checksum of words": (edit_layer(decoded_sha256="none"), "no SHA-256"),
    "spec of text": (edit_layer(spec="vq-256x8"), "spec should be"),
    "spec unknown field": (edit_spec(colour=1), "'layer': format: unknown field 'colour'"),
    "spec stages a number": (edit_spec(stages=5), "stages must be a list"),
    "spec stages of lists": (edit_spec(stages=[[5], 3]), "stages must be a list"),
    "spec other stages": (edit_spec(stages=[5, 4]), "codebook_1 is .* the format needs"),
    "spec vector_length huge": (edit_spec(vector_length=HUGE), "vector_length is over"),
    "spec stride large": (edit_spec(stride=2**31 - 1), "the format needs"),
    "spec stage huge": (edit_spec(stages=[HUGE, 3]), "stages is over"),
    "spec coefficient huge": (edit_spec(coefficients=[10**400, 1]), "coefficients is over"),
    "spec rotation": (edit_spec(rotation_size=3), "3 doesn't divide 8"),
    "spec more stages": (
        edit_spec(stages=[5, 3, 1], code_bits=[]),
        "coding should give packed or ans for each stage",
    ),
}


@pytest.mark.parametrize(("change", "says"), EDITS.values(), ids=EDITS)
def test_an_edited_description(change: Any, says: str, path: Path) -> None:
    rebuild(path, change)
    refused(path, ContainerError, says)
    with pytest.raises(ContainerError, match=says):
        container.describe(path)


def test_a_description_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqkernels.container.signed.MAX_TEXT", 500)
    refused(path, ContainerError, "over 500")


def test_a_description_without_its_checksum(path: Path) -> None:
    good = header_of(json.dumps(description_of(path)))
    for header in ({"vqbench": good["vqbench"]}, {**good, "vqbench_sha256": "0" * 64}):
        write(path, header, {"layer/codes": torch.zeros(1)})
        refused(path, ContainerError, "doesn't match its checksum")


def head(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        head({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
        head({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**63]}}, b"1234"),
        head({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
        head({"a": {"dtype": "X7", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        (2**63).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
    ],
    ids=["shape", "offsets", "backwards", "dtype", "header length", "short header"],
)
def test_a_lying_safetensors_header(content: bytes) -> None:
    assert "truncated, damaged or no container" in load_bytes(content)
