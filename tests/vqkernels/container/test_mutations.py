"""10,000 random mutations of containers of every kind: an error that helps, or what was stored."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vqkernels.container.mutations import DAMAGE, Files, forge_description
from vqkernels import container
from vqkernels.errors import VqError
from vqkernels.parallel import open_parallel, save_parallel
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

Tensors = dict[str, QuantizedTensor]
Source = Mapping[str, QuantizedTensor]

# Parts of every kind; 16 x 16 and even stages, so that shapes alone tell little.
SPEC = CodebookSpec(
    vector_length=4,
    vector_axis="out",
    stages=(16, 4),
    coefficients=(1.0, 0.5),
    scale_axis="row",
    zero_axis="column",
    permuted=True,
    outlier_columns=2,
    uniform_columns=1,
)
# What an error's last words are to say: what to do.
FIX = re.compile(
    r"[;:,(] ?(or )?(and )?(copy|make|use|check|give|quantise|re-quantise|upgrade|open|split|"
    r"import|remove|choose|report|leave|convert|add)\b"
)


def some(seed: int) -> Tensors:
    shapes = {"é": (32, 200), "m.1.o_proj": (16, 16), "m.2.o_proj": (16, 16)}
    tensors = {
        name: random_tensor(SPEC, n, k, seed=seed + number, bias=True, fit=False)
        for number, (name, (n, k)) in enumerate(shapes.items())
    }
    # codes that are worth coding: four in five are 0
    skewed = tensors["é"].parts["codes"].clone()
    skewed[torch.rand(skewed.shape, generator=torch.Generator().manual_seed(seed)) < 0.8] = 0
    return {**tensors, "é": tensors["é"].replace_parts(codes=skewed)}


def save(kind: str, folder: Path, tensors: Tensors) -> None:
    if kind == "shards":
        container.save_shards(folder, tensors, shard_bytes=1, codes="ans")
    elif kind == "ranks":
        save_parallel(folder, tensors, ranks=2, shard_bytes=1)
    else:
        folder.mkdir()
        coding: Any = kind
        container.save(folder / "x.safetensors", tensors, codes=coding)


OPENERS: dict[str, Callable[[Path], Source]] = {
    "packed": lambda folder: container.open_container(folder / "x.safetensors"),
    "ans": lambda folder: container.open_container(folder / "x.safetensors"),
    "shards": container.open_container,
    "ranks": open_parallel,
}


class Subject:
    """A container of one kind: its files, another model's, and what it holds."""

    def __init__(self, kind: str, top: Path) -> None:
        self.kind, self.folder, self.tensors = kind, top / kind, some(0)
        save(kind, self.folder, self.tensors)
        self.files = self._read(self.folder)
        save(kind, top / f"{kind}-other", some(100))
        self.others = self._read(top / f"{kind}-other")
        self._there = dict(self.files)

    def _read(self, folder: Path) -> Files:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def put(self, files: Files) -> None:
        """Make the folder hold `files`."""
        for name in {*files, *self._there}:
            if files.get(name) != self._there.get(name):
                path = self.folder / name
                path.unlink(missing_ok=True)  # a mapped file is left as it is
                if name in files:
                    path.write_bytes(files[name])
        self._there = dict(files)

    def read(self) -> tuple[Tensors, str | None]:
        """What can be read, and the first error's text; any error has to be a good one."""
        try:
            source = OPENERS[self.kind](self.folder)
        except VqError as error:
            return {}, self._checked(error)
        found, text = {}, None
        for name in source:
            try:
                found[name] = source[name]
            except VqError as error:
                text = text or self._checked(error, name)
        return found, text

    def _checked(self, error: VqError, name: str = "") -> str:
        text = str(error)
        assert "\n" not in text
        path, _, rest = text.partition(": ")
        assert path == str(self.folder) or path.startswith(f"{self.folder}/"), text
        assert len(text) < 2000, text
        assert FIX.search(rest), text
        if name:
            assert f"tensor {name!r}" in rest, text
        return text

    def check_same(self, found: Tensors) -> None:
        for name, tensor in found.items():
            expected = self.tensors[name]
            assert (tensor.spec, tensor.n, tensor.k) == (expected.spec, expected.n, expected.k)
            assert list(tensor.parts) == list(expected.parts)
            for part, value in tensor.parts.items():
                assert value.dtype == expected.parts[part].dtype
                assert torch.equal(value, expected.parts[part])


@pytest.fixture
def subjects(tmp_path: Path) -> Iterator[list[Subject]]:
    yield [Subject(kind, tmp_path) for kind in OPENERS]
    shutil.rmtree(tmp_path)


def mutate(subjects: list[Subject], count: int) -> None:
    """The outcomes of mutations 0 to count - 1, one after the other on each kind of container."""
    refused = dict.fromkeys(OPENERS, 0)
    for number in range(count):
        rng, subject = random.Random(number), subjects[number % len(subjects)]
        files = None
        while files is None:
            mutation = rng.choice(DAMAGE)
            files = mutation(rng, subject.files, subject.others)
        subject.put(files)
        try:
            found, error = subject.read()
            subject.check_same(found)
            assert error or list(found) == list(subject.tensors)
            refused[subject.kind] += error is not None
        except BaseException as error:
            error.add_note(f"mutation {number}: {mutation.__name__} of {subject.kind}")
            raise
    # nearly everything is damage that shows
    assert min(refused.values()) > 0.8 * count / len(subjects), refused


def test_300_mutations(subjects: list[Subject]) -> None:
    mutate(subjects, 300)


@pytest.mark.sweep
def test_10000_mutations(subjects: list[Subject]) -> None:
    mutate(subjects, 10_000)


def forge(subjects: list[Subject], count: int) -> None:
    """Descriptions edited by somebody who gives them their checksums again.

    What is read with its dequantised values checked has the weights that were stored.
    """
    kinds = [subject for subject in subjects if subject.kind in ("packed", "ans")]
    for number in range(count):
        rng, subject = random.Random(number), kinds[number % 2]
        files = forge_description(rng, subject.files, subject.others)
        assert files is not None
        subject.put(files)
        try:
            subject.read()
            for name, tensor in verified(subject.folder / "x.safetensors").items():
                expected = subject.tensors[name].stored_weight().float()
                assert torch.equal(tensor.stored_weight().float(), expected)
        except BaseException as error:
            error.add_note(f"forgery {number} of {subject.kind}")
            raise


def verified(path: Path) -> Tensors:
    try:
        return container.load(path, decoded=True)
    except VqError:
        return {}


def test_100_forgeries(subjects: list[Subject]) -> None:
    forge(subjects, 100)


@pytest.mark.sweep
def test_2000_forgeries(subjects: list[Subject]) -> None:
    forge(subjects, 2000)


def test_what_was_not_changed_is_read(subjects: list[Subject]) -> None:
    for subject in subjects:
        found, error = subject.read()
        assert error is None
        assert list(found) == list(subject.tensors)
        subject.check_same(found)
        assert len(subject.files) == len(subject.others)
    kinds = {subject.kind: subject for subject in subjects}
    assert len(kinds["shards"].files) == 4
    assert len(kinds["ranks"].files) > 5
    for kind in ("ans", "shards"):
        assert any(b"ans_0" in data for data in kinds[kind].files.values())
