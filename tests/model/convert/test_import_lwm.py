"""LWM's checkpoint files of every format: read in place, and cut into the weights of a plain Llama, and back."""

from __future__ import annotations

import pickle
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from model.convert.flax_msgpack import read_leaves
from model.convert.import_lwm import LWMWeights, lwm_config, open_lwm
from model.llama.initial_weights import weight_shapes
from storage.errors import UserError
from tests.model.lwm_reference import CHUNKED, DATA, llama_tensors, lwm_tensors, write_leaves

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


@pytest.mark.parametrize(("name", "stacked"), [("text_A_fp32", False), ("vision_V1_fp32", True)])
def test_exporting_is_the_inverse_of_importing(name, stacked):
    leaves = open_lwm(DATA / name)
    config = lwm_config(leaves, 4, 256, 1e6)
    back = lwm_tensors(llama_tensors(leaves, config), config, stacked)
    assert set(back) == set(leaves)
    assert all(torch.equal(back[path], leaf.read()) for path, leaf in leaves.items())
    restacked = lwm_tensors(llama_tensors(leaves, config), config, not stacked)
    assert set(restacked) != set(leaves)


def test_an_npz_of_flax_paths_is_as_good(tmp_path):
    leaves = open_lwm(VISION)
    np.savez(tmp_path / "params.npz", **{path: leaf.read().numpy() for path, leaf in leaves.items()})
    again = open_lwm(tmp_path / "params.npz")
    config = lwm_config(leaves, 4, 256, 5e7)
    one, two = llama_tensors(leaves, config), llama_tensors(again, config)
    assert all(torch.equal(one[name], two[name]) for name in one)


def _pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def _cut(path):
    path.write_bytes(VISION.read_bytes()[:-1000])


def _cut_in_a_header(path):
    path.write_bytes(VISION.read_bytes()[:131_100])


def _float8(path):
    array = msgpack.ExtType(1, msgpack.packb([[2], "float8", b"12"]))
    path.write_bytes(msgpack.packb([["transformer", "a"], msgpack.packb(array)]))


def _negative(path):
    array = msgpack.ExtType(1, msgpack.packb([[-2, -1], "float32", bytes(8)]))
    path.write_bytes(msgpack.packb([["transformer", "a"], msgpack.packb(array)]))


def _deep(path):
    path.write_bytes(b"\x81\xa1a" * 100_000 + b"\x80")


def _long_map(path):
    path.write_bytes(b"\xdf\xff\xff\xff\xff" + b"\xa1a\xc0" * 10)


def _long_record(path):
    array = msgpack.packb(msgpack.ExtType(1, msgpack.packb([[1], "float32", bytes(4)])))
    path.write_bytes(msgpack.packb([["transformer", "a"], array + b"more"]))


DAMAGES = (_pickle, _cut, _cut_in_a_header, _float8, _negative, _deep, _long_map, _long_record)


@pytest.mark.parametrize("make", [*DAMAGES, lambda path: path.write_bytes(b"")])
def test_a_file_that_is_not_whole_or_not_lwms_is_a_users_mistake(tmp_path, make):
    make(tmp_path / "file")
    with pytest.raises(UserError, match="copy the"):
        open_lwm(tmp_path / "file")


def test_every_cut_of_a_file_is_refused_and_no_changed_byte_of_its_beginning_is_a_traceback(tmp_path):
    """Nor an endless loop or a large allocation. Past the first header a changed byte is another number, mostly."""
    whole = nested(VISION)
    for end in np.random.default_rng(0).integers(1, len(whole), 50):
        (tmp_path / "file").write_bytes(whole[:end])
        with pytest.raises(UserError, match="copy the file again"):
            open_lwm(tmp_path / "file")
    refused = 0
    for place in range(70):
        for byte in (0, 0x7F, 0xC1, 0xDF, 0xFF):
            (tmp_path / "file").write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                weights_of(tmp_path / "file")
            except UserError:
                refused += 1
    assert refused > 200


def weights_of(path):
    leaves = open_lwm(path)
    weights = LWMWeights(leaves, lwm_config(leaves, 4, 256, 5e7))
    weights.check()
    return {name: weights.read(name) for name in weight_shapes(weights.config)}


def nested(path, further=()):
    """The `flax_params::` file of a checkpoint: one map of maps."""
    tree = {"params": {}}
    for key, value in msgpack.Unpacker(path.open("rb"), max_buffer_size=1 << 30):
        node = tree["params"]
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = msgpack.unpackb(value)
    return msgpack.packb(tree | dict(further))


def test_one_nested_map_has_the_same_weights(tmp_path):
    (tmp_path / "file").write_bytes(nested(VISION, {"step": 7, "rng": [b"x" * 100, {"a": None}]}))
    assert_same(weights_of(f"flax_params::{tmp_path / 'file'}"), weights_of(VISION))


@pytest.mark.parametrize("chunk_bytes", [3000, 1 << 30])
def test_a_train_state_has_the_same_weights_beside_what_the_optimizer_keeps(tmp_path, chunk_bytes):
    """int32 leaves and moments, before and behind the parameters, as flax's own serialization writes them."""

    def record(path, value):
        return msgpack.packb([path.split("/"), msgpack.packb(value)])

    integer = msgpack.ExtType(1, msgpack.packb([[], "int32", bytes(4)]))
    moment = msgpack.ExtType(1, msgpack.packb([[3], "float32", bytes(12)]))
    with open(tmp_path / "file", "wb") as file:
        file.write(record("step", integer) + record("opt_state/1/0/mu/params/transformer/ln_f/kernel", moment))
        leaves = {f"params/params/{path}": leaf.read() for path, leaf in read_leaves(VISION).items()}
        write_leaves(file, leaves, chunk_bytes)
        file.write(record("opt_state/1/1/count", integer) + record("opt_state/1/2/empty", None))
    assert_same(weights_of(f"trainstate::{tmp_path / 'file'}"), weights_of(VISION))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_missing_files_wrong_heads_and_half_a_model_are_users_mistakes(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_lwm(tmp_path / "none")
    with pytest.raises(UserError, match="heads: 5"):
        lwm_config(open_lwm(VISION), 5, 256, 1e6)
    with pytest.raises(UserError, match="no leaf"):
        lwm_config(open_lwm(DATA / "vision_V1_bf16_part"), 4, 256, 1e6)
    (tmp_path / "file").write_bytes(msgpack.packb({"step": 1}))
    with pytest.raises(UserError, match="none of the parameters"):
        open_lwm(tmp_path / "file")
    leaves = {path: leaf for path, leaf in open_lwm(VISION).items() if "w2" not in path}
    with pytest.raises(UserError, match=r"has no model\.layers\.0\.mlp\.down_proj\.weight"):
        LWMWeights(leaves, lwm_config(leaves, 4, 256, 5e7)).check()


def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        write_leaves(file, {f"transformer/{n}": torch.ones(1 << 22) for n in range(16)})

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0])

    leaves = read_leaves(tmp_path / "file")
    before = resident()
    for leaf in leaves.values():
        assert leaf.read().sum() == 1 << 22
    assert resident() - before < 32 << 10  # KiB; the file has 256 MiB
