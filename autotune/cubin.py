"""Read a compiled program without running it: registers, spills, shared memory and the hot loop.

NVIDIA's cuobjdump and nvdisasm do the reading; they need neither a GPU nor a driver.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from autotune import sass
from autotune.sass import Traffic
from vqkernels.errors import BackendError

__all__ = ["Cubin", "read_cubin", "tool"]

# From sm_90 on, the figure of static shared memory counts 1 KB that the system keeps a block; a
# device's limit doesn't.
_RESERVED = 1024
_RESERVED_SINCE = 90
_TIMEOUT_S = 120

_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclasses.dataclass(frozen=True)
class Cubin:
    """One function of a compiled program; bytes are a thread's, shared memory a block's.

    spill_*_bytes: moved to and from local memory, each instruction counted once. loop: the hot
    loop; all of the program where none loops.
    """

    function: str
    arch: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int
    instructions: int
    loop: Traffic

    @property
    def spill_bytes(self) -> int:
        """Stores and loads together."""
        return self.spill_store_bytes + self.spill_load_bytes


def read_cubin(image: bytes, function: str | None = None) -> Cubin:
    """What `image`, an ELF of machine code, needs and does.

    function: which, where it holds several. Raises BackendError where a tool is missing or fails,
    or the function isn't there.
    """
    with tempfile.TemporaryDirectory(prefix="vqbench-") as folder:
        path = Path(folder) / "program.cubin"
        path.write_bytes(image)
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        listing = _run("nvdisasm", "--print-code", "--no-dataflow", path)
    found = {match[1]: match for match in _USAGE.finditer(usage)}
    code = sass.functions(listing)
    chosen = function or next(iter(found), "")
    if chosen not in found or chosen not in code or (function is None and len(found) > 1):
        raise BackendError(
            f"compiled program: {function or 'one function'} was asked for, it holds "
            f"{', '.join(found) or 'none'}; name one of them"
        )
    arch = sass.target(listing)
    if arch is None:
        raise BackendError("compiled program: nvdisasm names no architecture; is it too new?")
    registers, stack, shared = (int(found[chosen][group]) for group in (2, 3, 4))
    whole = sass.traffic(code[chosen])
    reserved = _RESERVED if int(arch.removeprefix("sm_")) >= _RESERVED_SINCE else 0
    return Cubin(
        function=chosen,
        arch=arch,
        registers=registers,
        stack_bytes=stack,
        spill_store_bytes=whole.local_store_bytes,
        spill_load_bytes=whole.local_load_bytes,
        static_shared_bytes=max(0, shared - reserved),
        instructions=whole.instructions,
        loop=sass.traffic(sass.hot_loop(code[chosen])),
    )


def _run(name: str, *arguments: str | Path) -> str:
    command = [tool(name), *map(str, arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{command[0]}: {error}; check the installation") from error
    if done.returncode:
        line = next(iter(done.stderr.strip().splitlines()), "no message")
        raise BackendError(f"{command[0]}: {line}; is this a cubin of a known architecture?")
    return done.stdout


@functools.cache
def tool(name: str) -> str:
    """The path of one of NVIDIA's tools. Raises BackendError where it is nowhere."""
    for folder in _folders():
        if found := shutil.which(name, path=str(folder)):
            return found
    if found := shutil.which(name):
        return found
    raise BackendError(
        f"{name} is missing; install triton, whose wheel carries it, or the CUDA toolkit, and put "
        f"it on the PATH or its folder in CUDA_HOME"
    )


def _folders() -> list[Path]:
    """Where the tools are found beside the PATH; wheels first, since they match their compiler."""
    spec = importlib.util.find_spec("triton")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    folders = [place / "backends" / "nvidia" / "bin" for place in places]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "bin")
    return folders
