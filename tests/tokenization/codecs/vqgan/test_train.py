"""The small trainer: it learns, codes stay alive, and a killed run continues to the same bits."""

import io
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from storage.errors import UserError
from tokenization.codecs.vqgan.config import TrainSettings, VQGANConfig
from tokenization.codecs.vqgan.metrics import psnr
from tokenization.codecs.vqgan.model import VQGAN, pixels_of
from tokenization.codecs.vqgan.perceptual import perceptual_distance, still_features
from tokenization.codecs.vqgan.train import Trainer, train_vqgan

TINY = VQGANConfig(
    resolution=16, channels=(16, 32), res_blocks=1, latent_channels=16, embed_dim=8, codebook_size=64, norm_groups=4
)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Gradients of random colours and directions: a codebook of 64 can hold them."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    angle = generator.uniform(0, 2 * np.pi, (200, 1, 1))
    slope = np.cos(angle) * x + np.sin(angle) * y
    middle, colour = generator.uniform(60, 196, (2, 200, 1, 1, 3))
    return (middle + slope[..., None] * (colour - 128)).clip(0, 255).astype(np.uint8)


def trained(frames: np.ndarray, steps: int, **settings: Any) -> VQGAN:
    return train_vqgan(frames, TINY, TrainSettings(steps=steps, warmup=10, **settings))


# In bfloat16 it takes minutes on a processor that has to emulate it.
@pytest.mark.parametrize(
    "bf16", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.faults)]
)
def test_it_learns_frames_it_has_not_seen_and_keeps_the_codebook_alive(frames: np.ndarray, bf16: bool) -> None:
    seen, unseen = frames[:150], frames[150:]
    metrics: list[dict[str, float]] = []
    vqgan = train_vqgan(
        seen,
        TINY,
        # At twice this rate it depends on the last bits of a processor's sums whether it learns.
        TrainSettings(steps=200, batch=16, lr=1e-3, warmup=10, decay=0.9, crop_until=0.0, bf16=bf16),
        progress=lambda step, values: metrics.append({"step": step, **values}),
    )
    flat = np.broadcast_to(unseen.mean(axis=(1, 2, 3), keepdims=True).astype(np.uint8), unseen.shape)
    codes = vqgan.encode(unseen)
    assert psnr(unseen, vqgan.decode(codes)) > psnr(unseen, flat) + 2
    assert [values["step"] for values in metrics] == list(range(1, 201))
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 2
    assert metrics[-1]["live_codes"] > 48
    assert len(np.unique(codes)) > 32


def test_same_seed_same_weights_other_seed_other_weights(frames: np.ndarray) -> None:
    assert trained(frames, 6).fingerprint == trained(frames, 6).fingerprint
    assert trained(frames, 6).fingerprint != trained(frames, 6, seed=1).fingerprint


@pytest.mark.parametrize(
    ("bf16", "further"), [(True, {}), (False, {}), (False, {"perceptual": 1.0, "adversarial": 0.8})]
)
def test_a_killed_run_continues_to_the_same_bits(frames: np.ndarray, bf16: bool, further: dict[str, float]) -> None:
    settings = TrainSettings(
        steps=12,
        warmup=4,
        bf16=bf16,
        checkpoint_steps=4,
        restart_below=0.5,  # so that codes move to the end
        **further,
    )
    saved: list[bytes] = []

    def save(state: dict[str, Any]) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        saved.append(file.getvalue())

    whole = train_vqgan(frames, TINY, settings, save=save)
    assert len(saved) == 2  # after steps 4 and 8
    for content in saved:
        torch.manual_seed(99)
        torch.rand(7)  # nothing hangs on the global generator
        state = torch.load(io.BytesIO(content), weights_only=True)
        progress = Mock()
        again = train_vqgan(frames, TINY, settings, state=state, progress=progress)
        assert again.fingerprint == whole.fingerprint
        assert [call.args[0] for call in progress.call_args_list] == list(range(state["step"] + 1, 13))


@pytest.mark.slow
def test_frames_look_nearer_when_trained_to() -> None:
    def distance(**settings: Any) -> float:
        vqgan = trained(stripes, 30, batch=8, lr=2e-3, crop_until=0.0, quantize_from=1.0, bf16=False, **settings)
        with torch.no_grad():
            pixels = pixels_of(torch.from_numpy(stripes))
            back = vqgan.model.decode(vqgan.model.encode(pixels).latents, force_not_quantize=True).sample
            return float(perceptual_distance(back, pixels, still_features()))

    generator = np.random.default_rng(0)
    stripes = generator.integers(0, 256, (32, 4, 4, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    assert distance(perceptual=4.0) < 0.95 * distance()


def test_the_discriminator_is_there_from_its_share_of_the_steps_on(frames: np.ndarray) -> None:
    metrics: list[dict[str, float]] = []
    settings = TrainSettings(steps=4, warmup=1, adversarial=0.8, bf16=False)
    train_vqgan(frames, TINY, settings, progress=lambda step, values: metrics.append(values))
    assert ["adversarial_weight" in values for values in metrics] == [False, False, True, True]


def test_a_finished_state_trains_no_more(frames: np.ndarray) -> None:
    settings = TrainSettings(steps=3, warmup=1)
    trainer = Trainer(TINY, settings)
    while trainer.step < 3:
        trainer.train_step(frames)
    again = train_vqgan(frames, TINY, settings, state=trainer.state_dict(), progress=lambda *_: pytest.fail("a step"))
    assert again.fingerprint == VQGAN(trainer.model).fingerprint


def test_codes_that_never_win_are_moved_to_where_the_frames_are(frames: np.ndarray) -> None:
    trainer = Trainer(TINY, TrainSettings(steps=100, warmup=1))
    trainer.train_step(frames)
    trainer.codebook[:60] = 1e6  # out of reach
    trainer.wins[:60] = 0
    assert trainer.train_step(frames)["moved_codes"] >= 60
    assert trainer.codebook.abs().max() < 1e3


def test_frames_are_drawn_by_weight(frames: np.ndarray) -> None:
    class Watched:
        drawn: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return len(frames)

        def __getitem__(self, index: np.ndarray) -> np.ndarray:
            self.drawn += index.tolist()
            return frames[index]

    weights = np.where(np.arange(200) < 20, 9.0, 1.0)  # a tenth of the frames, half of the weight
    train_vqgan(Watched(), TINY, TrainSettings(steps=8, warmup=1), weights=weights)
    assert len(Watched.drawn) == 8 * TrainSettings(steps=1).batch + 1  # and one to see its size
    assert 0.3 < np.mean(np.array(Watched.drawn[1:]) < 20) < 0.7


def test_threads_are_as_before_afterwards(frames: np.ndarray) -> None:
    before = torch.get_num_threads()
    trained(frames, 1, threads=before + 1)
    assert torch.get_num_threads() == before


def test_mistakes_are_user_errors(frames: np.ndarray) -> None:
    with pytest.raises(UserError, match="no frames to train on"):
        trained(frames[:0], 1)
    with pytest.raises(UserError, match=r"vqgan\.resolution is 16"):
        trained(frames[:, :8], 1)
    other = VQGANConfig(**{**TINY.to_dict(), "codebook_size": 32})
    state = Trainer(other, TrainSettings(steps=1)).state_dict()
    with pytest.raises(UserError, match="other sizes"):
        train_vqgan(frames, TINY, TrainSettings(steps=1), state=state)
