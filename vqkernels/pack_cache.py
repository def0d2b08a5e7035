"""Packed weights, kept as long as what they were packed from.

A weight is known by the storages of its parts, since an autograd or compiled graph may hand over
other tensors on the same memory; storages are held weakly, so that the packed form goes with the
first of its parts, and version counters tell a change in place.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from vqkernels.kernel import Packed

__all__ = ["PackCache"]


class _Entry:
    """The packed forms of one weight at one version of its parts."""

    def __init__(self, versions: tuple[int, ...], storages: list[weakref.ref[object]]) -> None:
        self.versions = versions
        self.storages = storages  # their callbacks drop the entry
        self.packs: dict[Hashable, Packed] = {}
        self.lock = threading.Lock()


class PackCache:
    """Packed weights by what they were packed from and how; safe to share between threads."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self, meta: Hashable, parts: Sequence[Tensor], how: Hashable, pack: Callable[[], Packed]
    ) -> Packed:
        """What `pack()` gives for `parts` in the sense of `meta`, called once for each `how`.

        `pack` gives arrays on the CPU; they are kept on the device of the parts.
        """
        entry = self._entry(meta, parts)
        if (packed := entry.packs.get(how)) is not None:
            return packed
        with entry.lock:
            if (packed := entry.packs.get(how)) is None:
                packed = _apart(pack(), parts).to(parts[0].device)
                packed = _share(packed, list(entry.packs.values()))
                entry.packs[how] = packed
        return packed

    def _entry(self, meta: Hashable, parts: Sequence[Tensor]) -> _Entry:
        # on the path of every call: list comprehensions, which cost half of what generators do
        storages = [part.untyped_storage() for part in parts]
        layout = [(part.storage_offset(), part.stride()) for part in parts]
        key = (meta, *map(id, storages), *layout)
        versions = tuple([_version(part) for part in parts])
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.versions != versions:
                # runs wherever the last reference goes, so without the lock; the address of a part
                # isn't free before this has run, so what it drops is the dead entry
                def forget(_: object) -> None:
                    self._entries.pop(key, None)

                entry = _Entry(versions, [weakref.ref(memory, forget) for memory in storages])
                self._entries[key] = entry
        return entry


def _version(part: Tensor) -> int:
    # tensors made under inference mode count no versions
    return -1 if part.is_inference() else part._version


def _apart(packed: Packed, parts: Sequence[Tensor]) -> Packed:
    """The arrays, copied where they lie in a part's memory and so would keep it alive."""
    spans = [(part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()) for part in parts]

    def inside(array: Tensor) -> bool:
        return any(start <= array.data_ptr() < start + size for start, size in spans)

    arrays = packed.arrays.items()
    return Packed({name: array.clone() if inside(array) else array for name, array in arrays})


def _share(packed: Packed, others: list[Packed]) -> Packed:
    """The arrays, those of `others` where they are equal.

    Most configs of a kernel differ in tiles, not in layout: four configs for four m would
    otherwise hold four copies of the codes.
    """
    arrays = dict(packed.arrays)
    for name, array in arrays.items():
        same = [other[name] for other in others if name in other and _equal(other[name], array)]
        arrays[name] = same[0] if same else array
    return Packed(arrays)


def _equal(a: Tensor, b: Tensor) -> bool:
    # as bytes, since torch compares uint16 on no backend yet
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and torch.equal(_bytes(a), _bytes(b))
    )


def _bytes(array: Tensor) -> Tensor:
    return array.contiguous().reshape(-1).view(torch.uint8)
