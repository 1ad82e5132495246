"""Which code and which libraries a process runs: kept in manifests and shown by `plan`, for information.

They never decide whether a stage runs. What changes a stage's bytes raises its `output_version`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOMS = ("model", "pipelines", "storage", "tokenization")
"""The packages whose code makes a run's output."""


@functools.cache
def code_version() -> str:
    """A hash, 16 hex digits, over every source file of `ROOMS` as this process imports them."""
    digest = hashlib.sha256()
    for room in ROOMS:
        place = _place(room)
        sources = [path for path in place.rglob("*") if path.suffix in (".py", ".j2")] if place.is_dir() else [place]
        for path in sorted(sources):
            content = path.read_bytes()
            digest.update(f"{room} {path.relative_to(place).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def code_place() -> str:
    """The folder from which this process imports `ROOMS`, or where it finds the first that is not in that folder."""
    home = Path(__file__).parents[2]
    return str(next((_place(room) for room in ROOMS if _place(room) != home / room), home))


def _place(room: str) -> Path:
    """A package's folder, or the file of a module that is found by that name instead. Imports nothing."""
    spec = importlib.util.find_spec(room)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(room)
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def made_by(libraries: Iterable[str]) -> dict[str, str]:
    """Versions by name, of Ringworld's code and of these distributions; one that is not installed is left out."""
    return {"code": code_version()} | {name: version for name in libraries if (version := _installed(name))}


def changed_versions(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, in a few words each. then: as a manifest has it, nothing where it is of an older format."""
    words = ["other code"] if then.get("code") not in (None, now["code"]) else []
    return words + [
        f"{name} {then[name]} (now {version})"
        for name, version in now.items()
        if name != "code" and name in then and then[name] != version
    ]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
