"""A subject whose oracle has spoken before is the same subject."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autotune import subject
from autotune.subject import make_subject
from tests.autotune import zoo
from vqkernels import oracle


def test_what_the_oracle_said_is_kept_and_read_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.safetensors"
    first = make_subject(zoo.tensor(), 3, zoo.DEVICE, kept=path)
    monkeypatch.setattr(oracle, "reference", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(oracle, "negative_controls", lambda *_: pytest.fail("asked again"))
    again = make_subject(zoo.tensor(), 3, zoo.DEVICE, kept=path)
    assert again.controls == first.controls != {}
    for one, other in zip(first.references, again.references, strict=True):
        assert torch.equal(one.y, other.y)
        assert torch.equal(one.spread, other.spread)
        assert one.depth == other.depth
    assert all(torch.equal(x, other) for x, other in zip(first.xs, again.xs, strict=True))
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_kept_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "write_atomically", lambda *_: pytest.fail("written"))
    make_subject(zoo.tensor(), 1, zoo.DEVICE)
