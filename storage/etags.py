"""What tells two versions of an object apart: the tag that its store states, else a hash of its content.

Of a large object without a stated tag it is size and time, so that no listing reads it.
"""

from __future__ import annotations

import hashlib
from typing import Any

HASHED_BYTES = 64 * 2**20
"""Objects up to this size that no store tags are told apart by content, larger ones by size and time."""


def etag_of(fs: Any, path: str, info: dict[str, Any]) -> str:
    """The tag of an object on an fsspec file system, which says `info` of it."""
    if stated := stated_etag(info):
        return stated
    size = int(info.get("size") or 0)
    if size <= HASHED_BYTES:
        with fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # whose size may be more than it says
    return size_and_time(size, info.get("mtime", info.get("created", "")))


def stated_etag(info: dict[str, Any]) -> str | None:
    """The tag that a store states."""
    keys = ("ETag", "etag", "md5Hash", "content_md5")
    return next((str(info[key]).strip('"') for key in keys if info.get(key)), None)


def size_and_time(size: int, time: Any) -> str:
    """The tag of a large object."""
    return f"{size}-{time}"
