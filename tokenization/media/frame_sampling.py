"""Which frames of a medium to take: a `FrameRequest`, the `Samples` of a video that it selects, and frames in chunks.

In: a rate, a size, a share of the video, a largest number of frames. Out: the numbers of the samples to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


def uniform_sample(n: int, maximum: int) -> np.ndarray:
    """At most `maximum` of n samples, int64: all, or as in LWM `linspace(0, n - 1, maximum)` truncated."""
    return np.arange(n) if n <= maximum else np.linspace(0, n - 1, maximum).astype(np.int64)


@dataclass(frozen=True)
class Samples:
    """Which samples of a video to take, by number: sample k is the frame shown k / fps seconds from the first frame.

    numbers: int64 [n], ascending. to_end: the last of them is the video's last, so the video is decoded to its end and
    checked to be whole there.
    """

    numbers: np.ndarray
    to_end: bool

    def __len__(self) -> int:
        return len(self.numbers)

    def pieces(self, span: int) -> list[Samples]:
        """The same samples cut by time into pieces of `span` numbers, which decode separately."""
        if not len(self):
            return [self]
        number_of_piece = (self.numbers - self.numbers[0]) // span
        cuts = np.split(self.numbers, np.flatnonzero(np.diff(number_of_piece)) + 1)
        return [Samples(cut, self.to_end and cut is cuts[-1]) for cut in cuts]


@dataclass(frozen=True, kw_only=True)
class FrameRequest:
    """Which frames of a video or an image to take, and in what form.

    fps: samples per second of video. size: width and height of a frame in pixels. chunk: the most frames of a chunk.
    max_frames, part, window: of a video, as in `choose_samples`. samples: those to take of a video, instead of
    max_frames and part. threads: for decoding a video. Raises ValueError on an fps, size or chunk that is not positive.
    """

    fps: float
    size: int
    chunk: int = 64
    max_frames: int | None = None
    part: tuple[float, float] = (0.0, 1.0)
    window: int | None = None
    samples: Samples | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.size < 1 or self.chunk < 1:
            raise ValueError(f"fps {self.fps}, size {self.size} and chunk {self.chunk} have to be positive")

    def choose(self, count: Callable[[], int]) -> tuple[Samples | None, int | None]:
        """The samples to take of a video, None for all; and their total, which `count` gives only if it is needed."""
        if self.samples is None and (self.max_frames is not None or self.part != (0.0, 1.0)):
            total = count()
            return choose_samples(total, self.max_frames, self.part, self.window), total
        return self.samples, None


def choose_samples(
    total: int, max_frames: int | None = None, part: tuple[float, float] = (0.0, 1.0), window: int | None = None
) -> Samples:
    """At most `max_frames` samples, by `uniform_sample`, in a part of a video of `total`; adjacent parts share none.

    window: consecutive samples that stay together. Of more than `max_frames`, whole windows are then left out.
    """
    start, end = int(total * part[0]), int(total * part[1])
    count = end - start
    most = count if max_frames is None else max_frames
    if window is None or count <= most:
        kept = uniform_sample(count, most)
    else:
        windows = uniform_sample(-(-count // window), max(1, most // window))
        kept = (windows[:, None] * window + np.arange(window)).ravel()
        kept = kept[kept < count][:most]
    return Samples(start + kept, to_end=end == total)


def document_frames(count: int, length: int, step: int = 1) -> Iterator[np.ndarray]:
    """The numbers, int64 and ascending, of the frames of each document that a video of `count` frames is cut in.

    Each has `length` frames that are `step` apart; those between are of `step - 1` further documents over the same
    time. Together they have every frame once; the last ones may be shorter.
    """
    for start in range(0, count, length * step):
        for phase in range(min(step, count - start)):
            yield np.arange(start + phase, min(start + length * step, count), step)


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive samples of a video. frames: uint8 [n, size, size, 3] RGB. times: float64 [n], seconds.

    total: samples of the whole video, where they were counted to choose these.
    """

    frames: np.ndarray
    times: np.ndarray
    total: int | None = None

    def __len__(self) -> int:
        return len(self.frames)
