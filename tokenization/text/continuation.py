"""Ids of a text where it goes on from another, which are not always those that it has alone.

In: a tokenizer, what stands before, and the text. Out: the ids that are added.
"""

from __future__ import annotations

import numpy as np

from tokenization.text.tokenizer import TextTokenizer


def follow(tokenizer: TextTokenizer, before: str, text: str) -> np.ndarray:
    """Ids of `text` where it stands after `before` and a space, int32: those of both less the ids that both share."""
    head = tokenizer.encode(before)
    whole = tokenizer.encode(f"{before} {text}" if not text[:1].isspace() else before + text)
    shared = 0
    while shared < min(len(head), len(whole)) and head[shared] == whole[shared]:
        shared += 1
    return whole[shared:]
