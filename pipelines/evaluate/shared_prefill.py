"""Prompts that begin alike, each behind one prefill of what they share.

In: prompts, of which each shares a beginning with all that come after it, as those with one needle at ever greater
depths do. Out: a decoder a prompt, one at a time. What the prompts still to come share enters once and is forked, so
the keys of two prompts are never whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from model.attention.p2p import Group
    from model.inference.kv_decoder import Decoder


def prefilled(
    model: LlamaForCausalLM, prompts: Sequence[np.ndarray], room: int, group: Group = None
) -> Iterator[Decoder]:
    """A decoder of one row for each prompt, an integer array [L]; each is to be let go before the next is taken.

    Use within `model.llama.llama.inference`. room: tokens that will be appended.
    """
    from model.inference.kv_decoder import Decoder

    trunk: Decoder | None = None
    for prompt, shared in zip(prompts, shared_lengths(prompts)):
        entered = trunk.lengths[0] if trunk else 0
        if shared > entered:
            if trunk is None:
                trunk = Decoder(model, [prompt[:shared]], group=group)
            else:
                trunk.extend([prompt[entered:shared]])
        if trunk is None:
            yield Decoder(model, [prompt], room=room, group=group)
            continue
        branch = trunk.fork([0])
        branch.room = room
        branch.extend([prompt[trunk.lengths[0] :]])
        yield branch
        del branch


def shared_lengths(prompts: Sequence[np.ndarray]) -> list[int]:
    """How much of each prompt all prompts after it begin with, less than all of it; of the last, what was shared last.

    Ascending.
    """
    lengths: list[int] = []
    for number, prompt in enumerate(prompts):
        later = [common_length(prompt, other) for other in prompts[number + 1 :]]
        # Of every prompt still to come at least one token is left, which is what predicts its answer.
        least = min(map(len, prompts[number:])) - 1
        lengths.append(min([least, *later]) if later else (lengths or [0])[-1])
    return lengths


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids two arrays begin with alike."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length
