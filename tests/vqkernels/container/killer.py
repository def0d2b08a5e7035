"""Writers that are killed with SIGKILL, at a line of theirs or at a moment, and what they leave.

`python -m tests.vqkernels.container.killer KIND:BEFORE:LINES:MOMENTS...` prints a JSON object a
kill: of a writer of shards or ranks, with an old set there before or none, at so many lines and
moments. A fork is killed, of a process that has started no thread; a test would start python and
import torch for each.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vqkernels import container
from vqkernels.errors import VqError
from vqkernels.parallel import open_parallel, save_parallel
from vqkernels.presets import PRESETS
from vqkernels.source import TensorSource
from vqkernels.tensor import QuantizedTensor, random_tensor

WRITERS = ("/vqkernels/atomic.py", "/container/shards.py", "/parallel/folder.py")


def some(seed: int, count: int = 3) -> dict[str, QuantizedTensor]:
    spec = PRESETS["toy-16-4"]
    return {f"m.{i}": random_tensor(spec, 16, 16, seed=seed + i) for i in range(count)}


def write(kind: str, folder: Path, tensors: dict[str, QuantizedTensor]) -> None:
    if kind == "shards":
        container.save_shards(folder, tensors, shard_bytes=1, usage=False)
    else:
        save_parallel(folder, tensors, ranks=2, usage=False)


def found(kind: str, folder: Path, sets: dict[str, dict[str, QuantizedTensor]]) -> str:
    """Which of `sets` a reader finds, every bit of it; or the error it meets."""
    try:
        source: TensorSource = (
            container.open_container(folder) if kind == "shards" else open_parallel(folder)
        )
        read = {name: source[name] for name in source}
    except VqError as error:
        return str(error)
    for name, tensors in sets.items():
        if list(read) == list(tensors) and all(
            torch.equal(read[one].parts[part], value)
            for one, tensor in tensors.items()
            for part, value in tensor.parts.items()
        ):
            return name
    return "a mixture"


class Counter:
    """Counts the lines of the writers that are run, and kills the process at one of them."""

    def __init__(self, kill_at: int = -1, files: tuple[str, ...] = WRITERS) -> None:
        self.lines, self._kill_at, self._files = 0, kill_at, files

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self._files):
            return None
        if event == "line":
            if self.lines == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.lines += 1
        return self


def killed(kind: str, folder: Path, tensors: Any, *, line: int, after_s: float) -> bool:
    """Whether a fork that writes `tensors` was killed before it had ended."""
    pid = os.fork()
    if pid == 0:
        if line >= 0:
            sys.settrace(Counter(line))
        write(kind, folder, tensors)
        os._exit(0)
    if line < 0:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def main(kind: str, before: str, points: int, moments: int) -> None:
    sets = {"old": some(0), "new": some(10), "next": some(20)}
    with tempfile.TemporaryDirectory() as top:
        template, clean = Path(top, "template"), Path(top, "clean")
        if before == "old":
            write(kind, template, sets["old"])
        write(kind, clean, sets["next"])
        for line, after_s in kills(kind, template, sets["new"], points, moments):
            folder = Path(top, "set")
            copy(template, folder)
            record: dict[str, Any] = {"kind": kind, "before": before, "line": line}
            record["killed"] = killed(kind, folder, sets["new"], line=line, after_s=after_s)
            record["found"] = found(kind, folder, sets)
            write(kind, folder, sets["next"])
            record["next"] = found(kind, folder, sets)
            # an index that had no name yet is no shard: nobody can tell whose it is
            stays = [name for name in names(folder) if not name.startswith(".vqbench-")]
            record["clean"] = stays == names(clean)
            print(json.dumps(record), flush=True)  # noqa: T201
            shutil.rmtree(folder)


def copy(template: Path, folder: Path) -> Path:
    if template.exists():
        shutil.copytree(template, folder)
    return folder


def kills(
    kind: str, template: Path, tensors: Any, points: int, moments: int
) -> list[tuple[int, float]]:
    """Lines to kill at, evenly spread, and moments (line -1) within a write's duration."""
    count, folder = Counter(), copy(template, template.parent / "counted")
    start = time.perf_counter()
    sys.settrace(count)
    write(kind, folder, tensors)
    sys.settrace(None)
    duration_s = time.perf_counter() - start
    rng = random.Random(0)
    # the last one comes when all is in its place
    lines = [(count.lines - 1) * number // (points - 1) for number in range(points)]
    return [(line, 0.0) for line in lines] + [
        (-1, rng.uniform(0, duration_s)) for _ in range(moments)
    ]


if __name__ == "__main__":
    for job in sys.argv[1:]:
        kind, before, *counts = job.split(":")
        main(kind, before, *map(int, counts))
