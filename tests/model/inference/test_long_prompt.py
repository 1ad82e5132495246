"""A prompt of 256K tokens over two processes: its answer, and what a rank holds and spends."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from model.inference.kv_decoder import Decoder
from model.llama.llama import inference
from tests.model.attention_groups import run_in_processes
from tests.model.inference.stock import VOCABULARY, small_llama, stock

TOKENS = 256 * 1024
ONE_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = np.random.default_rng(0).integers(3, VOCABULARY, TOKENS)


def answered(group: Any) -> dict[str, Any]:
    """The logits after the prompt and after one more token; this rank's cache, peak memory and seconds."""
    model, before = small_llama(**ONE_LAYER), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with inference(model):
        decoder = Decoder(model, [PROMPT], room=8, group=group)
        logits = [decoder.logits(0, VOCABULARY)[0]]
        decoder.append(torch.tensor([7]))
        logits.append(decoder.logits(0, VOCABULARY)[0])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "logits": torch.stack(logits),
        "cache": decoder.cache.nbytes,
        "peak_mib": grown / 1024,
        "cpu_seconds": time.process_time(),
    }


def expected() -> torch.Tensor:
    """Transformers' logits of the same two tokens. One layer's keys are made of embeddings alone, without attention."""
    plain = stock(small_llama(**ONE_LAYER))
    layer, cache = plain.model.layers[0], DynamicCache(config=plain.config)
    with torch.inference_mode():
        x = layer.input_layernorm(plain.model.embed_tokens(torch.from_numpy(PROMPT[:-1])[None]))
        k, v = (
            part(x).unflatten(-1, (1, -1)).transpose(1, 2) for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        cos, sin = small_llama(**ONE_LAYER).model.rotary_emb(x, torch.arange(TOKENS - 1)[None])
        half = k.shape[-1] // 2
        k = k * cos[:, None] + torch.cat((-k[..., half:], k[..., :half]), -1) * sin[:, None]
        cache.update(k, v, 0)
        ids = [int(PROMPT[-1]), 7]
        return torch.stack(
            [plain(torch.tensor([[one]]), past_key_values=cache, use_cache=True).logits[0, -1] for one in ids]
        )


@pytest.mark.faults
def test_a_prompt_of_256k_tokens_is_answered_by_two_processes(capsys):
    found = run_in_processes(answered, 2)
    for rank in found:
        torch.testing.assert_close(rank["logits"], expected(), rtol=0, atol=1e-4)
        assert rank["cache"] <= (TOKENS // 2 + 80) * 2 * 16 * 4
    with capsys.disabled():
        pass
