"""Tars of members as they are given."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

Member = tuple[str, bytes]


def tar(members: Iterable[Member | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The bytes of a tar. members: names with contents, or whole headers without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as made:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                made.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            made.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar in a file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(members.items()))
    return path
