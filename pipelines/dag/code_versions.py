"""Which code and which libraries a process runs: kept in manifests and shown by `plan`, for information.

They never decide whether a stage runs: a renamed helper re-runs nothing. What changes a stage's bytes raises its
`output_version`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOMS = ("model", "pipelines", "storage", "tokenization")
"""The packages whose code makes a run's output."""


@functools.cache
def code_version() -> str:
    """A hash, 16 hex digits, over every source file of `ROOMS` as this process would import them."""
    home = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (home / room).rglob("*") if path.suffix in (".py", ".j2")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(home).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


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
