"""A film in which one frame of another source is hidden: its ids before and behind each depth. Pure.

After V-NIAH (LongVA, arXiv 2406.16852), which hides an image in a film and asks about it by a question with choices.
Where there are no questions, recognition takes their place, for which a model needs no captions: behind the film, as
its next frame, stands each of several candidates, one of which is the hidden frame; what each gains in log-likelihood
over the same film without the hidden frame says which one the model has seen. That takes out how likely a candidate is
by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary


@dataclass(frozen=True)
class Film:
    """start: ids int32 of BOS and `<vision>`. frames: [F, codes_per_frame + 1], each with its `<eof>`.

    needle: [codes_per_frame + 1], likewise. places: before which of the frames the needle stands, ascending.
    """

    start: np.ndarray
    frames: np.ndarray
    needle: np.ndarray
    places: tuple[int, ...]

    def before(self, number: int) -> np.ndarray:
        """Ids between the number-th place and the one before it; at 0, from the start on."""
        first = self.places[number - 1] if number else 0
        frames = self.frames[first : self.places[number]].ravel()
        return np.concatenate([self.start, frames]) if number == 0 else frames

    def behind(self, number: int) -> np.ndarray:
        """Ids of the needle at the number-th place and of the rest of the film behind it."""
        return np.concatenate([self.needle, self.frames[self.places[number] :].ravel()])

    @property
    def rest(self) -> np.ndarray:
        """Ids behind the last place, without a needle."""
        return self.frames[self.places[-1] :].ravel()

    @property
    def n_tokens(self) -> int:
        """Of the whole with the needle."""
        return len(self.start) + self.frames.size + len(self.needle)


def make_film(
    codes: np.ndarray,
    needle: np.ndarray,
    depths: Sequence[float],
    tokenizer: TextTokenizer,
    vocabulary: JointVocabulary,
) -> Film:
    """A film of codes [F, n] with the codes [n] of a needle at depths 0 (before it) to 1 (behind it), ascending."""
    start = np.concatenate([[vocabulary.bos_id], tokenizer.encode("<vision>")]).astype(np.int32)
    places = tuple(round(depth * len(codes)) for depth in depths)
    if list(places) != sorted(places):
        raise ValueError("the depths of a needle have to ascend")
    return Film(start, with_ends(codes, vocabulary), with_ends(needle[None], vocabulary)[0], places)


def with_ends(codes: np.ndarray, vocabulary: JointVocabulary) -> np.ndarray:
    """Joint ids int32 [F, n + 1] of frames of codes [F, n], `<eof>` behind each."""
    ids = vocabulary["vision"].codes_to_ids(codes)
    return np.concatenate([ids, np.full((len(ids), 1), vocabulary.eof_id, np.int32)], axis=1)


def ended(ids: np.ndarray, vocabulary: JointVocabulary) -> np.ndarray:
    """Ids of frames [n] whose last `<eof>` has become `<eov>`: behind them, text goes on."""
    last = ids.copy()
    last[-1] = vocabulary.eov_id
    return last
