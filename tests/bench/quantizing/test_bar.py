"""What is seen while layers are quantised."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from bench.quantizing import layers


def test_layer_count_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    now = [100.0]
    text = io.StringIO()

    class Watched(Progress):
        def add_task(self, description: str, **fields: Any) -> Any:
            seen.append({"description": description, **fields})
            return super().add_task(description, **fields)

        def update(self, task_id: Any, **fields: Any) -> None:
            seen.append(fields)
            super().update(task_id, **fields)

    console = Console(file=text, force_terminal=True, width=100)
    monkeypatch.setattr(layers, "Progress", Watched)
    monkeypatch.setattr(layers, "Console", lambda **_: console)
    monkeypatch.setattr(layers, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr(layers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with layers._bar({"a.weight": 10, "b.weight": 30}, done=2) as step:
        with step("a.weight"):
            now[0] = 108.0
        with step("b.weight"):
            now[0] = 130.0
    assert seen == [
        {"description": "", "total": 40, "layers": "2/4", "end_s": None},
        {"description": "a.weight"},
        # 8 s for 10 weights: 24 s for the other 30
        {"completed": 10, "layers": "3/4", "end_s": 132.0},
        {"description": "b.weight"},
        {"completed": 40, "layers": "4/4", "end_s": 130.0},
    ]
    assert "4/4" in text.getvalue()
    assert "b.weight" in text.getvalue()
