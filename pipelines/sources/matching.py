"""Regular expressions over a column of names: by Arrow's engine, which is linear and ten times as fast, where it can.

In: patterns as `fnmatch` and `storage.globs` write them, and names. Out: a mask, the same as Python's engine gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ESCAPE_OR_CLASS = re.compile(r"\\.|\[[^\]]*\]?", re.DOTALL)
_PLAIN_CLASS = re.compile(r"\[\^?[A-Za-z0-9/_-]+\]")
"""Of characters that mean the same to both engines."""


def matches_any(patterns: Sequence[str], names: pa.Array) -> np.ndarray:
    """Which names are matched whole by at least one pattern: bool [names]."""
    plain = [one for one in map(_for_arrow, patterns) if one is not None]
    others = [pattern for pattern in patterns if _for_arrow(pattern) is None]
    mask = np.zeros(len(names), bool)
    try:
        if plain:
            found = pc.match_substring_regex(names, rf"\A(?:{'|'.join(plain)})\z")
            mask = np.array(found.to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid:  # together they are too large
        others = list(patterns)
    if others:
        matches = [re.compile(pattern).match for pattern in others]
        mask |= np.fromiter((any(match(name) for match in matches) for name in names.to_pylist()), bool, len(names))
    return mask


def _for_arrow(pattern: str) -> str | None:
    """The pattern as Arrow's engine has it, without its end; None where it may mean another thing to it."""
    pattern = _ESCAPE_OR_CLASS.sub(lambda part: r"\[" if part[0] in ("[[]", r"[\[]") else part[0], pattern)
    parts = (part for part in _ESCAPE_OR_CLASS.findall(pattern) if part.startswith("["))
    if not all(map(_PLAIN_CLASS.fullmatch, parts)) or "(?!" in pattern:
        return None
    # An atomic group, by which Python's engine need not go back, is any group to one that never does.
    return pattern.replace("(?>", "(?:").removesuffix(r"\Z")
