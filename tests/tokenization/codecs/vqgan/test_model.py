"""The VQGAN as the pipelines see it: codes that depend on the frame alone, files any diffusers user can read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel

from storage.errors import UserError
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan, pixels_of

SMALL = VQGANConfig(
    resolution=32, channels=(8, 16, 32), res_blocks=1, latent_channels=16, embed_dim=8, codebook_size=256, norm_groups=8
)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Smooth random pictures: neighbouring cells differ little, so a code near a border would show a last-bit
    change.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def model(frames: np.ndarray) -> VQModel:
    """Random weights with a codebook that lies where these frames' latents lie."""
    model = build_vqgan(SMALL, seed=0)
    with torch.no_grad():
        cells = model.encode(pixels_of(torch.from_numpy(frames))).latents.permute(0, 2, 3, 1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(cells[:: len(cells) // 256][:256])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_codes_of_a_frame_are_the_same_whatever_chunk_it_came_in(
    model: VQModel, frames: np.ndarray, dtype: torch.dtype, batch_size: int
) -> None:
    vqgan = VQGAN(model, dtype=dtype, batch_size=batch_size)
    together = vqgan.encode(frames)
    assert len(np.unique(together)) > 100
    for cuts in ([1] * 21, [5, 16], [8, 8, 5], [20, 1]):
        parts = np.split(frames, np.cumsum(cuts)[:-1])
        np.testing.assert_array_equal(np.concatenate([vqgan.encode(part) for part in parts]), together)
    order = np.random.default_rng(1).permutation(len(frames))
    np.testing.assert_array_equal(vqgan.encode(frames[order]), together[order])


def test_codes_do_not_depend_on_the_threads_of_the_caller(model: VQModel, frames: np.ndarray) -> None:
    vqgan = VQGAN(model, dtype=torch.bfloat16, batch_size=1)
    alone = vqgan.encode(frames)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        np.testing.assert_array_equal(vqgan.encode(frames), alone)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_codes_are_those_of_diffusers_own_quantizer(model: VQModel, frames: np.ndarray) -> None:
    with torch.no_grad():
        latents = model.encode(pixels_of(torch.from_numpy(frames[:8]))).latents
        _, _, (_, _, expected) = model.quantize(latents)
    codes = VQGAN(model, batch_size=8).encode(frames[:8])
    assert np.mean(codes.ravel() == expected.numpy()) > 0.999  # it takes square roots first, which makes ties


def test_decode_is_diffusers_decode_of_those_codes(model: VQModel, frames: np.ndarray) -> None:
    vqgan = VQGAN(model)
    codes = vqgan.encode(frames[:3])
    with torch.no_grad():
        latents = vqgan.codebook[torch.from_numpy(codes).long()].view(3, 8, 8, 8).permute(0, 3, 1, 2)
        pixels = model.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)
    expected = ((pixels + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(vqgan.decode(codes).astype(int) - expected).max() <= 1


def test_shapes_and_dtypes(model: VQModel, frames: np.ndarray) -> None:
    vqgan = VQGAN(model)
    codes = vqgan.encode(frames[:3])
    assert (codes.shape, codes.dtype) == ((3, 64), np.int32)
    decoded = vqgan.decode(codes)
    assert (decoded.shape, decoded.dtype) == ((3, 32, 32, 3), np.uint8)
    assert vqgan.encode(frames[:0]).shape == (0, 64)
    assert vqgan.decode(codes[:0]).shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match="frames"):
        vqgan.encode(frames[:, :16])
    with pytest.raises(ValueError, match="frames"):
        vqgan.encode(frames.astype(np.float32))
    for wrong in (-1, 256):
        with pytest.raises(ValueError, match="outside the codebook"):
            vqgan.decode(np.full((1, 64), wrong))
    with pytest.raises(ValueError, match="codes"):
        vqgan.decode(codes[:, :10])


def test_saved_weights_are_diffusers_and_come_back_equal(model: VQModel, frames: np.ndarray, tmp_path: Path) -> None:
    vqgan = VQGAN(model)
    vqgan.save(tmp_path)
    again = VQGAN.load(tmp_path, SMALL)
    assert again.fingerprint == vqgan.fingerprint
    np.testing.assert_array_equal(again.encode(frames), vqgan.encode(frames))
    plain = VQModel.from_pretrained(tmp_path)
    assert VQGAN(plain).fingerprint == vqgan.fingerprint


def test_an_encoder_alone_gives_the_same_codes(model: VQModel, frames: np.ndarray, tmp_path: Path) -> None:
    vqgan = VQGAN(model)
    vqgan.save(tmp_path)
    encoder = VQGAN.load(tmp_path, SMALL, encoder_only=True)
    np.testing.assert_array_equal(encoder.encode(frames), vqgan.encode(frames))
    assert sum(p.numel() for p in encoder.model.parameters()) < sum(p.numel() for p in model.parameters()) / 2


def test_fingerprint_follows_sizes_and_every_weight(model: VQModel) -> None:
    assert VQGAN(build_vqgan(SMALL, seed=1)).fingerprint == VQGAN(build_vqgan(SMALL, seed=1)).fingerprint
    assert VQGAN(build_vqgan(SMALL, seed=2)).fingerprint != VQGAN(build_vqgan(SMALL, seed=1)).fingerprint
    changed = VQGAN(build_vqgan(SMALL, seed=1))
    changed.model.decoder.conv_out.bias[0] += 1e-6
    assert changed.fingerprint != VQGAN(build_vqgan(SMALL, seed=1)).fingerprint


def test_a_seeded_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_vqgan(SMALL, seed=1)
    assert torch.rand(1) == expected


def test_weights_that_do_not_match_the_recipe_are_a_user_error(model: VQModel, tmp_path: Path) -> None:
    VQGAN(model).save(tmp_path)
    larger = VQGANConfig(**{**SMALL.to_dict(), "codebook_size": 512})
    with pytest.raises(UserError, match=r"codebook_size is 256 but the recipe's vqgan.codebook_size is 512"):
        VQGAN.load(tmp_path, larger)


def test_missing_and_damaged_weights_are_a_user_error(model: VQModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        VQGAN.load(tmp_path / "absent")
    VQGAN(model).save(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="unreadable"):
        VQGAN.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="unreadable"):
        VQGAN.load(tmp_path)


def test_other_architectures_are_a_user_error(tmp_path: Path) -> None:
    VQModel(block_out_channels=(32,), latent_channels=4, num_vq_embeddings=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mid_block_add_attention"):
        VQGAN.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"resolution": 30}, "no multiple of 4"), ({"channels": (8, 12, 32)}, "multiples of norm_groups")],
)
def test_impossible_sizes_are_a_user_error(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VQGANConfig(**{**SMALL.to_dict(), **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_on_a_gpu_are_those_of_the_cpu(model: VQModel, frames: np.ndarray) -> None:
    expected = VQGAN(model).encode(frames)
    assert np.mean(VQGAN(model, device="cuda").encode(frames) == expected) > 0.999
