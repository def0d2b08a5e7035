from __future__ import annotations

import ctypes

import pytest

from autotune import memory
from vqkernels import heap

MIB = 1 << 20


def test_freed_pages_go_back():
    if memory.resident_peak() is None or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this system doesn't tell what a process holds, or can't be asked to free it")
    held = [bytearray(50_000) for _ in range(1000)]
    top = bytearray(50_000)  # keeps the heap from shrinking
    before = memory._status_bytes("VmRSS")
    del held
    heap.release()
    assert before - memory._status_bytes("VmRSS") > 40 * MIB
    assert top


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.release()
