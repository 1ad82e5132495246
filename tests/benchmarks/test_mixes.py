"""The mixes are what they say: lengths, shares of tokens, and the same sequence for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.mixes import MIXES, Kind, document_mix, useful_pairs
from storage.errors import UserError


@pytest.mark.parametrize("mix", MIXES)
def test_documents_tile_the_context(mix: str) -> None:
    cu_seqlens = document_mix(mix, 50_001, seed=3)
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == 50_001
    assert (np.diff(cu_seqlens) > 0).all()
    np.testing.assert_array_equal(cu_seqlens, document_mix(mix, 50_001, seed=3))


def test_an_image_is_256_codes_and_a_clip_30_frames() -> None:
    images, clips = (np.diff(document_mix(mix, 2**20))[:-1] for mix in ("images", "clips"))
    assert images.min() == 258 + 16
    assert images.max() == 258 + 128
    assert clips.min() >= 30 * 257 + 1 + 16
    assert clips.max() <= 30 * 257 + 1 + 128
    assert list(document_mix("one", 4096)) == [0, 4096]


@pytest.mark.parametrize("kind", MIXES["lwm"])
def test_a_kinds_mean_is_that_of_what_it_draws(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([kind.length(rng) for _ in range(20_000)])
    assert abs(drawn.mean() - kind.mean) < 4 * drawn.std() / np.sqrt(len(drawn))


def test_image_pairs_are_two_fifths_of_the_lwm_mix() -> None:
    lengths = np.concatenate([np.diff(document_mix("lwm", 2**20, seed)) for seed in range(40)])
    share = {
        "images": lengths[lengths <= 258 + 128].sum() / lengths.sum(),
        "clips": lengths[(lengths >= 7727) & (lengths <= 7839)].sum() / lengths.sum(),
    }
    assert share["images"] == pytest.approx(0.42, abs=0.03)
    assert share["clips"] == pytest.approx(0.21, abs=0.03)
    assert sum(kind.share for kind in MIXES["lwm"]) == pytest.approx(1)


def test_useful_pairs_are_those_of_a_token_and_one_before_it_or_itself() -> None:
    assert useful_pairs(np.array([0, 1, 4])) == 1 + (1 + 2 + 3)


def test_an_unknown_mix_is_told_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match="no mix 'videos', only images, clips, lwm, one"):
        document_mix("videos", 1024)
