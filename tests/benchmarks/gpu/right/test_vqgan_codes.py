"""The part that holds the VQGAN's codes fails where the search, the latents or the batches are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benchmarks.gpu.rehearsal import rehearse
from tokenization.codecs.vqgan import model
from tokenization.codecs.vqgan.model import VQGAN


@pytest.mark.slow
def test_the_codes_as_they_are_pass() -> None:
    done = rehearse("vqgan-codes")
    assert done.passed, done.last
    assert {row["kind"] for row in done.rows} == {"check"}


def _second_nearest(patch: pytest.MonkeyPatch) -> None:
    def second(latents: Tensor, codebook: Tensor) -> Tensor:
        cells = latents.float().permute(0, 2, 3, 1)
        return torch.stack(
            [(cell @ codebook.T - codebook.square().sum(1) / 2).topk(2).indices[..., 1] for cell in cells]
        )

    patch.setattr(model, "nearest_codes", second)


def _no_norm(patch: pytest.MonkeyPatch) -> None:
    def without(latents: Tensor, codebook: Tensor) -> Tensor:
        return torch.stack([(cell @ codebook.T).argmax(-1) for cell in latents.float().permute(0, 2, 3, 1)])

    patch.setattr(model, "nearest_codes", without)


def _coarse_latents(patch: pytest.MonkeyPatch) -> None:
    encode = VQGAN.encode_latents

    def coarse(self: Any, batch: Tensor) -> Tensor:
        latents = encode(self, batch)
        return latents if self.dtype == torch.float32 else latents.to(torch.float8_e4m3fn).to(latents.dtype)

    patch.setattr(VQGAN, "encode_latents", coarse)


def _batch_dependent(patch: pytest.MonkeyPatch) -> None:
    encode = VQGAN.encode_latents

    def mixed(self: Any, batch: Tensor) -> Tensor:
        latents = encode(self, batch)
        return latents + 1e-2 * latents.mean(0, keepdim=True)

    patch.setattr(VQGAN, "encode_latents", mixed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "shows_in"),
    [
        (_second_nearest, "not the nearest entry"),
        (_no_norm, "not the nearest entry"),
        (_coarse_latents, "bf16 latents: error"),
        (_batch_dependent, "other batches change"),
    ],
)
def test_wrong_codes_fail(wrong: Any, shows_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    done = rehearse("vqgan-codes")
    assert done.last["kind"] == "failed"
    assert any(shows_in in what for what in done.broken), done.broken
