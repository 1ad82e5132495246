"""The keys of a shard's sequences, of which two numbers are kept where they are numbered through.

In: the keys in order. Out: the same keys as a sequence, and as JSON. The packer's keys are a prefix and eight digits
that count up, so a shard of a thousand sequences has no thousand strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SerialKeys(Sequence[str]):
    """`{prefix}{number:08d}` for `size` numbers from `first` on."""

    prefix: str
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: Any) -> Any:
        return f"{self.prefix}{range(self.first, self.first + self.size)[number]:08d}"


def compact_keys(keys: Sequence[str]) -> Sequence[str]:
    """The same keys: as `SerialKeys` where each follows from the first, otherwise as they are."""
    numbered = re.fullmatch(r"(.*)([0-9]{8})", keys[0], re.DOTALL) if keys else None
    if not numbered:
        return tuple(keys)
    serial = SerialKeys(numbered[1], int(numbered[2]), len(keys))
    return serial if all(key == own for key, own in zip(keys, serial)) else tuple(keys)


def keys_to_json(keys: Sequence[str]) -> Any:
    """Plain JSON."""
    return {"prefix": keys.prefix, "first": keys.first} if isinstance(keys, SerialKeys) else list(keys)


def keys_from_json(plain: Mapping[str, Any] | Sequence[str], count: int) -> Sequence[str]:
    """The inverse of `keys_to_json` for `count` keys. Raises KeyError, TypeError or ValueError on other JSON."""
    if isinstance(plain, Mapping):
        return SerialKeys(str(plain["prefix"]), int(plain["first"]), count)
    if len(plain) != count:
        raise ValueError(f"{len(plain)} keys of {count} sequences")
    return tuple(plain)
