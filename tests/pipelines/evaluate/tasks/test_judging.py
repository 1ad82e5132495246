"""How answers are judged, on answers made by hand."""

from __future__ import annotations

import pytest

from pipelines.evaluate.tasks.judging import any_of, contains, exact_match, normalised, share_of, word_f1


def test_the_share_of_wanted_texts_that_occur_counts_whatever_their_case() -> None:
    assert share_of("They are 1234567 and alpha.", ["1234567", "ALPHA", "7654321", "beta"]) == 0.5
    assert share_of("", ["x"]) == 0.0
    assert any_of("alpha", ["beta", "Alpha"]) == 1.0
    assert any_of("alpha", ["beta"]) == 0.0
    with pytest.raises(ValueError, match="no answer"):
        share_of("x", [])


def test_case_articles_punctuation_and_space_do_not_count() -> None:
    assert normalised("  The  Cat's \n an A-frame, theatre!") == "cats aframe theatre"
    assert exact_match("The Beatles.", ["beatles"]) == 1.0
    assert exact_match("The Beatles and Wings", ["beatles", "Wings"]) == 0.0


def test_f1_of_words_is_the_best_over_the_accepted_answers() -> None:
    assert word_f1("the red big dog", ["a big dog"]) == pytest.approx(2 * 2 / (3 + 2))
    assert word_f1("dog dog", ["dog"]) == pytest.approx(2 / 3)
    assert word_f1("a cat", ["dog", "cat"]) == 1.0
    assert word_f1("", ["cat"]) == 0.0
    assert word_f1("the", ["a"]) == 1.0


def test_an_accepted_answer_is_contained_as_whole_words_alone() -> None:
    assert contains("It was Sir Isaac Newton, I think.", ["Isaac Newton"]) == 1.0
    assert contains("He ate a caterpillar", ["cat"]) == 0.0
    assert contains("", ["cat"]) == 0.0
