"""Loss by position: windows of long text, and bins of positions whose edges are powers of two. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def bin_edges(context: int) -> list[int]:
    """Edges of bins of the positions 1 to context - 1: 1, 2, 4, .. and the context."""
    return [*(2**power for power in range((context - 1).bit_length())), context]


def windows(documents: Iterable[np.ndarray], context: int, count: int, bos_id: int) -> Iterator[np.ndarray]:
    """At most `count` windows int32 [context], each BOS and text of one document, which never reaches into another.

    documents: ids [L]; those with less text than a window has are passed over.
    """
    for document in documents:
        for start in range(0, len(document) - (context - 1) + 1, context - 1):
            if count == 0:
                return
            count -= 1
            yield np.concatenate([[bos_id], document[start : start + context - 1]]).astype(np.int32)


def rows_of_bins(edges: Sequence[int], nats: Sequence[float], targets: Sequence[int]) -> list[dict[str, float | int]]:
    """A row a bin that has targets: its first and last position, its targets, and the mean nats of one."""
    return [
        {"from": int(first), "to": int(after) - 1, "targets": int(number), "nats_per_token": float(total) / int(number)}
        for first, after, total, number in zip(edges[:-1], edges[1:], nats, targets)
        if number
    ]
