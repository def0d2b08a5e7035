"""A small matrix, and what may be wrong with the description of one, for files of any layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vqkernels.formats.description import DescribedTensor
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPEC = CodebookSpec(
    vector_length=2,
    stages=(5, 3),
    code_bits=(9, 4),
    codebook_dtype="bfloat16",
    scale_axis="row",
    permuted=True,
    uniform_columns=1,
    uniform_bits=3,
)

# Names that a file system, a zip file or a path could take for something else.
NAMES = (
    "model.layers.0.self_attn.q_proj",
    "a",
    "A",
    "a/codes",
    "..",
    ".",
    ".hidden",
    "../../etc/passwd",
    "/root",
    "a.codebook",
    "a.codebook_0",
    "a.npy",
    "100%",
    "100%25",
    "слой.0",
    "\u00e9",
    "e\u0301",
    "back\\slash",
    'say "hi" *?',
    "~",
    "x" * 1024,
    "x" * 1023 + "y",
    "漢" * 1024,
    "__vqbench__",
    "layers.json",
)


def small() -> QuantizedTensor:
    return random_tensor(SPEC, 6, 9, bias=True)


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    """Equal specs, sizes and bits."""
    assert (found.spec, found.n, found.k) == (expected.spec, expected.n, expected.k)
    assert list(found.parts) == list(expected.parts)
    for name, value in expected.parts.items():
        other = found.parts[name]
        assert (other.dtype, other.shape) == (value.dtype, value.shape), name
        assert torch.equal(other.view(torch.uint8), value.contiguous().view(torch.uint8)), name


def assert_tells(outline: DescribedTensor, tensor: QuantizedTensor) -> None:
    """An outline from a description is that of `tensor`."""
    assert (outline.spec, outline.n, outline.k) == (tensor.spec, tensor.n, tensor.k)
    assert outline.bias == (tensor.bias is not None)
    assert outline.stored_bytes == sum(part.nbytes for part in tensor.parts.values())


def redescribed(content: Any, parts: Iterable[tuple[str, str, bytes]]) -> Any:
    """`content` with the checksums of `parts` (tensor, part, bytes) and its own made right."""
    for name, part, data in parts:
        (entry,) = (entry for entry in content["tensors"] if entry["name"] == name)
        entry["parts"][part]["sha256"] = hashlib.sha256(data).hexdigest()
    rest = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _edit(**fields: Any) -> Callable[[Any], None]:
    return lambda content: content.update(fields)


def _edit_tensor(**fields: Any) -> Callable[[Any], None]:
    return lambda content: content["tensors"][0].update(fields)


def _edit_spec(**fields: Any) -> Callable[[Any], None]:
    return lambda content: content["tensors"][0]["spec"].update(fields)


def _edit_codes(**fields: Any) -> Callable[[Any], None]:
    return lambda content: content["tensors"][0]["parts"]["codes"].update(fields)


def _twice(content: Any) -> None:
    content["tensors"].append(content["tensors"][0])


HUGE = 10**18

# By name: a change, which may return another text instead, and what the error says.
DESCRIPTION_EDITS: dict[str, tuple[Callable[[Any], str | None], str]] = {
    "a newer version": (_edit(version=2), "version is 2, but this build reads 1; upgrade"),
    "a newer spec": (_edit(spec_version=9), "spec_version is 9, but this build reads 2; upgrade"),
    "no version": (_edit(version=None), "version should be"),
    "another byte order": (_edit(byte_order="big"), "byte_order is not 'little'"),
    "another format": (_edit(format="other"), "the description is of no vqbench-"),
    "no JSON": (lambda _: "{", "not JSON"),
    "deep JSON": (lambda _: "[" * 100_000, "not JSON"),
    "a long number": (lambda _: "1" * 10_000, "not JSON"),
    "a list": (lambda _: "[]", "not a JSON object"),
    "infinity": (
        lambda content: json.dumps(content).replace('"vector_length": 2', '"vector_length": 1e999'),
        "doesn't match its checksum",
    ),
    "no checksum": (
        lambda content: json.dumps({**content, "sha256": None}),
        "doesn't match its checksum",
    ),
    "tensors an object": (_edit(tensors={}), "tensors should be"),
    "a tensor of text": (_edit(tensors=["x"]), "something else than an object"),
    "provenance a list": (_edit(provenance=[]), "provenance should be"),
    "provenance of numbers": (_edit(provenance={"seed": 1}), "provenance should hold only strings"),
    "two of a name": (_twice, "two tensors have the same name"),
    "a name of two lines": (_edit_tensor(name="a\nb"), "can't name a tensor"),
    "a huge n": (_edit_tensor(n=HUGE), "tensor 'layer': n is"),
    "n of 0": (_edit_tensor(n=0), "tensor 'layer': n is 0"),
    "another k": (_edit_tensor(k=11), "tensor 'layer': codes: its shape should be"),
    "no k": (_edit_tensor(k="9"), "tensor 'layer': k should be"),
    "bias a number": (_edit_tensor(bias=1), "tensor 'layer': bias should be"),
    "no bias": (_edit_tensor(bias=False), "tensor 'layer': its parts don't go with"),
    "made a list": (_edit_tensor(made=[]), "tensor 'layer': made is no object"),
    "made at infinity": (_edit_tensor(made={"error": -1}), "tensor 'layer': made: error is -1"),
    "parts a list": (_edit_tensor(parts=[]), "tensor 'layer': parts should be"),
    "a part too many": (
        lambda content: content["tensors"][0]["parts"].update(x={}),
        "tensor 'layer': its parts don't go with",
    ),
    "a part of text": (
        lambda content: content["tensors"][0]["parts"].update(codes="x"),
        "tensor 'layer': codes is described by something else",
    ),
    "an unknown field": (_edit_spec(colour="red"), "tensor 'layer': .*unknown field 'colour'"),
    "a huge spec": (_edit_spec(vector_length=HUGE), "tensor 'layer': vector_length is over"),
    "no room": (_edit_spec(uniform_columns=9), "tensor 'layer': 9 outlier and uniform columns"),
    "another dtype": (
        _edit_codes(dtype="int8"),
        "tensor 'layer': codes: its dtype should be uint8",
    ),
    "another shape": (_edit_codes(shape=[6, HUGE, 2]), "tensor 'layer': codes: its shape should"),
    "another checksum": (_edit_codes(sha256="0" * 64), "tensor 'layer': codes doesn't match"),
    "no digest": (_edit_codes(sha256="0"), "tensor 'layer': codes: its checksum"),
    "a file's name of numbers": (_edit_codes(file=3), "tensor 'layer': codes: its checksum or fil"),
}
