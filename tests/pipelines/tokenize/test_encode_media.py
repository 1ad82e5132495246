"""Small media fill the encoder's batches together, and each gets its own codes back, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, Medium, Origin
from pipelines.tokenize.encode_media import Encoded, _Batches, _Pending, encode_media
from storage.errors import BadData
from tokenization.media.frame_sampling import FrameChunk

pytestmark = pytest.mark.slow

FOUND = SourceObject("s/o", "s", "/o", 1, "e", "webdataset", False, {})


@ray.remote
class Pool:
    """A frame's code is its first value; it remembers how many frames it was given at a time.

    Odd batches and even ones are made by two encoders.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, boxed: list[ray.ObjectRef], media: str) -> tuple[np.ndarray, str]:
        frames = ray.get(boxed[0])
        self.batches.append(len(frames))
        return frames[:, :1, 0, 0].astype(np.int32), f"encoder {len(self.batches) % 2}"

    def given(self) -> list[int]:
        given, self.batches = self.batches, []
        return given


@pytest.fixture(scope="module")
def pool(local_ray: None) -> Any:
    return Pool.options(num_cpus=0).remote()  # type: ignore[attr-defined]


def encode(lengths: list[int], batch: int, pool: Any, in_flight: int = 1000) -> tuple[list[Any], list[int]]:
    """Media of so many frames, numbered through; of a negative length, one that breaks after so many."""
    first = np.cumsum([0, *map(abs, lengths)])

    def frames(found: SourceObject, medium: Medium) -> Iterator[FrameChunk]:
        number = int(medium.origin.key)
        for start in range(0, abs(lengths[number]), 5):  # chunks of at most 5
            values = np.arange(first[number] + start, min(first[number] + start + 5, first[number + 1]))
            frames = np.broadcast_to(values[:, None, None, None], (len(values), 2, 2, 3))
            yield FrameChunk(frames, values / 1.0, abs(lengths[number]))
        if lengths[number] < 0:
            raise BadData("broken")

    def never() -> Any:
        raise AssertionError("the frames come from elsewhere")

    media = [
        (FOUND, Medium(Origin(str(number)), "image", never, identity=("/o", "e", str(number))))
        for number in range(len(lengths))
    ]
    outcomes = [outcome for _, outcome in encode_media(media, frames, pool, batch, in_flight)]
    return outcomes, ray.get(pool.given.remote())


def test_images_share_batches_and_come_out_in_order(pool: Any) -> None:
    outcomes, given = encode([1] * 20, 8, pool)
    assert [(one.origin.key, one.codes.tolist()) for one in outcomes] == [(str(n), [[n]]) for n in range(20)]
    assert given == [8, 8, 4]


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (4, 1000), (7, 10_000), (100, 1)])
@pytest.mark.parametrize("lengths", [[13, 1, 2, 30, 1], [1, -7, 2, -1, 12, 0, 3], [-40], [0], []])
def test_each_medium_gets_all_its_codes_whatever_the_batch_and_a_broken_one_costs_itself(
    lengths: list[int], batch: int, in_flight: int, pool: Any
) -> None:
    outcomes, given = encode(lengths, batch, pool, in_flight)
    first = np.cumsum([0, *map(abs, lengths)]).tolist()
    assert len(outcomes) == len(lengths)
    for number, (length, outcome) in enumerate(zip(lengths, outcomes)):
        if length < 0:
            assert outcome == BadMedium(Origin(str(number)), "broken")
            continue
        assert isinstance(outcome, Encoded)
        expected = list(range(first[number], first[number + 1]))
        assert outcome.codes.ravel().tolist() == expected
        assert outcome.times.tolist() == expected
        assert outcome.total == (length or None)
        assert outcome.identity == ("/o", "e", str(number))
    assert all(size == batch for size in given[:-1])


def test_a_medium_has_the_encoders_of_its_frames(pool: Any) -> None:
    outcomes, given = encode([4, 3, 2, 0, 9], 4, pool)
    assert given == [4, 4, 4, 4, 2]
    both = "encoder 0; encoder 1"
    assert [one.encoder for one in outcomes] == ["encoder 1", "encoder 0", both, "", both]


def test_what_has_been_encoded_or_is_bad_stays_as_it_is_in_its_place(pool: Any) -> None:
    known = Encoded(Origin("known"), np.array([[7]], np.int32), np.zeros(1))
    bad = BadMedium(Origin("bad"), "no picture")
    fresh = [Medium(Origin(str(number)), "image", None) for number in range(3)]  # type: ignore[arg-type]

    def frames(found: SourceObject, medium: Medium) -> Iterator[FrameChunk]:
        yield FrameChunk(np.full((1, 2, 2, 3), int(medium.origin.key)), np.zeros(1))

    media = [fresh[0], known, fresh[1], bad, fresh[2]]
    outcomes = [outcome for _, outcome in encode_media(((FOUND, one) for one in media), frames, pool, 2, 1000)]
    assert ray.get(pool.given.remote()) == [2, 1]
    assert outcomes[1] is known
    assert outcomes[3] is bad
    assert [one.origin for one in outcomes] == [one.origin for one in media]
    assert [outcomes[number].codes.tolist() for number in (0, 2, 4)] == [[[0]], [[1]], [[2]]]


def test_frames_under_way_are_bounded_by_their_bytes(local_ray: None) -> None:
    class Slow:
        """Counts the calls that nobody has waited for yet."""

        def __init__(self) -> None:
            self.most = self.open = 0
            self.encode = self

        def remote(self, boxed: list[ray.ObjectRef], media: str) -> ray.ObjectRef:
            self.open += 1
            self.most = max(self.most, self.open)
            return ray.put((np.zeros((len(ray.get(boxed[0])), 1), np.int32), "slow"))

    def most(in_flight: int) -> int:
        slow = Slow()
        batches = _Batches(slow, 10, in_flight)
        received = batches._receive
        batches._receive = lambda: (setattr(slow, "open", slow.open - 1), received())  # type: ignore[method-assign]
        for _ in range(30):
            batches.add(_Pending(Origin("a")), np.zeros((7, 4, 4, 3), np.uint8))
        batches.finish()
        return slow.most

    batch = 10 * 4 * 4 * 3
    assert [most(batches * batch) for batches in (0, 1, 2, 5, 1000)] == [1, 1, 2, 5, 21]
