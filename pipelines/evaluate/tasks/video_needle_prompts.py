"""A film in which one frame of another source is hidden, at a depth. Pure.

After V-NIAH (LongVA, arXiv 2406.16852), which hides an image in a film and asks about it by a question with choices.
Where there are no questions, recognition takes their place, for which a model needs no captions: behind the film, as
its next frame, stands each of several candidates, one of which is the hidden frame; what each gains in log-likelihood
over the same film without the hidden frame says which one the model has seen. That takes out how likely a candidate is
by itself.
"""

from __future__ import annotations

import numpy as np

from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary


def hidden_in(film: np.ndarray, needle: np.ndarray, depth: float | None) -> np.ndarray:
    """A film of codes [F, n] with a needle's codes [n] at a depth, 0 (before it) to 1 (behind it); None: without."""
    return film if depth is None else np.insert(film, round(depth * len(film)), needle, axis=0)


def film_prompt(film: np.ndarray, tokenizer: TextTokenizer, vocabulary: JointVocabulary) -> np.ndarray:
    """Ids int32 of a film of codes [F, n] up to where its next frame begins."""
    ids = vocabulary["vision"].codes_to_ids(film)
    frames = np.concatenate([ids, np.full((len(ids), 1), vocabulary.eof_id, np.int32)], axis=1)
    return np.concatenate([[vocabulary.bos_id], tokenizer.encode("<vision>"), frames.ravel()]).astype(np.int32)


def gains(with_needle: np.ndarray, without: np.ndarray, codes_per_frame: int) -> np.ndarray:
    """Nats a code, float64 [N], by which each candidate is likelier behind the film with the needle. Of log-likelihoods
    float64 [N] of whole candidates.
    """
    return (with_needle - without) / codes_per_frame
