"""Which code a kernel is: a hash that comments and layout leave alone, and any other change moves.

A kernel is its module and all modules that these import from one another within their own
distribution, as syntax trees: what numba and Triton compile, too, so that equal trees, compilers
and configs give equal machine code. CUDA's texts count by their bytes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from vqkernels.kernel import Kernel

__all__ = ["code_hash"]


def code_hash(kernel: Kernel) -> str:
    """SHA-256 of the code that `kernel` consists of."""
    first = inspect.unwrap(kernel.supports).__module__
    digest, waiting, seen = hashlib.sha256(), [first], {first}
    root = first.partition(".")[0]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if path is None:
            continue
        tree = ast.parse(path.read_bytes())
        digest.update(name.encode() + ast.dump(_undocumented(tree)).encode())
        found = {one for one in _imports(tree, name) if one.partition(".")[0] == root}
        waiting += sorted(found - seen)
        seen |= found
    start = _file(first)
    for path in sorted(start.parent.rglob("*.cuh")) if start is not None else ():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _file(name: str) -> Path | None:
    """The source of a module; None of what is no module (a function's name) or has no source."""
    module = sys.modules.get(name)
    try:
        spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Modules that `module` may import anywhere, also what may be a name in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module)
            yield base
            yield from (f"{base}.{one.name}" for one in node.names)


def _base(node: ast.ImportFrom, module: str) -> str:
    """What `from ... import` names, where dots count from `module`."""
    if not node.level:
        return node.module or ""
    path = _file(module)
    package = module.split(".")
    dropped = node.level - (path is not None and path.name == "__init__.py")
    parts = package[: len(package) - dropped]
    return ".".join([*parts, node.module] if node.module else parts)


def _undocumented(tree: ast.AST) -> ast.AST:
    """The tree without docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body[:] = body[1:] or [ast.Pass()]
    return tree


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
