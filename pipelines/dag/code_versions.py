"""What code a stage's output depends on: the stage's own module and all it imports from `tokenization` and `model`, and
how pictures are found in raw objects.

A module is hashed without comments and docstrings, so prose never re-runs a stage. The rest of `pipelines` (storage,
progress, the cluster) decides where and when things happen, not what comes out, and is left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

_FOLLOWED = ("tokenization", "model", "pipelines.sources.media", "pipelines.sources.frames", "pipelines.decoder")


@functools.cache
def code_hashes(entry: str) -> dict[str, str]:
    """Hash by module name of `entry` (a module, or a package with all that is in it) and the modules it depends on."""
    found = dict(_templates_of(entry))
    waiting = list(_modules_of(entry))
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        tree = ast.parse(_source(module).read_text(encoding="utf-8"))
        waiting += [name for name in _imports(tree) if _is_followed(name)]
        found[module] = hashlib.sha256(ast.unparse(_without_docstrings(tree)).encode()).hexdigest()[:16]
    return dict(sorted(found.items()))


def _modules_of(entry: str) -> Iterator[str]:
    source = _source(entry)
    if source.name != "__init__.py":
        yield entry
        return
    for path in sorted(source.parent.rglob("*.py")):
        inside = path.relative_to(source.parent).with_suffix("").parts
        yield ".".join([entry, *(part for part in inside if part != "__init__")])


def _templates_of(entry: str) -> Iterator[tuple[str, str]]:
    """Page templates are code too."""
    source = _source(entry)
    if source.name == "__init__.py":
        for path in sorted(source.parent.rglob("*.j2")):
            yield f"{entry}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _source(module: str) -> Path:
    source = _find(module)
    if source is None:
        raise ModuleNotFoundError(module)
    return source


def _find(module: str) -> Path | None:
    """The module's file. Nothing is imported but the room's own package: torch and the like would take seconds."""
    room, *inside = module.split(".")
    spec = importlib.util.find_spec(room)
    if spec is None or spec.origin is None:
        return None
    if not inside:
        return Path(spec.origin)
    place = Path(spec.origin).parent.joinpath(*inside)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            # `from package import module`: the name may be a module of its own.
            if _is_followed(node.module):
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in names if _find(name))


def _is_followed(name: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in _FOLLOWED)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree
