"""Prompts are filled to a context, to the token: pieces of text become ids once, and as many as fit are taken. Pure.

A prompt is the concatenation of its pieces' ids. What a piece is encoded as depends on the text before it only by what
it follows directly, so each is encoded behind a stand-in for that, and lengths add up exactly: a search over how much
fits is one over sums, and nothing is encoded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from storage.errors import UserError
from tokenization.text.tokenizer import TextTokenizer


def pieces_after(tokenizer: TextTokenizer, before: str, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text where it stands directly after `before`, int32: those of both less the ids that both share."""
    head = tokenizer.encode(before)
    ids, ends = tokenizer.encode_column(pa.array([before + text for text in texts], pa.utf8()))
    return [whole[_shared(head, whole) :] for whole in np.split(ids, ends[:-1])]


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Pieces one after the other, int32."""
    return np.concatenate([np.zeros(0, np.int32), *pieces]).astype(np.int32)


def lengths_of(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [n]."""
    return np.array([len(piece) for piece in pieces], dtype=np.int64)


def fitting(lengths: np.ndarray, room: int) -> int:
    """How many of the first of things of these lengths [n] fit into a room."""
    return int(np.searchsorted(np.cumsum(lengths), room, side="right"))


def largest(size: Callable[[int], int], room: int, least: int) -> int | None:
    """The largest number from `least` on whose size, which grows with it, is within the room; None where none is."""
    if size(least) > room:
        return None
    low, high = least, 2 * least + 1
    while size(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    return low


def too_small(key: str, context: int, missing: int) -> UserError:
    """That a context has no room for what a task needs, by so many tokens; another draw may need a few more."""
    why = f"{context} tokens leave no room for the text beside the question and the answer"
    enough = -(-(context + missing + 32) // 64) * 64
    return UserError(f"{key}: {why}; use at least {enough}")


def _shared(head: np.ndarray, whole: np.ndarray) -> int:
    size = min(len(head), len(whole))
    different = np.flatnonzero(head[:size] != whole[:size])
    return int(different[0]) if len(different) else size
