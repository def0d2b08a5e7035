"""A recipe from a file and from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vqkernels.errors import SpecError
from vqkernels.quantize import Recipe

__all__ = ["recipe_of"]


def recipe_of(file: Path | None, settings: Sequence[str], iterations: int | None) -> Recipe:
    """The recipe in `file` (TOML, the fields of Recipe), changed by `NAME=VALUE` settings.

    iterations: a setting too. The later of two settings of one field holds. Raises SpecError for
    what is no recipe, and click.UsageError for a setting without `=`.
    """
    fields = {} if file is None else _read(file)
    if iterations is not None:
        fields["iterations"] = iterations
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"--set {text}: write NAME=VALUE, e.g. --set beam=4")
        fields[name.strip()] = _value(value.strip())
    return Recipe.from_dict(fields)


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
        Recipe.from_dict(fields)
    except (OSError, ValueError) as error:
        raise SpecError(f"recipe file {file}: {error}; give a readable TOML file") from error
    except SpecError as error:
        raise SpecError(f"recipe file {file}: {error}") from error
    return fields


def _value(text: str) -> Any:
    """A number or a truth value as TOML writes it; anything else is a word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
