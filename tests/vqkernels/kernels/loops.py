"""Instructions of a kernel's hot loop, as its `work` counts them and as the compiler made them.

    python -m tests.vqkernels.kernels.loops triton      JSON of every case of Triton's kernels

Runs without TRITON_INTERPRET, so tests start it as a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from autotune import sass
from autotune.cubin import tool
from autotune.inspection import stand_in
from vqkernels.device import known_device
from vqkernels.kernel import Kernel, registry
from vqkernels.presets import parse_format
from vqkernels.problem import Problem
from vqkernels.space import Config, Value

SIDE = 4096  # as cubins.csv: compilers fold sizes


@dataclasses.dataclass(frozen=True)
class Loop:
    """A kernel's default config for `m` tokens of a format, but for `changes`."""

    kernel: str
    form: str
    m: int = 1
    changes: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        changes = "".join(f"-{name}={value}" for name, value in self.changes)
        return f"{self.kernel}-{self.form}-m{self.m}{changes}"


def loop(kernel: str, form: str, m: int = 1, **changes: Value) -> Loop:
    return Loop(kernel, form, m, tuple(changes.items()))


CUDA = (
    loop("cuda/vectorized", "rq-2x256x8"),
    loop("cuda/staged", "rq-2x256x8", 4, gather_bytes=8),
    loop("cuda/fused_rq", "rq-2x256x8", 4, layout="packed"),
    loop("cuda/naive", "vptq-65536-256"),
)
MORE_CUDA = (
    loop("cuda/vectorized", "vptq-65536-256"),
    loop("cuda/vectorized", "vq-256x32"),
    loop("cuda/vectorized", "rq-2x256x8", 8, rows=2, tokens=8),
    loop("cuda/vectorized", "pq-m8"),
    loop("cuda/staged", "rq-2x256x8"),
    loop("cuda/staged", "rq-4x256x8"),
    loop("cuda/fused_rq", "rq-2x256x8"),
    loop("cuda/fused_rq", "rq-4x256x8", 2, layout="planes"),
    loop("cuda/naive", "rq-2x256x8"),
    loop("cuda/naive", "rq-4x256x8"),
)
TRITON = (
    loop("triton/naive", "aqlm-2x8"),
    loop("triton/naive", "aqlm-2x8", tile_rows=32, tile_cells=32),
    loop("triton/naive", "vptq-65536-256"),
    loop("triton/vectorized", "aqlm-2x8"),
    loop("triton/vectorized", "aqlm-2x8", 4),
    loop("triton/vectorized", "aqlm-2x8", load_bytes=4, tile_cells=32),
    loop("triton/vectorized", "vptq-65536-256"),
    loop("triton/fused_rq", "aqlm-2x8"),
    loop("triton/fused_rq", "aqlm-2x8", 4),
    loop("triton/fused_rq", "rq-4x256x8"),
    loop("triton/fused_rq", "aqlm-2x8", layout="packed"),
    loop("triton/staged", "aqlm-2x8"),
    loop("triton/staged", "aqlm-2x8", tile_rows=4, tile_cells=32),
    loop("triton/mma", "aqlm-2x8", 16),
    loop("triton/mma", "aqlm-2x8", 16, stage_sum="dots"),
    loop("triton/mma", "aqlm-2x8", 64),
    loop("triton/mma", "vptq-65536-256", 16),
    loop("triton/mma", "vq-256x32", 16),
    loop("triton/mma", "rq-4x256x8", 16),
    loop("triton/mma", "aqlm-2x8", 128, tokens=128, tile_k=128, warps=8, stages=1),
)


def counted(one: Loop) -> float:
    """Instructions of a warp's step, by `work`: what four times k adds, over the steps it adds."""
    kernel, device = registry()[one.kernel], known_device("h100")
    config = _config(one, kernel)
    totals = []
    for k in (SIDE, 4 * SIDE):
        problem = dataclasses.replace(_problem(one), k=k)
        assert kernel.work is not None
        launch = kernel.work(config, problem, device)[0]
        totals.append((launch.instructions, _steps(kernel, config, problem)))
    (few, few_steps), (many, many_steps) = totals
    return (many - few) / (many_steps - few_steps)


def compiled(one: Loop) -> int:
    """Instructions of the hot loop for sm_90."""
    kernel = registry()[one.kernel]
    (program,) = kernel.programs(_config(one, kernel), _problem(one))  # type: ignore[misc]
    done: Any = program.compile(90)
    image = done.asm["cubin"] if hasattr(done, "asm") else done.cubin
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.cubin"
        path.write_bytes(image)
        command = [tool("nvdisasm"), "--print-code", "--no-dataflow", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (code,) = sass.functions(listing).values()
    return sass.traffic(sass.hot_loop(code)).instructions


def _problem(one: Loop) -> Problem:
    return Problem(m=one.m, n=SIDE, k=SIDE, spec=parse_format(one.form), dtype="float16")


def _config(one: Loop, kernel: Kernel) -> Config:
    # one span: its length is what k gives
    config = kernel.default(_problem(one), stand_in("sm_90")).replace(splits=1)
    return config.replace(**dict(one.changes))


def _steps(kernel: Kernel, config: Config, problem: Problem) -> int:
    """Turns of the hot loop that all warps take, from the grid that is launched."""
    (program,) = kernel.programs(config, problem)  # type: ignore[misc]
    spec = problem.spec
    columns = problem.k // (spec.vector_length if spec.vector_axis == "in" else 1)
    rows = problem.n // (1 if spec.vector_axis == "in" else spec.vector_length)
    if kernel.id == "cuda/naive":
        return -(-rows // 32) * problem.m * columns
    if kernel.backend == "cuda":
        codes = 1
        if config["layout"] == "words":
            codes = config.number("load_bytes") // (1 if spec.max_entries <= 256 else 2)
        tiles = -(-rows // config.number("rows")) * program.grid[1]
        return tiles * -(-columns // (32 * codes))
    steps = -(-columns // program.constants["TILE_CELLS"])
    turns = len(spec.stages) if kernel.id == "triton/staged" else 1
    return program.grid[0] * program.grid[1] * program.num_warps * steps * turns


def main(backend: str) -> None:
    cases = {"cuda": (*CUDA, *MORE_CUDA), "triton": TRITON}[backend]
    found: dict[str, Any] = {str(one): [counted(one), compiled(one)] for one in cases}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
