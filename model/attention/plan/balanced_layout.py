"""The layout "shared over fewest": even work and even tokens on every rank, from as few shared documents as will do.

In: document boundaries and a tolerance of work. Out: an `Assignment`. Causal attention costs a token of a document of
length L on average (L + 1) / 2 pairs, and a share taken half from the head and half from the tail of what is left of a
document costs exactly that for each of its tokens. So a document is a quantity of tokens of one density, and every rank
needs the same quantity at the same mean density.

Ranks are filled one after the other. A rank takes the longest document that is left: whole, where its tokens and work
fit beside the shortest documents that would fill the rest of the rank; otherwise, if no empty rank could take it whole,
as much of it as fits so; the next ranks take the rest. Then come the longest documents that still fit whole, which are
the shortest when all the work is spent. Dense and sparse documents are thus paired as in Walker's alias method (1974),
and a rank has a share of about one document: sharing each long one over all ranks would send several times the keys.
All in integers, so that every machine computes the same layout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.attention.plan.layouts import Assignment
from tokenization.compiled import compiled


def shared_over_fewest(cu_seqlens: np.ndarray, ranks: int, tolerance: float) -> Assignment:
    """Lay out documents so that no rank has much more than (1 + tolerance) times the mean work.

    cu_seqlens: int64 [n_documents + 1]. A larger tolerance shares fewer documents. A rank exceeds it by a token's work
    at most, as shares are whole tokens. O(n log^2 n + ranks log^2 n) for n documents.
    """
    lengths = np.diff(cu_seqlens)
    order = np.argsort(lengths, kind="stable")
    start, owner, worst = _fill(cu_seqlens[:-1][order], lengths[order], ranks, tolerance)
    # Where one token of the longest document is worth more than the tolerance, aiming wider can come out more even.
    token = ranks * (int(lengths.max()) + 1) / int((lengths * (lengths + 1)).sum())
    if token > tolerance:
        wider = _fill(cu_seqlens[:-1][order], lengths[order], ranks, 0.6 * token)
        if wider[2] < worst:
            start, owner, worst = wider
    by_start = np.argsort(start)
    return Assignment(start[by_start], owner[by_start])


class _Documents(NamedTuple):
    """Documents in ascending order of length, int64 [n] where no other shape is given. Work is in half pairs."""

    length: np.ndarray
    left: np.ndarray  # tokens that no rank has taken yet
    tokens_below: np.ndarray  # Fenwick trees [2^k + 1] of what is left: tokens,
    work_below: np.ndarray  # and the work of those tokens
    shorter: np.ndarray  # [n + 1], union-find: shorter[i + 1] - 1 leads to the longest with tokens left up to i
    longer: np.ndarray  # [n + 1], likewise to the shortest from i on
    shared: np.ndarray  # [2]: the long and the short document that a rank has begun to share, -1 for none
    tokens_per_rank: int
    mean: int  # work of a rank
    cap: int  # most work of a rank


@compiled
def _add(tree: np.ndarray, i: int, value: int) -> None:
    i += 1
    while i < len(tree):
        tree[i] += value
        i += i & -i


@compiled
def _work(begin: int, end: int) -> int:
    """Half pairs of a document's tokens [begin, end)."""
    return end * (end + 1) - begin * (begin + 1)


@compiled
def _ends_work(head: int, tail: int, from_head: int, share: int) -> int:
    """Half pairs of `share` of a document's tokens [head, tail): `from_head` first ones, and the rest from the end."""
    return _work(head, head + from_head) + _work(tail - share + from_head, tail)


@compiled
def _found(link: np.ndarray, i: int) -> int:
    root = i
    while link[root] != root:
        root = link[root]
    while link[i] != root:
        link[i], i = root, link[i]
    return root


@compiled
def _least_work(documents: _Documents, tokens: int) -> int:
    """Work of the `tokens` sparsest tokens that are left."""
    position, work, step = 0, 0, len(documents.tokens_below) - 1
    while step > 0:
        if position + step < len(documents.tokens_below) and documents.tokens_below[position + step] <= tokens:
            position += step
            tokens -= documents.tokens_below[position]
            work += documents.work_below[position]
        step >>= 1
    if tokens > 0 and position < len(documents.length):
        work += tokens * (documents.length[position] + 1)
    return work


@compiled
def _with_rest(documents: _Documents, i: int, tokens: int, free: int) -> int:
    """Work of a rank's `free` tokens of which `tokens` are of document i and the rest the sparsest left."""
    return tokens * (documents.length[i] + 1) + _least_work(documents, free - tokens)


@compiled
def _fits(documents: _Documents, i: int, free: int, most: int) -> bool:
    return documents.left[i] <= free and _with_rest(documents, i, documents.left[i], free) <= most


@compiled
def _is_long(documents: _Documents, i: int) -> bool:
    """Whether a rank full of such a document has more than the mean work."""
    return (documents.length[i] + 1) * documents.tokens_per_rank > documents.mean


@compiled
def _largest_share(documents: _Documents, i: int, free: int, mean: int, most: int) -> int:
    """Tokens of document i for a rank with `free` left: as many as `most` work allows, or nearest to `mean`."""
    low, high = 0, min(free, documents.left[i])
    limit = high
    while low < high:
        middle = (low + high + 1) // 2
        if _with_rest(documents, i, middle, free) <= most:
            low = middle
        else:
            high = middle - 1
    if low < limit:  # where a token is worth more than the tolerance, one more may be nearer
        under = mean - _with_rest(documents, i, low, free)
        over = _with_rest(documents, i, low + 1, free) - mean
        if over < under:
            low += 1
    return low


@compiled
def _next_share(documents: _Documents, taken: int, free: int, least: int, mean: int, most: int) -> tuple[int, int]:
    """Which document a rank with `free` tokens takes next, and how many tokens of it.

    taken: the long document it has a share of already, or -1. least, mean, most: work that the rank should still get.
    """
    n = len(documents.length)
    longest = _found(documents.shorter, n) - 1
    first = documents.shared[0] if documents.shared[0] >= 0 else longest
    if _fits(documents, first, free, most):
        return first, documents.left[first]
    is_long = _is_long(documents, first) and first != taken
    size, cap = documents.tokens_per_rank, documents.cap
    if is_long and (first == documents.shared[0] or not _fits(documents, first, size, cap)):
        share = _largest_share(documents, first, free, mean, most)
        if share > 0:
            return first, share

    # Another that fits whole, if the rank can come to its least work with it: the longest such.
    density = least // free if least > 0 else 0
    short = documents.shared[1]
    if short >= 0 and documents.length[short] + 1 >= density and _fits(documents, short, free, most):
        return short, documents.left[short]
    low, high = -1, longest
    while low < high:
        middle = (low + high + 1) // 2
        tokens = documents.left[middle] if documents.left[middle] > 0 else documents.length[middle]
        if tokens <= free and _with_rest(documents, middle, tokens, free) <= most:
            low = middle
        else:
            high = middle - 1
    if low >= 0:
        low = _found(documents.shorter, low + 1) - 1
    if low >= 0 and low != first and documents.left[low] <= free and documents.length[low] + 1 >= density:
        return low, documents.left[low]

    # Else a share of the shortest that is dense enough.
    chosen = short
    if chosen < 0 or documents.length[chosen] + 1 < density:
        chosen = _found(documents.longer, int(np.searchsorted(documents.length, density - 1)))
        if chosen == n:
            chosen = longest
    share = _largest_share(documents, chosen, free, mean, most)
    if share == 0:
        chosen = _found(documents.longer, 0)
        share = min(free, documents.left[chosen])
    return chosen, share


@compiled
def _fill(start: np.ndarray, length: np.ndarray, ranks: int, tolerance: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Starts and owners of all pieces in the order in which they were cut, and the most work of a rank.

    Documents ascend by length.
    """
    n, size = len(length), 1
    while size < n:
        size *= 2
    work_left = (length * (length + 1)).sum()
    tokens_per_rank, mean_of_all = length.sum() // ranks, work_left // ranks
    cap, slack = int((1 + tolerance) * mean_of_all), int((1 + tolerance / 2) * mean_of_all)
    left, tree, shared = length.copy(), np.zeros(size + 1, np.int64), np.full(2, -1)
    shorter, longer = np.arange(n + 1), np.arange(n + 1)
    documents = _Documents(length, left, tree, tree.copy(), shorter, longer, shared, tokens_per_rank, mean_of_all, cap)
    for i in range(n):
        _add(documents.tokens_below, i, length[i])
        _add(documents.work_below, i, length[i] * (length[i] + 1))
    head, tail = start.copy(), start + length
    odd = np.zeros(n, np.int64)  # odd tokens taken from the tail, less those from the head
    starts, owners = [np.int64(0) for _ in range(0)], [np.int64(0) for _ in range(0)]
    worst = 0
    for rank in range(ranks):
        free, work, taken = tokens_per_rank, 0, -1
        after = ranks - rank - 1
        mean = work_left // (after + 1)
        least, most = min(mean, work_left - after * slack), max(mean, cap)
        while free > 0:
            i, share = _next_share(documents, taken, free, least - work, mean - work, most - work)
            from_head = share if share == left[i] else share // 2
            cost = _ends_work(head[i] - start[i], tail[i] - start[i], from_head, share)
            if share < left[i] and share % 2 == 1:
                # The odd token comes from the tail, where it is worth more, unless that is too much; the next odd one
                # then comes from the other end.
                with_rest = work + _least_work(documents, free - share)
                if odd[i] > 0 or (odd[i] == 0 and with_rest + cost > most):
                    from_head += 1
                    odd[i] -= 1
                    cost = _ends_work(head[i] - start[i], tail[i] - start[i], from_head, share)
                else:
                    odd[i] += 1
            if from_head > 0:
                starts.append(head[i])
                owners.append(np.int64(rank))
            if share > from_head:
                starts.append(tail[i] - share + from_head)
                owners.append(np.int64(rank))
            head[i] += from_head
            tail[i] -= share - from_head
            if share == left[i]:
                shorter[i + 1] = i
                longer[i] = i + 1
                shared[shared == i] = -1
            elif _is_long(documents, i):
                shared[0] = taken = i
            else:
                shared[1] = i
            left[i] -= share
            _add(documents.tokens_below, i, -share)
            _add(documents.work_below, i, -share * (length[i] + 1))
            work += cost
            work_left -= cost
            free -= share
        worst = max(worst, work)
    return np.array(starts), np.array(owners), worst
