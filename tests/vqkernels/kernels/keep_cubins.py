"""What the GPU kernels compile to, as kept in cubins.csv and compared by test_cubins.py.

    python -m tests.vqkernels.kernels.keep_cubins                  rewrite the table
    python -m tests.vqkernels.kernels.keep_cubins --print core     rows as JSON; or: all

Needs no GPU. Runs without TRITON_INTERPRET, so tests start it as a process of its own.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autotune.inspection import ARCHS, Inspection, inspect_kernel, stand_in
from vqkernels.device import Device
from vqkernels.kernel import Kernel, registry
from vqkernels.presets import parse_format
from vqkernels.problem import Problem
from vqkernels.space import Config

TABLE = Path(__file__).with_name("cubins.csv")

FORMATS = ("aqlm-2x8", "rq-4x256x8", "vptq-65536-256", "pq-m8", "vq-256x32")
SIDE = 4096
SAMPLES = 6  # of each space, on sm_90
_SAMPLE_FORMATS = ("aqlm-2x8", "vptq-65536-256")
# Every kernel on both vector axes on one architecture, and the oldest and the newest.
_CORE = {("aqlm-2x8", "sm_80"), ("aqlm-2x8", "sm_120")} | {(f, "sm_90") for f in _SAMPLE_FORMATS}

Row = dict[str, Any]
Case = tuple[Kernel, str, Problem, Device, Config | None]

COMPARED_ONLY = ("footprint_bytes",)  # with its own row, so the table needs no column for it
KEY = ("kernel", "format", "m", "arch", "config")


def gpu_kernels() -> list[Kernel]:
    """Every kernel that launches programs of its own."""
    return [k for k in registry().kernels.values() if k.programs is not None]


def tokens(kernel: Kernel) -> tuple[int, ...]:
    """The m that a kernel's default is kept for: what it is meant for."""
    return (16, 64) if kernel.name == "mma" else (1,)


def problem(name: str, m: int) -> Problem:
    return Problem(m=m, n=SIDE, k=SIDE, spec=parse_format(name), dtype="float16")


def cases(scope: str) -> Iterator[Case]:
    """Defaults, and for `all` a seeded sample of each space."""
    kernels = gpu_kernels()
    for kernel, name, arch in itertools.product(kernels, FORMATS, ARCHS):
        for m in tokens(kernel):
            asked, device = problem(name, m), stand_in(arch)
            wanted = scope == "all" or ((name, arch) in _CORE and m == tokens(kernel)[0])
            if wanted and kernel.supports(asked, device) is None:
                yield kernel, name, asked, device, None
    if scope == "all":
        for kernel in kernels:
            yield from sampled(kernel)


def sampled(kernel: Kernel) -> Iterator[Case]:
    """A few configs of the whole space, valid ones, formats in turn."""
    rng, device = random.Random(kernel.id), stand_in("sm_90")
    formats = itertools.cycle(_SAMPLE_FORMATS)
    seen: set[Config] = set()
    for _ in range(1000):
        config = Config(**{p.name: rng.choice(p.values) for p in kernel.space.params})
        if config in seen or kernel.space.broken(config):
            continue
        name = next(formats)
        asked = problem(name, tokens(kernel)[0])
        if kernel.supports(asked, device) is None:
            seen.add(config)
            yield kernel, name, asked, device, config
        if len(seen) == SAMPLES:
            return


def row(case: Case, one: Inspection) -> Row:
    """A line of the table; all values as text, as they come back from the file."""
    kernel, name, asked, device, config = case
    code = one.code
    chosen = one.config or {}
    values = {
        "kernel": kernel.id,
        "format": name,
        "m": asked.m,
        "arch": device.arch,
        "config": " ".join(f"{key}={value}" for key, value in chosen.items()),
        "default": "yes" if config is None else "no",
        "compiler": one.compiler,
        "status": one.status,
        "registers": code and code.registers,
        "spill_bytes": code and code.spill_bytes,
        "shared_bytes": one.shared_bytes,
        "global_load_bytes": code and _widths(code.loop.global_loads),
        "shared_load_bytes": code and _widths(code.loop.shared_loads),
        "tensor": code and " ".join(sorted({o.partition(".")[0] for o in code.loop.tensor})),
        "reason": one.reason,
        "footprint_bytes": footprint_bytes(case, one),
    }
    return {key: "" if value is None else str(value) for key, value in values.items()}


def footprint_bytes(case: Case, one: Inspection) -> int | None:
    """Shared memory of a block as the kernel declares it, to be held to `shared_bytes`."""
    kernel, _, asked, device, _ = case
    return one.config and kernel.footprint(one.config, asked, device).shared_bytes


def _widths(loads: Any) -> str:
    return " ".join(str(width) for width in sorted(loads, reverse=True))


def rows(scope: str) -> Iterator[Row]:
    for case in cases(scope):
        kernel, _, asked, device, config = case
        for one in inspect_kernel(kernel, asked, device.arch, config):
            yield row(case, one)


def read() -> list[Row]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(found: list[Row]) -> None:
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        kept = [key for key in found[0] if key not in COMPARED_ONLY]
        writer = csv.DictWriter(file, kept, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: unset it, Triton has to compile")
    if sys.argv[1:2] == ["--print"]:
        sys.stdout.write(json.dumps(list(rows(sys.argv[2]))))
        return
    found = list(rows("all"))
    write(found)
    sys.stdout.write(f"{len(found)} rows in {TABLE}\n")


if __name__ == "__main__":
    main()
