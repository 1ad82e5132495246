"""The memory of a token that is decoded: not one copy of the cache."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.allocations import peak_bytes
from model.inference.kv_decoder import Decoder
from model.llama.llama import inference
from tests.model.inference.stock import small_llama

CONTEXTS = (2048, 4096, 8192)
CHUNK = 512


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
