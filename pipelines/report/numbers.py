"""Numbers as the report and the plan write them."""

from __future__ import annotations


def context_name(tokens: int) -> str:
    """A context as it is called: 1024 -> 1K, 1048576 -> 1M, 1000 -> 1,000."""
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{suffix}"
    return f"{tokens:,}"


def count(number: float) -> str:
    """A count with three digits at most and a prefix: 1234567 -> 1.23M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"


def count_of(number: float, things: str) -> str:
    """A count with what it counts: 1 shard, 12 shards."""
    return f"{count(number)} {things[:-1] if number == 1 else things}"
