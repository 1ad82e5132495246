"""How the codes of a modality lie in a sequence: frames of so many codes, markers behind them, text around them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenization.vocabulary import Modality

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Framing:
    """How the codes of a modality lie in a sequence.

    codes: of one frame. opening, closing: text ids around a span; without an opening, a span begins only where a prompt
    does it. most_frames: that a span may have. Of the modality's markers the first stands between frames and the last
    after the last one; with one marker alone, a frame follows a frame directly, and with none, a span ends after
    `most_frames`. Raises ValueError on a frame without codes and on a span without frames or end.
    """

    modality: Modality
    codes: int
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    most_frames: int = UNLIMITED

    def __post_init__(self) -> None:
        if self.codes < 1 or self.most_frames < 1:
            raise ValueError(f"a span of {self.modality.name} needs at least one frame of at least one code")
        if not self.modality.markers and self.most_frames == UNLIMITED:
            raise ValueError(f"{self.modality.name} has no marker that ends a span; give most_frames")

    @property
    def between(self) -> int | None:
        """The joint id between two frames."""
        return self.modality.marker(self.modality.markers[0]) if len(self.modality.markers) > 1 else None

    @property
    def last(self) -> int | None:
        """The joint id after the last frame."""
        return self.modality.marker(self.modality.markers[-1]) if self.modality.markers else None

    @property
    def code_ids(self) -> tuple[int, int]:
        """The half-open range of the joint ids of codes."""
        return self.modality.start, self.modality.start + self.modality.n_codes

    def frames_in(self, tokens: int) -> int:
        """The frames for which there is room in so many tokens, the closing included."""
        tokens -= len(self.closing)
        if self.between is None:
            return (tokens - (self.last is not None)) // self.codes
        return tokens // (self.codes + 1)
