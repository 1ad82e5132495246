"""A frame hidden in a film stands before the frame that its depth names, and nothing else of the film moves."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluate.tasks.video_needle_prompts import ended, make_film
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

TOKENIZER = load_text_tokenizer()
VOCABULARY = JointVocabulary.for_codebook(32000, 64)
CODES = np.arange(40).reshape(10, 4)
NEEDLE = np.array([60, 61, 62, 63])


def test_a_needle_stands_at_every_depth_of_the_same_film() -> None:
    film = make_film(CODES, NEEDLE, [0.0, 0.5, 1.0], TOKENIZER, VOCABULARY)
    assert film.places == (0, 5, 10)
    eof = VOCABULARY.eof_id
    without = np.concatenate([[VOCABULARY.bos_id], TOKENIZER.encode("<vision>")])
    without = np.concatenate([without, np.pad(CODES + 32000, ((0, 0), (0, 1)), constant_values=eof).ravel()])
    prefix = np.zeros(0, np.int32)
    for number, place in enumerate(film.places):
        prefix = np.concatenate([prefix, film.before(number)])
        whole = np.concatenate([prefix, film.behind(number)])
        at = len(film.start) + place * 5
        assert whole[at : at + 5].tolist() == [*(NEEDLE + 32000), eof]
        np.testing.assert_array_equal(np.delete(whole, np.s_[at : at + 5]), without)
        assert len(whole) == film.n_tokens
    np.testing.assert_array_equal(np.concatenate([prefix, film.rest]), without)


def test_a_film_that_text_follows_ends_as_films_do() -> None:
    film = make_film(CODES, NEEDLE, [0.5], TOKENIZER, VOCABULARY)
    last = ended(film.behind(0), VOCABULARY)
    assert last[-1] == VOCABULARY.eov_id
    assert film.behind(0)[-1] == VOCABULARY.eof_id


def test_depths_have_to_ascend() -> None:
    with pytest.raises(ValueError, match="ascend"):
        make_film(CODES, NEEDLE, [1.0, 0.0], TOKENIZER, VOCABULARY)
