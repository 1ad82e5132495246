"""The part that holds cached decoding against the full forward fails where a cache is wrong anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.inference import cached_attention, kv_decoder
from model.inference.cached_attention import ChunkAttention
from model.inference.kv_cache import KVCache, store
from model.inference.kv_decoder import Decoder
from tests.benchmarks.gpu.rehearsal import rehearse


@pytest.mark.slow
def test_decoding_as_it_is_passes() -> None:
    done = rehearse("cache")
    assert done.passed, done.last
    assert {row["measured"] > 0 for row in done.of("check")} == {True}


def _late_position(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Decoder, "lengths", property(lambda self: [row.length + 1 for row in self.cache.rows]))


def _positions_that_restart(patch: pytest.MonkeyPatch) -> None:
    share = kv_decoder._share
    patch.setattr(
        kv_decoder,
        "_share",
        lambda chunk, tokens, lengths, rank: share(chunk, tokens, [0] * len(lengths), rank),
    )


def _older_keys_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChunkAttention, "_merge_older_", lambda *args: None)


def _rows_of_others(patch: pytest.MonkeyPatch) -> None:
    select = KVCache.select
    patch.setattr(KVCache, "select", lambda self, rows: select(self, list(rows)[::-1]))


def _forgotten_value(patch: pytest.MonkeyPatch) -> None:
    def forgetful(writes: Any, layer: int, k: Tensor, v: Tensor) -> None:
        store(writes, layer, k, torch.cat((torch.zeros_like(v[:1]), v[1:])))

    patch.setattr(cached_attention, "store", forgetful)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "shows_in"),
    [
        (_late_position, "chunks"),
        (_positions_that_restart, "chunks"),
        (_older_keys_left_out, "chunks"),
        (_rows_of_others, "different lengths"),
        (_forgotten_value, "chunks"),
    ],
)
def test_a_wrong_cache_fails(wrong: Any, shows_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    done = rehearse("cache")
    assert done.last["kind"] == "failed"
    for precision in ("fp32", "bf16"):
        assert any(shows_in in what and precision in what for what in done.broken), done.broken
