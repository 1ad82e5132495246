"""Several prompts at once, answered greedily or by choices, behind one prefill of what all of them share.

In: prompts, and the ranks that share their keys. Out: a decoder with a row a prompt; greedy answers of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.evaluate.shared_prefill import common_length

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from model.attention.p2p import Group
    from model.inference.kv_decoder import Decoder
    from tokenization.vocabulary import JointVocabulary

TOGETHER = 64
"""Prompts that are answered at once, at most."""
_LOOK_EVERY = 16
"""Tokens between two looks at which rows have ended, where a look makes the host wait for the device."""


def asked_together(
    model: LlamaForCausalLM, prompts: Sequence[np.ndarray], room: int = 0, group: Group = None
) -> Decoder:
    """A decoder whose rows hold the prompts, integer arrays [L_b]; the beginning that all of them share enters once.

    Use within `model.llama.llama.inference`. room: tokens that will be appended to each.
    """
    from model.inference.kv_decoder import Decoder

    first, *others = prompts
    # Of every prompt at least one token is left, which is what predicts its answer.
    shared = min([len(first) - 1, *(min(common_length(first, other), len(other) - 1) for other in others)])
    if not others or shared < 1:
        return Decoder(model, prompts, room=room, group=group)
    rows = Decoder(model, [first[:shared]], group=group).fork([0] * len(prompts))
    rows.room = room
    rows.extend([prompt[shared:] for prompt in prompts])
    return rows


def greedy_answers(decoder: Decoder, vocabulary: JointVocabulary, most: int) -> list[list[int]]:
    """Text ids of each row's likeliest continuation, at most so many, without EOS and what follows it.

    The decoder goes on to the answers, without the rows that have ended.
    """
    import torch

    from model.inference.sampling import choose

    answers: list[list[int]] = [[] for _ in range(len(decoder))]
    rows, chosen = list(range(len(decoder))), []
    for step in range(most):
        ids = decoder.agreed(choose(decoder.logits(0, vocabulary.text_size), None, 0.0, None))
        chosen.append(ids)
        is_last = step == most - 1
        if is_last or decoder.device.type == "cpu" or step % _LOOK_EVERY == _LOOK_EVERY - 1:
            for row, drawn in zip(rows, torch.stack(chosen, dim=1).tolist()):
                answers[row] += drawn
            chosen = []
            going = [place for place, row in enumerate(rows) if vocabulary.eos_id not in answers[row]]
            if is_last or not going:
                break
            if len(going) < len(rows):
                decoder.keep(going)
                rows, ids = [rows[place] for place in going], ids[going]
        decoder.append(ids)
    ends = [answer.index(vocabulary.eos_id) if vocabulary.eos_id in answer else most for answer in answers]
    return [answer[:end] for answer, end in zip(answers, ends)]


def batches(lengths: Sequence[int], tokens: int, most: int = TOGETHER) -> Iterator[list[int]]:
    """Numbers of consecutive prompts of these lengths whose tokens together are at most so many, one at least."""
    batch: list[int] = []
    for number, length in enumerate(lengths):
        if batch and (len(batch) == most or sum(lengths[one] for one in batch) + length > tokens):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def slices(count: int, tokens: int) -> list[tuple[int, int]]:
    """Start and end of shares of so many prompts of so many tokens each: what is one cell, and lost with it."""
    each = max(1, _CELL_TOKENS // tokens)
    return [(start, min(count, start + each)) for start in range(0, count, each)]


_CELL_TOKENS = 2**22
