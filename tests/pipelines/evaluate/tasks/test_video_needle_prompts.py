"""A frame hidden in a film stands before the frame that its depth names, and nothing else of the film moves."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluate.tasks.video_needle_prompts import film_prompt, hidden_in
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

TOKENIZER = load_text_tokenizer()
VOCABULARY = JointVocabulary.for_codebook(32000, 64)
FILM = np.arange(40).reshape(10, 4)
NEEDLE = np.array([60, 61, 62, 63])


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 5), (0.97, 10), (1.0, 10)])
def test_a_needle_stands_at_its_depth_in_a_film_that_is_else_the_same(depth: float, place: int) -> None:
    whole = hidden_in(FILM, NEEDLE, depth)
    np.testing.assert_array_equal(whole[place], NEEDLE)
    np.testing.assert_array_equal(np.delete(whole, place, axis=0), FILM)
    np.testing.assert_array_equal(hidden_in(FILM, NEEDLE, None), FILM)


def test_a_prompt_is_what_training_saw_up_to_the_next_frame() -> None:
    prompt = film_prompt(FILM, TOKENIZER, VOCABULARY)
    longer = np.concatenate([FILM, NEEDLE[None]])
    trained, _ = build_tokens({"vision": longer}, FieldSpec.parse("vision"), TOKENIZER, VOCABULARY, add_eos=False)
    np.testing.assert_array_equal(prompt, trained[: len(prompt)])
    assert trained[len(prompt)] == VOCABULARY["vision"].start + NEEDLE[0]
