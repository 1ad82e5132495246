"""Rotary tables: LWM's where fp32 can still hold them, exact where it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.llama.config import llama_config
from model.llama.rope import FP32_TABLES, ExactRotaryEmbedding, rope_tables, rounding_rotated
from tests.model.lwm_reference import arrays


@pytest.mark.parametrize("theta", [10_000, 1_000_000, 10_000_000, 50_000_000])
def test_tables_equal_lwms_up_to_the_error_of_its_fp32_angles(theta):
    stored = arrays("rope_tables")
    positions = stored["positions"]
    cos, sin = rope_tables(torch.from_numpy(positions), theta, 128)
    # An fp32 angle of p radians is off by a rounding or two of p.
    allowed = 2e-7 * np.maximum(positions, 1)[:, None]
    assert (np.abs(cos[:, :64].numpy() - stored[f"theta{theta}_cos"]) <= allowed).all()
    assert (np.abs(sin[:, :64].numpy() - stored[f"theta{theta}_sin"]) <= allowed).all()


def test_a_million_tokens_in_the_tables_are_exact_to_fp32():
    """At position 1,048,575 the angle of every pair, in Python's own doubles, where an fp32 table is off by 1e-2."""
    position, theta = 1_048_575, 5e7
    cos, _ = rope_tables(torch.tensor([position]), theta, 128)
    true = [math.cos(position * theta ** (-2 * i / 128)) for i in range(64)]
    np.testing.assert_allclose(cos[0, :64].numpy(), true, rtol=0, atol=1e-7)
    fp32 = arrays("rope_tables")["theta50000000_cos"][-1]
    assert 1e-3 < np.abs(fp32 - true).max() < 2e-2


def test_rotation_in_halves_equals_lwms_in_interleaved_pairs():
    stored = arrays("rope_tables")
    cos, sin = rope_tables(torch.from_numpy(stored["small_pos"]), 1_000_000, 8)

    def halves(x):
        return torch.from_numpy(np.concatenate((x[..., 0::2], x[..., 1::2]), axis=-1))

    q, k = apply_rotary_pos_emb(halves(stored["small_xq"]), halves(stored["small_xk"]), cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(q, halves(stored["small_q_out"]), rtol=0, atol=2e-5)
    torch.testing.assert_close(k, halves(stored["small_k_out"]), rtol=0, atol=2e-5)


def config(attention):
    made = llama_config("debug", 64, context=64, rope_theta=1e6)
    made._attn_implementation = attention
    return made


def test_module_answers_as_transformers_own_and_survives_a_cast():
    exact, stock = ExactRotaryEmbedding(config("sdpa")), LlamaRotaryEmbedding(config("sdpa"))
    positions = torch.arange(50)[None]
    x = torch.zeros(1, 50, 256)
    for mine, theirs in zip(exact(x, positions), stock(x, positions)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)
    before = exact(x, positions)[0]
    assert torch.equal(exact.bfloat16()(x, positions)[0], before)


def test_tables_are_fp32_only_where_the_attention_rounds_after_the_rotation():
    x, positions = torch.zeros(1, 4, 256, dtype=torch.bfloat16), torch.arange(4)[None]
    assert "ring" in FP32_TABLES
    assert ExactRotaryEmbedding(config("ring"))(x, positions)[0].dtype == torch.float32
    assert ExactRotaryEmbedding(config("sdpa"))(x, positions)[0].dtype == torch.bfloat16
    q, v = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    seen = rounding_rotated(lambda module, *qkv: [t.dtype for t in qkv])(torch.nn.Identity(), q, q, v)
    assert seen == [torch.bfloat16] * 3


def test_scaled_rope_types_are_refused():
    scaled = config("sdpa")
    scaled.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="linear"):
        ExactRotaryEmbedding(scaled)
