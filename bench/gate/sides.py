"""The two sides of a gate: which code a process finds, and with which configs.

Measuring code is the same on both (see `measure`): a folder with links to this build's `bench` and
`autotune` comes first where a process looks for modules, then the side's own code.
"""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import autotune
import bench
import vqkernels
from bench.selection import matching_kernels
from vqkernels.errors import BackendError, ConfigError
from vqkernels.kernel import Kernel

__all__ = [
    "SIDES",
    "Side",
    "Who",
    "opposite",
    "parse_configs",
    "resolve",
    "running",
    "write_harness",
]

Who = Literal["baseline", "candidate"]
SIDES: tuple[Who, Who] = ("baseline", "candidate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One side: `what` it is in words, the interpreter, and where it looks for modules first.

    root: the folder whose `vqkernels` it must find; None where that is an installation's. revision:
    the commit, where it is one. configs, slow: see `Job`.
    """

    what: str
    python: str
    path: tuple[str, ...] = ()
    root: str | None = None
    revision: str | None = None
    configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    slow: float = 0.0


def running() -> Side:
    """The code that this process runs."""
    root = str(Path(vqkernels.__file__).parent.parent)
    return Side(what="this installation", python=sys.executable, path=(root,), root=root)


def resolve(name: str, folder: Path) -> Side:
    """The side that `name` is: a folder with source code or an environment, or a git revision.

    folder: where the files of a revision go. Raises BackendError where it is none of these.
    """
    place = Path(name)
    if place.is_dir():
        return _folder(place.resolve())
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if top is None or commit is None:
        where = "no git checkout is here" if top is None else "git knows no such revision"
        raise BackendError(
            f"side {name!r}: no folder or results file, and {where}; give a revision "
            f"(of a clone that is deep enough), a checkout, a virtual environment or a .jsonl file"
        )
    _extract(Path(top), commit, folder)
    short = commit[:9]
    found = _checkout(folder, f"{name} ({short})" if not commit.startswith(name) else short)
    return dataclasses.replace(found, revision=commit)


def opposite(baseline: Side | None) -> Side:
    """The candidate where none is named: of a revision the working tree, else what runs."""
    top = _git("rev-parse", "--show-toplevel")
    if baseline is None or baseline.revision is None or top is None:
        return running()
    return _checkout(Path(top), "working tree")


def _folder(place: Path) -> Side:
    if (place / "pyvenv.cfg").is_file():
        python = place / "bin" / "python"
        if not python.exists():
            raise BackendError(f"side {place}: an environment without bin/python; make it again")
        return Side(what=f"environment {place}", python=str(python))
    return _checkout(place, f"folder {place}")


def _checkout(place: Path, what: str) -> Side:
    """Source code: of vqbench itself, or of a package whose kernels are found by entry points."""
    own = (place / "vqkernels" / "__init__.py").is_file()
    sources = [place, *([place / "src"] if (place / "src").is_dir() else [])]
    here = running()
    return Side(
        what=what,
        python=sys.executable,
        path=(*map(str, sources), *(() if own else here.path)),
        root=str(place) if own else here.root,
    )


def _extract(top: Path, commit: str, folder: Path) -> None:
    """The files of a commit: an archive leaves no trace in the repository, however this ends."""
    done = subprocess.run(
        ["git", "-C", str(top), "archive", "--format=tar", commit], capture_output=True
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["git archive failed"]
        raise BackendError(f"side {commit[:9]}: {lines[-1]}; fetch the whole history and try again")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)  # noqa: S202  # what git itself has packed stays in its folder


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_harness(folder: Path) -> str:
    """A folder with links to the measuring code, for the front of a process's path."""
    folder.mkdir()
    for package in (autotune, bench):
        source = Path(package.__path__[0])
        (folder / source.name).symlink_to(source, target_is_directory=True)
    return str(folder)


def parse_configs(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Values by kernel id, from `numba/table:row_tile=8192,column_tile=8`; kernels by glob.

    Raises ConfigError where a kernel has no such parameter or value.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        pattern, _, values = text.partition(":")
        if not values or any("=" not in one for one in values.split(",")):
            raise ConfigError(
                f"config {text!r}: write kernel:name=value,..., such as numba/table:row_tile=8192"
            )
        for kernel in matching_kernels([pattern]):
            chosen = found.setdefault(kernel.id, {})
            for one in values.split(","):
                name, _, value = one.partition("=")
                chosen[name] = _value(kernel, name, value)
    return found


def _value(kernel: Kernel, name: str, text: str) -> Any:
    """The value of a kernel's parameter that prints as `text`."""
    params = {param.name: param for param in kernel.space.params}
    if name not in params:
        raise ConfigError(
            f"config {kernel.id}: no parameter {name!r}; there are {', '.join(params) or 'none'}"
        )
    values = {str(value).lower(): value for value in params[name].values}
    if text.lower() not in values:
        raise ConfigError(f"config {kernel.id}: {name}={text} is not one of {', '.join(values)}")
    return values[text.lower()]
