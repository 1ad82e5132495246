"""The memory of prefill and decoding on a rank: a straight line in S / P, and not one copy of the cache a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.allocations import peak_bytes
from model.inference.kv_decoder import Decoder
from model.llama.llama import inference
from tests.model.attention_groups import run_in_processes
from tests.model.inference.stock import small_llama

CONTEXTS = (2048, 4096, 8192)
CHUNK = 512


def peaks(group: Any, contexts: tuple[int, ...]) -> list[int]:
    """Peak bytes of a prefill and some tokens after it, by context, beyond what was there before."""
    model = small_llama()
    found = []
    for context in contexts:
        prompt = np.arange(context) % 90

        def answer(prompt: np.ndarray = prompt) -> None:
            with inference(model):
                decoder = Decoder(model, [prompt], prefill_chunk=CHUNK, room=8, group=group)
                for _ in range(4):
                    decoder.append(decoder.agreed(decoder.logits(0, 96).argmax(-1)))

        answer()
        found.append(peak_bytes(answer))
    return found


@pytest.mark.slow
def test_peak_memory_is_linear_in_the_tokens_a_rank_holds():
    by_ranks = {1: [peaks(None, CONTEXTS)], 2: run_in_processes(peaks, 2, CONTEXTS)}
    token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    for ranks, found in by_ranks.items():
        for small, middle, large in found:
            assert abs((large - middle) / (2 * (middle - small)) - 1) < 0.05
            # What grows is the cache itself, by its size for S / P tokens on one rank as on two.
            slope = (large - small) / (CONTEXTS[-1] - CONTEXTS[0]) * ranks
            assert token <= slope < 1.05 * token


def test_a_token_allocates_nothing_that_grows_with_the_context():
    model = small_llama()
    allocated = []
    for context in CONTEXTS:
        with inference(model):
            decoder = Decoder(model, [np.arange(context) % 90], prefill_chunk=CHUNK, room=8)
            ids = torch.zeros(1, dtype=torch.long)
            decoder.append(ids)
            allocated.append(peak_bytes(lambda decoder=decoder, ids=ids: decoder.append(ids)))
    assert max(allocated) < 1.1 * min(allocated)
