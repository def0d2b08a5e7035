"""`vqbench quantize` killed with SIGKILL, at a line or at a moment, and what the next run does.

`python -m tests.bench.quantizing.killer KIND:LINES:MOMENTS...` prints a JSON object a kill, of a
run that writes one file or shards. Forks are killed, of a process that has started no thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.commands.quantize import command
from bench.quantizing import layers, work
from tests.vqkernels.container.killer import Counter, names

FILES = (
    "/vqkernels/atomic.py",
    "/container/join.py",
    "/container/shards.py",
    "/quantizing/layers.py",
    "/quantizing/output.py",
    "/quantizing/work.py",
)
LAYERS = 3


class Clock(datetime):
    """The same time in every run, so that containers of two runs can be equal."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 1, 2, tzinfo=UTC)


def make_model(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{number}.weight": torch.randn(16, 32, generator=generator) for number in range(LAYERS)
    }
    save_file(tensors, path)


def run(kind: str, model: Path, folder: Path, counter: Counter | None = None) -> None:
    """Quantise; each layer that is begun gets a line in `log`, beside the folder."""
    real = layers.quantize

    def logged(*arguments: Any, **options: Any) -> Any:
        with (folder.parent / "log").open("a") as log:
            log.write("begun\n")
        return real(*arguments, **options)

    work.datetime = Clock  # type: ignore[misc]
    layers.quantize = logged  # type: ignore[assignment]
    arguments = [str(model), "-f", "rq-2x16x4", "-o", str(folder), "--iterations", "2"]
    arguments += ["--shard-size", "1B"] if kind == "shards" else []
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.settrace(counter)
        with contextlib.redirect_stderr(nowhere):
            command(arguments, standalone_mode=False)
        sys.settrace(None)


def forked(*arguments: Any, line: int = -1, after_s: float | None = None) -> bool:
    """Whether a fork that quantises was killed before it had ended."""
    pid = os.fork()
    if pid == 0:
        counter = Counter(line, FILES) if line >= 0 else None
        try:
            run(*arguments, counter)
        finally:
            os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def content(folder: Path) -> dict[str, bytes]:
    # but for an index of shards that had no name yet: nobody can tell whose it is
    draft = re.compile(r"[^.][^/]*/\.vqbench-[0-9a-f]{32}\.tmp")
    return {
        name: (folder / name).read_bytes() for name in names(folder) if not draft.fullmatch(name)
    }


def begun(folder: Path) -> int:
    log = folder.parent / "log"
    count = len(log.read_text().splitlines()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def main(kind: str, points: int, moments: int) -> None:
    with tempfile.TemporaryDirectory() as top:
        model = Path(top, "model.safetensors")
        make_model(model)
        start = time.perf_counter()
        forked(kind, model, Path(top, "clean"))
        duration_s = time.perf_counter() - start
        clean = content(Path(top, "clean"))
        rng = random.Random(0)
        kills: Sequence[tuple[int, float | None]] = [
            *((line, None) for line in lines(kind, model, Path(top, "counted"), points)),
            *((-1, rng.uniform(0, duration_s)) for _ in range(moments)),
        ]
        for number, (line, after_s) in enumerate(kills):
            folder = Path(top, str(number), "out")
            folder.parent.mkdir()
            record: dict[str, Any] = {"kind": kind, "line": line, "layers": LAYERS}
            record["killed"] = forked(kind, model, folder, line=line, after_s=after_s)
            left = names(folder) if folder.exists() else []
            record["finished"] = sum(bool(re.search(r"/\d{5}\.safetensors$", f)) for f in left)
            record["complete"] = {f for f in left if not f.startswith(".")} == set(clean)
            begun(folder)
            forked(kind, model, folder)
            record["begun"] = begun(folder)
            record["same"] = content(folder) == clean
            print(json.dumps(record), flush=True)  # noqa: T201


def lines(kind: str, model: Path, folder: Path, points: int) -> list[int]:
    """Lines to kill at, evenly spread over those of a run, the last among them."""
    read, write = os.pipe()
    if os.fork() == 0:
        counter = Counter(-1, FILES)
        run(kind, model, folder, counter)
        os.write(write, str(counter.lines).encode())
        os._exit(0)
    os.wait()
    count = int(os.read(read, 20))
    return [(count - 1) * number // max(1, points - 1) for number in range(points)]


if __name__ == "__main__":
    for job in sys.argv[1:]:
        kind, *counts = job.split(":")
        main(kind, *map(int, counts))
