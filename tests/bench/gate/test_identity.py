"""Which changes make another kernel of a kernel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from bench.gate.identity import code_hash
from vqkernels.kernel import registry

FILES = {
    "__init__.py": "",
    "main.py": (
        '"""Says what it is."""\n'
        "from vqplanted.other import factor\n"
        "from . import near\n"
        "def supports(problem, device):\n"
        '    """None."""\n'
        "    return None\n"
        "def compile(config):\n"
        "    from vqplanted import late\n"
        "    return late.value * factor\n"
    ),
    "other.py": "factor = 2\n",
    "near.py": "from .other import factor as again\n",
    "late.py": "value = 3\n",
    "unused.py": "value = 4\n",
    "device.cuh": "int x;\n",
}


class Planted:
    """What `code_hash` asks of a kernel."""

    def __init__(self, supports) -> None:
        self.supports = supports


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A package of kernels that can be written anew."""
    place = tmp_path / "vqplanted"
    place.mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield place
    for name in [name for name in sys.modules if name.partition(".")[0] == "vqplanted"]:
        del sys.modules[name]


def of(place: Path) -> str:
    main = importlib.import_module("vqplanted.main")
    return code_hash(Planted(main.supports))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("main.py", "* factor", "+ factor"),
        ("other.py", "2", "3"),
        ("late.py", "3", "4"),
        ("near.py", "again", "anew"),
        ("device.cuh", "int", "long"),
    ],
)
def test_code_that_differs(planted, name, old, new):
    before = of(planted)
    text = (planted / name).read_text(encoding="utf-8")
    assert old in text
    (planted / name).write_text(text.replace(old, new), encoding="utf-8")
    assert of(planted) != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("main.py", "Says what it is.", "Says something else."),
        ("main.py", '"""None."""\n', ""),
        ("main.py", "    return None\n", "    return None  # a comment\n\n\n"),
        ("other.py", "factor = 2", "factor = (2)"),
        ("unused.py", "4", "5"),
    ],
)
def test_what_changes_no_code(planted, name, old, new):
    before = of(planted)
    text = (planted / name).read_text(encoding="utf-8")
    assert old in text
    (planted / name).write_text(text.replace(old, new), encoding="utf-8")
    assert of(planted) == before


def test_kernels_of_the_registry_have_each_their_own():
    kernels = registry().kernels
    found = {code_hash(kernels[name]) for name in ("numba/table", "numba/naive", "cuda/table")}
    assert len(found) == 3
    assert code_hash(kernels["numba/table"]) == code_hash(kernels["numba/table"])
