"""The part that times the VQGAN's encoder fails where operations are miscounted or what is timed is not the encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.fast import vqgan
from tests.benchmarks.gpu.rehearsal import rehearse
from tokenization.codecs.vqgan import model
from tokenization.codecs.vqgan.config import VQGANConfig


@pytest.mark.slow
def test_every_variant_is_timed_and_a_missed_goal_is_explained() -> None:
    done = rehearse("vqgan")
    assert done.passed, done.last
    names = " ".join(row["what"] for row in done.of("figures"))
    assert all(name in names for name in ("eager, 2", "compiled", "the product's call", "weights in bf16"))
    assert [row["what"] for row in done.of("skipped")] == ["CUDA graph"]
    assert len(done.of("goal")) == 2
    for goal in done.of("goal"):
        assert goal["met"] or (goal["profile"] and goal["floor_seconds"] > 0)


def test_a_frame_of_lwm_takes_the_operations_that_its_sizes_say() -> None:
    assert vqgan.counted_flops(VQGANConfig.lwm()) == vqgan.reckoned_flops(VQGANConfig.lwm())
    assert round(vqgan.reckoned_flops(VQGANConfig.lwm()) / 1e9, 1) == 216.6
    # Its rows at full resolution, of 128 channels in bf16, pass ten times through the first level's convolutions.
    assert vqgan.moved_bytes(VQGANConfig.lwm()) > 10 * 256**2 * 128 * 2


def _doubled_operations(patch: pytest.MonkeyPatch) -> None:
    counted = vqgan.counted_flops
    patch.setattr(vqgan, "counted_flops", lambda config: 2 * counted(config))


def _skipped_block(patch: pytest.MonkeyPatch) -> None:
    latents = model.VQGAN.encode_latents

    def skipping(self: Any, batch: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return latents(self, batch)
        kept, self.model.encoder.mid_block = self.model.encoder.mid_block, torch.nn.Identity()
        result = latents(self, batch)
        self.model.encoder.mid_block = kept
        return result

    patch.setattr(model.VQGAN, "encode_latents", skipping)


def _second_nearest(patch: pytest.MonkeyPatch) -> None:
    def second(latents: Tensor, codebook: Tensor) -> Tensor:
        cells = latents.float().permute(0, 2, 3, 1)
        return torch.stack(
            [(cell @ codebook.T - codebook.square().sum(1) / 2).topk(2).indices[..., 1] for cell in cells]
        )

    exact = vqgan._setup
    patch.setattr(vqgan, "_setup", lambda *args: (exact(*args), patch.setattr(model, "nearest_codes", second))[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "shows_in"),
    [
        (_doubled_operations, "operations"),
        (_skipped_block, "eager, 2 frames"),
        (_second_nearest, "the product's call"),
    ],
)
def test_a_wrong_measurement_fails(wrong: Any, shows_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    done = rehearse("vqgan")
    assert done.last["kind"] == "failed"
    assert any(shows_in in what for what in done.broken), done.broken
