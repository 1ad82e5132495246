"""The part that holds cached decoding against the full forward fails where a cache is wrong anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from model.inference.kv_decoder import Decoder
from tests.benchmarks.gpu.rehearsal import rehearse


@pytest.mark.slow
def test_decoding_as_it_is_passes() -> None:
    done = rehearse("cache")
    assert done.passed, done.last
    assert {row["measured"] > 0 for row in done.of("check")} == {True}


def _late_position(patch: pytest.MonkeyPatch) -> None:
    append = Decoder.append

    def late(self: Any, ids: Tensor) -> None:
        self.next_position = self.next_position + 1
        append(self, ids)
        self.next_position = self.next_position - 1

    patch.setattr(Decoder, "append", late)


def _no_mask(patch: pytest.MonkeyPatch) -> None:
    advance = Decoder._advance

    def unmasked(self: Any, *args: Tensor) -> None:
        self.padded = False
        advance(self, *args)

    patch.setattr(Decoder, "_advance", unmasked)


def _positions_with_padding(patch: pytest.MonkeyPatch) -> None:
    advance = Decoder._advance

    def counted(self: Any, ids: Tensor, positions: Tensor, mask: Tensor) -> None:
        every = torch.arange(mask.shape[1])[-ids.shape[1] :]
        advance(self, ids, every.expand_as(ids) if ids.shape[1] > 1 else positions, mask)

    patch.setattr(Decoder, "_advance", counted)


def _rows_of_others(patch: pytest.MonkeyPatch) -> None:
    keep = DynamicCache.batch_select_indices
    patch.setattr(DynamicCache, "batch_select_indices", lambda self, rows: keep(self, rows.flip(0)))


def _forgotten_key(patch: pytest.MonkeyPatch) -> None:
    update = DynamicLayer.update

    def forgetful(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(self, keys, values, *args, **kwargs)
        values = values.clone()
        values[:, :, :1] = 0
        return keys, values

    patch.setattr(DynamicLayer, "update", forgetful)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "shows_in"),
    [
        (_late_position, "chunks"),
        (_no_mask, "padded"),
        (_positions_with_padding, "padded"),
        (_rows_of_others, "padded"),
        (_forgotten_key, "ring"),
    ],
)
def test_a_wrong_cache_fails(wrong: Any, shows_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    done = rehearse("cache")
    assert done.last["kind"] == "failed"
    for precision in ("fp32", "bf16"):
        assert any(shows_in in what and precision in what for what in done.broken), done.broken
