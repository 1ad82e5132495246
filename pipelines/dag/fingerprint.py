"""Hashes that say whether something is the same as before: of plain values, and of what lies at a URL."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from storage.errors import UserError
from storage.urls import list_objects


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def url_digest(url: str, options: dict[str, Any]) -> str:
    """What identifies a file or the files of a folder: a hash of their listing. UserError when nothing is there."""
    try:
        listed = list_objects(url, options)
    except UserError:
        listed = list_objects(f"{url.rstrip('/')}/*", options)
    return digest([dataclasses.asdict(info) for info in listed])
