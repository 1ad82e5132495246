"""model/llama/initial_weights.py and model/llama/hf_weights.py: a model's first weights, one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from model.llama.config import llama_config, modality_ranges
from model.llama.hf_weights import INDEX, ONE_FILE, StoredWeights, stored_config
from model.llama.initial_weights import (
    EMBEDDINGS,
    HEAD,
    BlankWeights,
    RandomWeights,
    Weights,
    join_modalities,
    weight_shapes,
)
from model.llama.llama import build_llama, load_llama, whole_llama
from storage.errors import UserError
from tests.model.llama.test_llama import SIZES

VOCABULARY = {"text": 64, "vision": 32}
TEXT = llama_config(SIZES, 64, context=64, rope_theta=1e4)
JOINT = llama_config(SIZES, VOCABULARY, context=64, rope_theta=1e4)
NORM = "model.layers.1.input_layernorm.weight"


def stored(folder: Path) -> StoredWeights:
    return StoredWeights(stored_config(folder), lambda: folder)


def all_of(weights: Weights) -> dict[str, torch.Tensor]:
    weights.check()
    return {name: weights.read(name) for name in weight_shapes(weights.config)}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_random_weights_are_those_of_transformers_in_kind_and_each_one_by_its_name_alone() -> None:
    weights = RandomWeights(JOINT, seed=3)
    backwards = {name: weights.read(name) for name in reversed(weight_shapes(JOINT))}
    once = all_of(RandomWeights(JOINT, seed=3))
    assert same(once, dict(reversed(backwards.items())))
    assert torch.equal(once[NORM], torch.ones(32))
    matrices = [weight for weight in once.values() if weight.dim() == 2]
    assert all(weight.mean().abs() < 0.05 and 0.19 < weight.std() < 0.21 for weight in matrices)
    assert len({float(weight.flatten()[0]) for weight in matrices}) == len(matrices)
    assert not torch.equal(once[HEAD], RandomWeights(JOINT, seed=4).read(HEAD))


def test_blank_weights_are_zeros_of_the_models_shapes() -> None:
    blank = all_of(BlankWeights(JOINT))
    assert {name: weight.shape for name, weight in blank.items()} == weight_shapes(JOINT)
    assert not any(weight.any() for weight in blank.values())


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_a_checkpoint_of_one_file_or_many_gives_back_its_weights(tmp_path: Path, max_shard_size: str) -> None:
    model = build_llama(JOINT, 3, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).is_file() == (max_shard_size == "20KB")
    assert same(all_of(stored(tmp_path)), model.state_dict())


def test_a_stage_has_its_own_context_and_theta(tmp_path: Path) -> None:
    build_llama(JOINT, 3).save_pretrained(tmp_path)
    config = stored_config(tmp_path, context=4096, rope_theta=5e7)
    model = whole_llama(StoredWeights(config, lambda: tmp_path))
    assert model.config.max_position_embeddings == 4096
    assert model.model.rotary_emb.theta == model.config.rope_parameters["rope_theta"] == 5e7


def test_no_file_is_asked_for_before_a_weight_is() -> None:
    weights = StoredWeights(TEXT, lambda: pytest.fail("fetched"))
    assert join_modalities(weights, VOCABULARY, seed=7).config.vocab_size == 96


def test_vision_rows_join_a_text_model_without_touching_it() -> None:
    text = RandomWeights(TEXT, 0)
    weights = join_modalities(text, VOCABULARY, seed=7)
    assert (weights.config.vocab_size, modality_ranges(weights.config)["text"]) == (96, range(64))
    before, joint = all_of(text), all_of(weights)
    for name, weight in joint.items():
        assert torch.equal(weight[: len(before[name])], before[name])
    assert joint[EMBEDDINGS].shape == joint[HEAD].shape == (96, 32)
    assert torch.equal(joint[HEAD][64:], RandomWeights(JOINT, 7).read(HEAD)[64:])
    assert not torch.equal(joint[HEAD][64:], joint[EMBEDDINGS][64:])
    assert join_modalities(weights, VOCABULARY, seed=8) is weights, "what has its vision rows is left alone"
    model = whole_llama(weights)
    assert model.lm_head(torch.zeros(2, 32), torch.tensor([3, 70]), [range(64), range(64, 96)]).shape == (2,)


def test_rows_that_pad_a_text_vocabulary_make_room_for_vision() -> None:
    padded = RandomWeights(llama_config(SIZES, 72, 64, 1e4), 0)
    joint = join_modalities(padded, VOCABULARY, seed=7)
    assert torch.equal(joint.read(HEAD)[:64], padded.read(HEAD)[:64])
    assert torch.equal(joint.read(HEAD)[64:], RandomWeights(JOINT, 7).read(HEAD)[64:])
    assert modality_ranges(joint.config)["text"] == range(64)


@pytest.mark.parametrize(
    ("vocab_size", "text_size", "said"),
    [
        (60, None, "the checkpoint has 60 text ids, the text tokenizer 64"),
        (96, 48, "the checkpoint has 48 text ids, the text tokenizer 64"),
        (80, 64, "the checkpoint has 16 vision ids, the recipe 32"),
    ],
)
def test_a_checkpoint_of_another_vocabulary_is_a_users_mistake(vocab_size, text_size, said) -> None:
    sizes = vocab_size if text_size is None else {"text": text_size, "vision": vocab_size - text_size}
    config = llama_config(SIZES, sizes, 64, 1e4)
    if text_size is None:
        del config.modality_sizes
    with pytest.raises(UserError, match=said):
        join_modalities(RandomWeights(config, 0), VOCABULARY, seed=7)


def test_tied_embeddings_are_parted(tmp_path: Path) -> None:
    tied = build_llama(TEXT, 0)
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path)
    loaded = load_llama(tmp_path)
    assert torch.equal(loaded.lm_head.weight, tied.model.embed_tokens.weight)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    joint = whole_llama(join_modalities(stored(tmp_path), VOCABULARY, seed=7))
    assert torch.equal(joint.lm_head.weight[:64], tied.model.embed_tokens.weight[:64])
    assert not torch.equal(joint.lm_head.weight[64:], joint.model.embed_tokens.weight[64:])
    joint.save_pretrained(tmp_path / "joint")
    assert torch.equal(load_llama(tmp_path / "joint").lm_head.weight, joint.lm_head.weight)


def test_a_folder_that_has_not_all_of_a_model_is_a_users_mistake(tmp_path: Path) -> None:
    build_llama(TEXT, 0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, said in (
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.self_attn\.q_proj\.weight is in no file"),
        ({"vocab_size": 60}, r"model\.safetensors: model\.embed_tokens\.weight is 64x32, but 60x32 by config\.json"),
    ):
        weights = StoredWeights(LlamaConfig(**{**config, **changed}), lambda: tmp_path)
        with pytest.raises(UserError, match=said):
            weights.check()
    (tmp_path / ONE_FILE).write_bytes(b"half a file")
    with pytest.raises(UserError, match="no safetensors file"):
        stored(tmp_path).check()
    (tmp_path / ONE_FILE).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_llama(tmp_path)


def test_a_model_of_text_and_vision_is_given_the_rows_of_a_third_modality() -> None:
    sizes = {**VOCABULARY, "audio": 8}
    two = RandomWeights(JOINT, 0)
    three = join_modalities(two, sizes, seed=7)
    assert modality_ranges(three.config) == {"text": range(64), "vision": range(64, 96), "audio": range(96, 104)}
    fresh = RandomWeights(llama_config(SIZES, sizes, 64, 1e4), 7)
    for table in (EMBEDDINGS, HEAD):
        assert torch.equal(three.read(table)[:96], two.read(table))
        assert torch.equal(three.read(table)[96:], fresh.read(table)[96:])
    with pytest.raises(UserError, match=r"ids are of text, vision in this order, the recipe's of text, audio, vision"):
        join_modalities(two, {"text": 64, "audio": 8, "vision": 32}, seed=7)
    with pytest.raises(UserError, match="the checkpoint has 8 audio ids, the recipe 0"):
        join_modalities(three, VOCABULARY, seed=7)
