"""Rotary tables: LWM's where fp32 can still hold them, exact where it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from model.llama.config import llama_config
from model.llama.llama import build_llama
from model.llama.rope import ExactRotaryEmbedding, rope_tables
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


@pytest.mark.parametrize("attention", ["ring", "sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotation_is_in_fp32_at_least_and_attention_gets_q_k_and_v_in_the_models_dtype(attention, dtype, monkeypatch):
    layer = build_llama(config(attention), 0, attention, dtype).model.layers[0].self_attn
    seen, positions = [], torch.arange(1_048_572, 1_048_576)[None]
    ours = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager_attention_forward)

    def look(module, q, k, v, *args, **kwargs):
        seen.extend((q, k, v))
        return ours(module, q, k, v, *args, **kwargs)

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: look)
    x = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    tables = ExactRotaryEmbedding(config(attention))(x, positions)
    assert {table.dtype for table in tables} == {torch.float32}
    assert layer(x, tables)[0].dtype == dtype
    assert [x.dtype for x in seen] == [dtype] * 3
    projected = (project(x).view(1, 4, 2, 128) for project in (layer.q_proj, layer.k_proj))
    exact = apply_rotary_pos_emb(*projected, *tables, unsqueeze_dim=2)
    for turned, expected in zip(seen, exact):
        assert torch.equal(turned.transpose(1, 2), expected.to(dtype))


def test_scaled_rope_types_are_refused():
    scaled = config("sdpa")
    scaled.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="linear"):
        ExactRotaryEmbedding(scaled)
