"""Small media fill the encoder's batches together, and each gets its own codes back, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.media import BadMedium, Medium, Origin
from pipelines.sources import SourceObject
from pipelines.tokenize.encoders import Encoded, encode_media
from tokenization.errors import BadData
from tokenization.video import FrameChunk

pytestmark = pytest.mark.slow

FOUND = SourceObject("s/o", "s", "/o", 1, "e", "webdataset", False, {})


@ray.remote
class Encoder:
    """A frame's code is its first value; it remembers how many frames it was given at a time."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, frames: np.ndarray) -> np.ndarray:
        self.batches.append(len(frames))
        return frames[:, :1, 0, 0].astype(np.int32)

    def given(self) -> list[int]:
        given, self.batches = self.batches, []
        return given


@pytest.fixture(scope="module")
def encoders(local_ray: None) -> list[Any]:
    return [Encoder.options(num_cpus=0).remote() for _ in range(3)]  # type: ignore[attr-defined]


def encode(lengths: list[int], batch: int, encoders: list[Any]) -> tuple[list[Any], list[list[int]]]:
    """Media of so many frames, numbered through; of a negative length, one that breaks after so many."""
    first = np.cumsum([0, *map(abs, lengths)])

    def frames(found: SourceObject, medium: Medium) -> Iterator[FrameChunk]:
        number = int(medium.origin.key)
        for start in range(0, abs(lengths[number]), 5):  # chunks of at most 5
            values = np.arange(first[number] + start, min(first[number] + start + 5, first[number + 1]))
            yield FrameChunk(np.broadcast_to(values[:, None, None, None], (len(values), 2, 2, 3)), values / 1.0)
        if lengths[number] < 0:
            raise BadData("broken")

    def never() -> Any:
        raise AssertionError("the frames come from elsewhere")

    media = [(FOUND, Medium(Origin(str(number)), "image", never)) for number in range(len(lengths))]
    outcomes = [outcome for _, outcome in encode_media(media, frames, encoders, batch)]
    return outcomes, ray.get([encoder.given.remote() for encoder in encoders])


def test_images_share_batches_and_come_out_in_order(encoders: list[Any]) -> None:
    outcomes, given = encode([1] * 20, 8, encoders[:1])
    assert [(one.origin.key, one.codes.tolist()) for one in outcomes] == [(str(n), [[n]]) for n in range(20)]
    assert given == [[8, 8, 4]]


def test_batches_go_around_the_pool(encoders: list[Any]) -> None:
    _, given = encode([3] * 12, 6, encoders)
    assert given == [[6, 6], [6, 6], [6, 6]]


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
@pytest.mark.parametrize("lengths", [[13, 1, 2, 30, 1], [1, -7, 2, -1, 12, 0, 3], [-40], [0], []])
def test_each_medium_gets_all_its_codes_whatever_the_batch_and_a_broken_one_costs_itself(
    lengths: list[int], batch: int, encoders: list[Any]
) -> None:
    outcomes, given = encode(lengths, batch, encoders[:1])
    first = np.cumsum([0, *map(abs, lengths)]).tolist()
    assert len(outcomes) == len(lengths)
    for number, (length, outcome) in enumerate(zip(lengths, outcomes)):
        if length <= 0:
            assert outcome == BadMedium(Origin(str(number)), "broken" if length else "no frame in it")
            continue
        assert isinstance(outcome, Encoded)
        expected = list(range(first[number], first[number + 1]))
        assert outcome.codes[:, 0].tolist() == expected
        assert outcome.times.tolist() == expected
    assert all(size == batch for size in given[0][:-1])
