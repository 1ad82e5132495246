"""The model is transformers' own Llama, ready for packed sequences, and its checkpoints are anyone's."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from model.attention.plan.planner import plan_sequence
from model.llama.config import llama_config, modality_ranges
from model.llama.llama import build_llama, inference, load_llama
from storage.errors import UserError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def config():
    return llama_config(SIZES, {"text": 64, "vision": 32}, context=64, rope_theta=1e4)


def hidden_of(model, ids, **packing):
    return model.model(input_ids=ids, use_cache=False, **packing).last_hidden_state


def test_same_seed_same_weights_and_the_callers_random_state_is_kept():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = build_llama(config(), 0), build_llama(config(), 0), build_llama(config(), 1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_equal_each_alone_in_stock_transformers(checkpointing):
    """Hidden states and gradients of three documents in one sequence, against a stock Llama fed one at a time."""
    ours = build_llama(config(), 0)
    stock = LlamaForCausalLM._from_config(config(), attn_implementation="eager")
    stock.load_state_dict(ours.state_dict())
    if checkpointing:
        ours.activation_checkpointing_enable()
        ours.train()
    ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    cuts = [0, 7, 8, 40]
    plan = plan_sequence(np.array(cuts), sp=1)
    packed = hidden_of(ours, ids, position_ids=torch.from_numpy(plan.positions)[None], plan=plan, group=None)
    alone = torch.cat([hidden_of(stock, ids[:, a:b]) for a, b in pairwise(cuts)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
    weights = torch.linspace(0, 1, 40)[None, :, None]
    (packed * weights).sum().backward()
    (alone * weights).sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters()):
        if mine.grad is not None:
            # Sums round to the size of their terms, so entries near zero are judged by the tensor's largest.
            assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max(), name


def test_a_saved_model_is_a_plain_checkpoint_that_transformers_loads(tmp_path):
    model = build_llama(config(), 3)
    model.save_pretrained(tmp_path / "out")
    stock, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["architectures"] == ["LlamaForCausalLM"]
    assert "ring" not in json.dumps(stored)
    ids = torch.arange(30)[None]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=0, atol=2e-5)


def test_loading_gives_back_the_weights_and_their_dtype(tmp_path):
    model = build_llama(config(), 3, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    again = load_llama(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert modality_ranges(again.config) == {"text": range(64), "vision": range(64, 96)}
    assert again.config._attn_implementation == "ring"
    assert load_llama(tmp_path / "out", dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_bf16_goes_through_the_ring_with_fp32_rotation():
    model = build_llama(config(), 0, dtype=torch.bfloat16)
    plan = plan_sequence(np.array([0, 9, 20]), sp=1)
    ids = torch.arange(20)[None]
    positions = torch.from_numpy(plan.positions)[None]
    out = hidden_of(model, ids, position_ids=positions, plan=plan, group=None)
    exact = hidden_of(model.float(), ids, position_ids=positions, plan=plan, group=None)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("attention", ["ring", "sdpa", "eager"])
def test_a_bf16_model_is_called_and_generates_with_a_cache_of_its_own_dtype(attention):
    """The keys in the cache are turned in fp32, and rounded once: twice the bytes would be kept otherwise."""
    model = build_llama(config(), 0, attention, torch.bfloat16)
    exact = build_llama(config(), 0, attention)
    ids = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, expected = model(ids, use_cache=True), exact(ids, use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits - expected.logits).norm() / expected.logits.norm() < 2e-2
    for layer in output.past_key_values.layers:
        assert {layer.keys.dtype, layer.values.dtype} == {torch.bfloat16}
    with torch.no_grad():
        last = model(ids[:, -1:], past_key_values=output.past_key_values).logits[0, -1]
        whole = exact(torch.cat((ids, ids[:, -1:]), 1)).logits[0, -1]
    assert (last - whole).norm() / whole.norm() < 2e-2
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 24)


def test_a_mistral_is_a_llama_by_another_name(tmp_path):
    sizes = {**SIZES, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64}
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)).eval()
    mistral.save_pretrained(tmp_path)
    ids = torch.arange(3, 19).unsqueeze(0)
    loaded = load_llama(tmp_path, attention="sdpa")
    assert loaded.config.model_type == "llama"
    torch.testing.assert_close(loaded(ids).logits, mistral(ids).logits, rtol=1e-5, atol=1e-5)
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=32)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="sliding_window 32"):
        load_llama(tmp_path)


def test_inference_puts_everything_back():
    model = build_llama(config(), 0).train()
    with inference(model):
        assert model.config._attn_implementation == "sdpa"
        assert not model.training
        assert torch.is_inference_mode_enabled()
    assert model.config._attn_implementation == "ring"
    assert model.training


def test_a_folder_that_is_no_llama_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2' is not 'llama'"):
        load_llama(tmp_path)
