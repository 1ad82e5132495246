"""LWM's checkpoint files: read in place, cut into layers, written as a plain Hugging Face Llama, and back."""

from __future__ import annotations

import json
import pickle

import msgpack
import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from model.convert.flax_msgpack import read_leaves
from model.convert.import_lwm import convert_lwm, llama_tensors, lwm_config, open_lwm
from model.llama.config import modality_ranges
from storage.errors import UserError
from tests.model.lwm_reference import CHUNKED, DATA, EVERY, TEXT, arrays, joint, lwm_tensors, write_leaves
from tests.model.peak_memory import peak_bytes

VISION = DATA / "vision_V1_fp32"


def unpacked_by_msgpack_alone(path):
    """The format as an independent reader sees it: everything unpacked, arrays from their raw bytes."""

    def array(code, data):
        shape, dtype, raw = msgpack.unpackb(data)
        assert code == 1
        kind = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
        return np.frombuffer(raw, dtype=kind).reshape(shape)

    with open(path, "rb") as file:
        for key, packed in msgpack.Unpacker(file, max_buffer_size=1 << 30):
            yield "/".join(key), msgpack.unpackb(packed, ext_hook=array)


@pytest.mark.parametrize("name", ["text_A_fp32", "vision_V1_fp32", "vision_V1_bf16_part"])
def test_leaves_equal_an_independent_reading_of_the_file(name):
    leaves = read_leaves(f"params::{DATA / name}")
    expected = dict(unpacked_by_msgpack_alone(DATA / name))
    assert set(leaves) == set(expected)
    for path, leaf in leaves.items():
        bits = leaf.read().view(torch.int16).view(torch.uint16) if name.endswith("part") else leaf.read()
        np.testing.assert_array_equal(bits.numpy(), expected[path])


def test_bf16_leaves_are_the_fp32_ones_rounded():
    exact = read_leaves(VISION)
    rounded = read_leaves(DATA / "vision_V1_bf16_part")
    assert len(rounded) == 3
    for path, leaf in rounded.items():
        assert leaf.dtype == torch.bfloat16
        assert torch.equal(leaf.read(), exact[path].read().bfloat16())


@pytest.mark.parametrize("chunk_bytes", [7, 500, 1000, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_leaves_read_whole_and_by_layer_wherever_the_cuts_fall(tmp_path, chunk_bytes, dtype):
    tensors = {
        "params/params/transformer/h/scan_decoder/w": torch.randn(3, 20, 11).to(dtype),
        "params/params/transformer/ln_f/kernel": torch.randn(5).to(dtype),
    }
    with open(tmp_path / "file", "wb") as file:
        write_leaves(file, tensors, chunk_bytes)
    leaves = read_leaves(tmp_path / "file")
    assert list(leaves) == ["transformer/h/scan_decoder/w", "transformer/ln_f/kernel"]
    for leaf, tensor in zip(leaves.values(), tensors.values(), strict=True):
        assert torch.equal(leaf.read(), tensor)
        assert all(torch.equal(leaf.read(i), tensor[i]) for i in range(len(tensor)))
    stored = dict(unpacked_by_msgpack_alone(tmp_path / "file"))["params/params/transformer/h/scan_decoder/w"]
    assert (CHUNKED in stored) == (chunk_bytes < 1 << 30)


def test_writing_leaves_gives_back_the_released_file_byte_for_byte(tmp_path):
    leaves = {path: leaf.read() for path, leaf in read_leaves(VISION).items()}
    with open(tmp_path / "file", "wb") as file:
        write_leaves(file, leaves)
    assert (tmp_path / "file").read_bytes() == VISION.read_bytes()


@pytest.mark.parametrize("max_shard_bytes", [60_000, 1 << 30])
def test_converted_checkpoint_is_a_plain_llama_with_lwms_logits(tmp_path, max_shard_bytes):
    """Loaded by transformers' own from_pretrained; the vision slice of the joint head is LWM's vision head."""
    seen = []
    convert_lwm(VISION, tmp_path / "hf", 4, 256, 5e7, max_shard_bytes=max_shard_bytes, progress=seen.append)
    stock, report = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(seen) == set(stock.state_dict())
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    if max_shard_bytes == 60_000:
        index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in stock.state_dict().values())
        assert len(files) > 3
    else:
        assert files == ["model.safetensors"]
    stored = arrays("vision_V1")
    ids = torch.from_numpy(joint(stored["input_tokens"], stored["input_vision_masks"])).long()
    ours = stock(ids).logits.detach().numpy()[:, EVERY - 1 :: EVERY]
    np.testing.assert_allclose(ours[..., :TEXT], stored["text_logits"], rtol=0, atol=1.5e-5)
    np.testing.assert_allclose(ours[..., TEXT:], stored["vision_logits"], rtol=0, atol=1.5e-5)
    assert modality_ranges(AutoConfig.from_pretrained(tmp_path / "hf"))["text"] == range(TEXT)


def test_conversion_to_bf16_rounds_once_and_says_so(tmp_path):
    convert_lwm(DATA / "text_A_fp32", tmp_path / "hf", 4, 256, 1e6, dtype=torch.bfloat16)
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    leaves = open_lwm(DATA / "text_A_fp32")
    assert stock.dtype == torch.bfloat16
    for name, weight in llama_tensors(leaves, lwm_config(leaves, 4, 256, 1e6)):
        assert torch.equal(stock.state_dict()[name], weight.bfloat16())


@pytest.mark.parametrize(("name", "stacked"), [("text_A_fp32", False), ("vision_V1_fp32", True)])
def test_exporting_is_the_inverse_of_importing(name, stacked):
    leaves = open_lwm(DATA / name)
    config = lwm_config(leaves, 4, 256, 1e6)
    back = lwm_tensors(dict(llama_tensors(leaves, config)), config, stacked)
    assert set(back) == set(leaves)
    assert all(torch.equal(back[path], leaf.read()) for path, leaf in leaves.items())
    restacked = lwm_tensors(dict(llama_tensors(leaves, config)), config, not stacked)
    assert set(restacked) != set(leaves)


def test_an_npz_of_flax_paths_is_as_good(tmp_path):
    leaves = open_lwm(VISION)
    np.savez(tmp_path / "params.npz", **{path: leaf.read().numpy() for path, leaf in leaves.items()})
    again = open_lwm(tmp_path / "params.npz")
    config = lwm_config(leaves, 4, 256, 5e7)
    one, two = dict(llama_tensors(leaves, config)), dict(llama_tensors(again, config))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_memory_is_one_shard_and_not_the_checkpoint(tmp_path):
    """24 stacked layers in chunks: what is held at once stays far under the whole."""
    width, layers = 128, 24
    leaves = {path: leaf.read() for path, leaf in read_leaves(DATA / "text_A_fp32").items() if "/h/" not in path}
    leaves["transformer/wte/embedding"] = torch.randn(64, width)
    leaves["lm_head/kernel"] = torch.randn(width, 64)
    leaves["transformer/ln_f/kernel"] = torch.ones(width)
    for name, shape in {"wq": (width, width), "wk": (width, width), "wv": (width, width), "wo": (width, width)}.items():
        leaves[f"transformer/h/scan_decoder/attention/{name}/kernel"] = torch.randn(layers, *shape)
    for name, shape in {"w1": (width, 256), "w2": (256, width), "w3": (width, 256)}.items():
        leaves[f"transformer/h/scan_decoder/feed_forward/{name}/kernel"] = torch.randn(layers, *shape)
    for name in ("attention_norm", "ffn_norm"):
        leaves[f"transformer/h/scan_decoder/{name}/kernel"] = torch.ones(layers, width)
    with open(tmp_path / "file", "wb") as file:
        write_leaves(file, leaves, chunk_bytes=1 << 18)
    whole = sum(tensor.nbytes for tensor in leaves.values())
    leaves.clear()
    shard = 1 << 20
    largest = 256 * width * 4
    peak = peak_bytes(lambda: convert_lwm(tmp_path / "file", tmp_path / "hf", 4, 256, 1e6, max_shard_bytes=shard))
    assert shard / 2 < peak < shard + 4 * largest
    assert peak < whole / 8


def _pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def _cut(path):
    path.write_bytes(VISION.read_bytes()[:-1000])


def _cut_in_a_header(path):
    path.write_bytes(VISION.read_bytes()[:131_100])


def _float8(path):
    array = msgpack.ExtType(1, msgpack.packb([[2], "float8", b"12"]))
    path.write_bytes(msgpack.packb([["a"], msgpack.packb(array)]))


@pytest.mark.parametrize("make", [_pickle, _cut, _cut_in_a_header, _float8, lambda path: path.write_bytes(b"")])
def test_a_file_that_is_not_whole_or_not_lwms_is_a_users_mistake(tmp_path, make):
    make(tmp_path / "file")
    with pytest.raises(UserError, match="copy the"):
        convert_lwm(tmp_path / "file", tmp_path / "hf", 4, 256, 1e6)
    assert not (tmp_path / "hf").exists()


def test_missing_files_existing_targets_and_wrong_heads_are_users_mistakes(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        convert_lwm(tmp_path / "none", tmp_path / "hf", 4, 256, 1e6)
    with pytest.raises(UserError, match="already exists"):
        convert_lwm(VISION, tmp_path, 4, 256, 1e6)
    with pytest.raises(UserError, match="heads: 5"):
        convert_lwm(VISION, tmp_path / "hf", 5, 256, 1e6)
    with pytest.raises(UserError, match="no leaf"):
        convert_lwm(DATA / "vision_V1_bf16_part", tmp_path / "hf", 4, 256, 1e6)
