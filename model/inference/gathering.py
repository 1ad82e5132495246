"""Rows that travel from every rank to every other: queries, results, weights.

In: this rank's rows and how many each rank has. Out: all rows in one tensor, rank after rank, where they arrive. It is
point-to-point, so the ranks' numbers may differ, and other work goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from model.attention.p2p import Exchange, Transfer


class Gathering:
    """Rows under way. mine: [counts[rank], ...] of this rank. counts: of each rank's rows."""

    def __init__(self, mine: Tensor, counts: Sequence[int], exchange: Exchange) -> None:
        rank, others = exchange.rank, [peer for peer in range(exchange.size) if peer != exchange.rank]
        mine = mine.contiguous()
        self._whole = mine.new_empty(sum(counts), *mine.shape[1:]) if others else mine
        parts = self._whole.split(list(counts))
        if others:
            parts[rank].copy_(mine)
        sends = {peer: mine for peer in others if len(mine)}
        self._transfer: Transfer = exchange.start(sends, {peer: parts[peer] for peer in others if counts[peer]})

    def wait(self) -> Tensor:
        """All rows [sum(counts), ...], rank after rank. They are the caller's from then on, to keep or to drop."""
        self._transfer.wait()
        whole = self._whole
        del self._whole
        return whole


def gather(mine: Tensor, counts: Sequence[int], exchange: Exchange) -> Tensor:
    """All rows, at once. Collective."""
    return Gathering(mine, counts, exchange).wait()
