"""What a launch is told and what it tells: faults, counts per line, and their C structs."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
from pathlib import Path

__all__ = ["BufferStruct", "Fault", "FaultStruct", "Kind", "LaunchStruct", "Report", "Site"]
__all__ += ["SiteStruct"]


class Kind(enum.StrEnum):
    """What can be wrong with a launch."""

    OUT_OF_BOUNDS = "out_of_bounds"
    MISALIGNED = "misaligned"
    READ_ONLY = "read_only"
    UNWRITTEN = "unwritten"
    RACE = "race"
    IN_FLIGHT = "in_flight"  # touched before the copy to it has been waited for
    DIVERGENT_BARRIER = "divergent_barrier"
    DIVERGENT_WARP = "divergent_warp"
    DEADLOCK = "deadlock"
    BARRIER_MISUSE = "barrier_misuse"
    UNFINISHED_COPY = "unfinished_copy"
    BLOCK_EXITED = "block_exited"  # before another block read its shared memory
    ORDER_DEPENDENT = "order_dependent"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong, where it was seen: `thread` of `block`, at `file:line`.

    other_line, other_thread: of the access that a race is with; None where there is none.
    """

    kind: Kind
    message: str
    file: str
    line: int
    thread: int
    block: tuple[int, int, int]
    other_line: int | None = None
    other_thread: int | None = None

    def __str__(self) -> str:
        where = f"{Path(self.file).name}:{self.line}: thread {self.thread} of block {self.block}"
        return f"{where}: {self.kind}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Site:
    """The accesses of one kind and width at one line.

    kind: global_load, _store, _atomic, _copy, _bulk_copy; shared_load, _store, _atomic;
    cluster_load. lanes: accesses. requests: accesses of warps. sectors: 32 bytes of global memory
    each. wavefronts: of shared memory; ideal: without bank conflicts.
    """

    kind: str
    file: str
    line: int
    width: int
    lanes: int
    bytes: int
    requests: int
    sectors: int
    wavefronts: int
    ideal: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a launch did."""

    faults: tuple[Fault, ...]
    sites: tuple[Site, ...]

    def check(self) -> None:
        """Raises AssertionError with all faults."""
        assert not self.faults, "\n".join(str(fault) for fault in self.faults)

    def total(self, kind: str, count: str = "bytes") -> int:
        """A count over the lines whose kind begins so: `global_load`, `shared`."""
        return sum(getattr(site, count) for site in self.sites if site.kind.startswith(kind))


# As runtime/records.h has them.


class BufferStruct(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("initialised", ctypes.c_int32),
    )


class LaunchStruct(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(BufferStruct)),
        ("buffer_count", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("cluster", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("counting", ctypes.c_int32),
        ("max_faults", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
    )


class FaultStruct(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char * 24),
        ("message", ctypes.c_char * 400),
        ("file", ctypes.c_char * 256),
        ("line", ctypes.c_int32),
        ("thread", ctypes.c_int32),
        ("block", ctypes.c_int32 * 3),
        ("other_file", ctypes.c_char * 256),
        ("other_line", ctypes.c_int32),
        ("other_thread", ctypes.c_int32),
    )

    def record(self) -> Fault:
        x, y, z = self.block
        other = bool(self.other_file)
        return Fault(
            Kind(self.kind.decode()),
            self.message.decode(),
            self.file.decode(),
            self.line,
            self.thread,
            (x, y, z),
            self.other_line if other else None,
            self.other_thread if other and self.other_thread >= 0 else None,
        )


class SiteStruct(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char * 24),
        ("file", ctypes.c_char * 256),
        ("line", ctypes.c_int32),
        ("width", ctypes.c_int32),
        *((name, ctypes.c_uint64) for name in ("lanes", "bytes", "requests")),
        *((name, ctypes.c_uint64) for name in ("sectors", "wavefronts", "ideal")),
    )

    def record(self) -> Site:
        values = {name: getattr(self, name) for name, _ in self._fields_}
        return Site(**{**values, "kind": self.kind.decode(), "file": self.file.decode()})
