"""JSON that carries its own checksum, and what is read of JSON that nobody vouches for.

What says something of a container (a header, an index of shards, a mapping of ranks) is two
strings: `vqbench`, a JSON object as text, and `vqbench_sha256`, the SHA-256 of that text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vqkernels.errors import ContainerError

__all__ = [
    "DAMAGED",
    "DIGEST",
    "MAX_TEXT",
    "TEXT",
    "check_version",
    "field",
    "json_object",
    "read_json",
    "sign",
    "signed",
    "unique_names",
]

TEXT, DIGEST = "vqbench", "vqbench_sha256"

MAX_TEXT = 1 << 25  # 32 MB: 20,000 matrices; safetensors refuses headers above 100 MB
MAX_FILE = 8 * MAX_TEXT  # of an index: names of shards, parts and matrices

DAMAGED = "it was damaged or edited; copy or make it again"
_UPGRADE = "upgrade vqbench (pip install -U vqbench)"

T = TypeVar("T")


def sign(content: Mapping[str, Any]) -> dict[str, str]:
    """The two strings that stand for `content`. Raises ContainerError for one that is too long."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_TEXT:
        raise ContainerError(
            f"the description takes {len(text):,} bytes of at most {MAX_TEXT:,}; "
            f"use several files, or less provenance"
        )
    return {TEXT: text, DIGEST: _sha256(text)}


def signed(strings: Mapping[str, Any]) -> dict[str, Any]:
    """The object that `sign` made `strings` of. Raises ContainerError for anything else."""
    text = strings.get(TEXT)
    if not isinstance(text, str) or _sha256(text) != strings.get(DIGEST):
        raise ContainerError(f"the description doesn't match its checksum; {DAMAGED}")
    return json_object(text)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises ContainerError, without the file's name."""
    try:
        if (size := path.stat().st_size) > MAX_FILE:
            raise ContainerError(f"is {size:,} bytes long, over {MAX_FILE:,}; {DAMAGED}")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ContainerError(f"can't be read ({reason}); check the path and its mode") from error
    except UnicodeDecodeError as error:
        raise ContainerError(f"is no UTF-8 text; {DAMAGED}") from error
    return json_object(text, "the file", limit=MAX_FILE)


def json_object(
    text: str, what: str = "the description", *, limit: int | None = None
) -> dict[str, Any]:
    """The JSON object that `text` is. Raises ContainerError for anything else, or too long a one.

    limit: of characters; MAX_TEXT where None.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    if len(text) > (limit := limit or MAX_TEXT):
        raise ContainerError(f"{what} is {len(text):,} bytes long, over {limit:,}; {DAMAGED}")
    try:
        content = json.loads(text, parse_constant=refuse, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{what} is not JSON ({error}); {DAMAGED}") from error
    if not isinstance(content, dict):
        raise ContainerError(f"{what} is not a JSON object; {DAMAGED}")
    return content


def field(content: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    """`content[name]`, which has to be a `kind`."""
    value = content.get(name)
    # True is an int to Python, and no number to us
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ContainerError(f"{where}: {name} should be a JSON {kind.__name__}; {DAMAGED}")
    return value


def check_version(content: Mapping[str, Any], name: str, newest: int) -> int:
    """The version in field `name`. Raises ContainerError unless this build reads it."""
    version = field(content, name, int, "the file")
    if not 1 <= version <= newest:
        known = "1" if newest == 1 else f"1 to {newest}"
        raise ContainerError(
            f"{name} is {version}, but this build reads {known}; "
            f"{_UPGRADE if version > newest else DAMAGED}"
        )
    return version


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict. Raises ValueError where a name is given twice."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} is given twice")
        content[name] = value
    return content
