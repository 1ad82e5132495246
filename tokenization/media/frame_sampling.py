"""Which samples of a video are taken: all, a share, a number at most; and how they are cut into pieces.

In: how many samples a video has. Out: `Samples`, by which any slice of it decodes by itself to the frames of the whole.
"""

from __future__ import annotations

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


def choose_samples(total: int, max_frames: int | None = None, part: tuple[float, float] = (0.0, 1.0)) -> Samples:
    """Of `total` samples those in a share of the video, cut at whole samples, so that its parts share it out exactly,
    and of these `max_frames` at most, by `uniform_sample`.
    """
    start, end = int(total * part[0]), int(total * part[1])
    kept = uniform_sample(end - start, end - start if max_frames is None else max_frames)
    return Samples(start + kept, to_end=end == total)
