"""Which frames of a medium are asked for: a `FrameRequest`, and the `Samples` of a video that it comes to.

In: a rate, a size, a share of the video, a largest number of frames. Out: the numbers of the samples to take; cut into
pieces by time, each piece decodes by itself to the frames of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def uniform_sample(n: int, maximum: int) -> np.ndarray:
    """Which of n samples to keep, int64, at most `maximum`: all, or `linspace(0, n - 1, maximum)` truncated, as LWM
    does.
    """
    return np.arange(n) if n <= maximum else np.linspace(0, n - 1, maximum).astype(np.int64)


@dataclass(frozen=True)
class Samples:
    """Which samples of a video to take, by number: sample k is what is seen k / fps seconds from the first frame.

    numbers: int64 [n], ascending. to_end: the last of them is the video's last; then all behind the first is
    decoded, and the video checked to be whole at its end.
    """

    numbers: np.ndarray
    to_end: bool

    def __len__(self) -> int:
        return len(self.numbers)

    def pieces(self, span: int) -> list[Samples]:
        """The same samples cut by time, each piece of those within `span` numbers; any of them decodes by itself."""
        if not len(self):
            return [self]
        number_of_piece = (self.numbers - self.numbers[0]) // span
        cuts = np.split(self.numbers, np.flatnonzero(np.diff(number_of_piece)) + 1)
        return [Samples(cut, self.to_end and cut is cuts[-1]) for cut in cuts]


@dataclass(frozen=True, kw_only=True)
class FrameRequest:
    """Which frames of a video or an image are wanted, and in what form.

    fps: samples a second of video. size: pixels of a frame's width and height. chunk: frames of a chunk at most.
    max_frames, part: of a video, as in `choose_samples`. samples: of a video that was counted before, the samples to
    take; max_frames and part are not looked at then. threads: that decode a video. Raises ValueError on an fps, size or
    chunk that is not positive.
    """

    fps: float
    size: int
    chunk: int = 64
    max_frames: int | None = None
    part: tuple[float, float] = (0.0, 1.0)
    samples: Samples | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what no frame can be made of."""
        if self.fps <= 0 or self.size < 1 or self.chunk < 1:
            raise ValueError(f"fps {self.fps}, size {self.size} and chunk {self.chunk} have to be positive")

    def choose(self, count: Callable[[], int]) -> Samples | None:
        """The samples to take of a video, None for all; `count` is called for their total only where it matters."""
        if self.samples is None and (self.max_frames is not None or self.part != (0.0, 1.0)):
            return choose_samples(count(), self.max_frames, self.part)
        return self.samples


def choose_samples(total: int, max_frames: int | None = None, part: tuple[float, float] = (0.0, 1.0)) -> Samples:
    """Of `total` samples those in a share of the video, cut at whole samples, so that its parts share it out exactly,
    and of these `max_frames` at most, by `uniform_sample`.
    """
    start, end = int(total * part[0]), int(total * part[1])
    kept = uniform_sample(end - start, end - start if max_frames is None else max_frames)
    return Samples(start + kept, to_end=end == total)
