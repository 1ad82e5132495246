"""Packed sequences end to end: the micro-batch of one forward pass, with each token's target beside it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tokenization.compiled import compiled
from tokenization.document import PackedSequence
from tokenization.loader.batch import MicroBatch


def join_sequences(sequences: Sequence[PackedSequence], sources: Sequence[int] | None = None) -> MicroBatch:
    """Concatenate packed sequences; the label of position t is token t+1, with that token's weight as a target.

    A document's first token has weight 0, so no label crosses a document or a sequence. sources: the number of each
    sequence's source, all 0 by default.
    """
    starts = list(itertools.accumulate((len(sequence.tokens) for sequence in sequences), initial=0))
    tokens, labels = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.int32)
    loss_weight, source = np.empty(starts[-1], np.float32), np.empty(starts[-1], np.int16)
    cu_seqlens = [np.zeros(1, np.int32)]
    for sequence, number, start, end in zip(sequences, sources or [0] * len(sequences), starts, starts[1:]):
        tokens[start:end] = sequence.tokens
        _set_targets(sequence.tokens, sequence.loss_weight, labels[start:end], loss_weight[start:end])
        filled = start + sequence.cu_seqlens[sequence.n_examples]
        source[start:filled], source[filled:end] = number, -1
        cu_seqlens.append(sequence.cu_seqlens[1:] + np.int32(start))
    keys = tuple(sequence.key for sequence in sequences)
    return MicroBatch(tokens, labels, loss_weight, np.concatenate(cu_seqlens), keys, source)


@compiled
def _set_targets(tokens: np.ndarray, weights: np.ndarray, labels: np.ndarray, loss_weight: np.ndarray) -> None:
    """One pass over a sequence, in place of one for each thing that is made of it."""
    last = len(tokens) - 1
    for at in range(last):
        loss_weight[at] = weights[at + 1]
        labels[at] = tokens[at + 1] if weights[at + 1] > 0 else 0
    loss_weight[last] = labels[last] = 0
