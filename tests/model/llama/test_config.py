"""Sizes by name or by number become a plain LlamaConfig, or one clear sentence."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.llama.config import PRESETS, llama_config, modality_ranges
from storage.errors import UserError

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("preset", "parameters"), [("7B", 6_738_415_616), ("1B", 1_244_227_584), ("200M", 212_366_336), ("debug", None)]
)
def test_presets_have_the_parameters_of_their_names(preset, parameters):
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(preset, 32_000, context=4096, rope_theta=1e4))
    count = sum(p.numel() for p in model.parameters())
    sizes = PRESETS[preset]
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    layer = 4 * width**2 + 3 * width * sizes["intermediate_size"] + 2 * width
    assert count == 2 * 32_000 * width + layers * layer + width
    assert parameters is None or count == parameters


def test_lwms_constants_and_the_stages_own_numbers_are_set():
    config = llama_config("debug", {"text": 32_000, "vision": 8_448}, context=1_048_576, rope_theta=5e7)
    assert config.rms_norm_eps == 1e-6
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e7}
    assert config.max_position_embeddings == 1_048_576
    assert not config.tie_word_embeddings
    assert modality_ranges(config) == {"text": range(32_000), "vision": range(32_000, 40_448)}


def test_a_llama_that_knows_no_vision_is_all_text():
    assert modality_ranges(llama_config("debug", 512, 64, 1e4)) == {"text": range(512)}


def test_explicit_sizes_and_grouped_query_attention():
    config = llama_config({**SIZES, "num_key_value_heads": 2}, 64, 64, 1e4)
    assert (config.head_dim, config.num_key_value_heads) == (12, 2)
    assert llama_config({**SIZES, "head_dim": 8}, 64, 64, 1e4).head_dim == 8


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("13B", "'13B' is none of 7B"),
        ({**SIZES, "layers": 2}, "unknown key 'layers'"),
        ({k: v for k, v in SIZES.items() if k != "hidden_size"}, "'hidden_size' is missing"),
        ({**SIZES, "num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({**SIZES, "hidden_size": 50}, "no multiple"),
        ({**SIZES, "hidden_size": 36}, "even head_dim"),
    ],
)
def test_a_users_mistake_is_one_sentence_with_the_key(size, says):
    with pytest.raises(UserError, match=says):
        llama_config(size, 64, 64, 1e4)


def test_a_modality_without_ids_is_refused():
    with pytest.raises(UserError, match="the vocabulary has -1 vision ids"):
        llama_config("debug", {"text": 65, "vision": -1}, 64, 1e4)


def test_a_checkpoint_of_when_there_were_text_and_vision_alone_and_a_plain_llama_are_read():
    older = LlamaConfig(vocab_size=96, text_vocab_size=64)
    assert modality_ranges(older) == {"text": range(64), "vision": range(64, 96)}
    assert modality_ranges(LlamaConfig(vocab_size=96)) == {"text": range(96)}
