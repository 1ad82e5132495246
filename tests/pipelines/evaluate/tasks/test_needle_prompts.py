"""Needle prompts: what is hidden where, what is asked, and that a prompt with its answer never passes the context."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluate.tasks.needle_prompts import (
    CITIES,
    Needle,
    answer_buffer,
    break_before,
    build_prompt,
    digits_of,
    draw_hidden,
    draw_needles,
    follow,
    found,
    question,
)
from storage.errors import UserError
from tokenization.text.tokenizer import load_text_tokenizer

TOKENIZER = load_text_tokenizer()
TEXT = 'The sea was calm. "Go home!" said Mr. Gray to the birds.\nThe ship of 3.5 tons went slowly home. '
HAYSTACK = TOKENIZER.encode(TEXT * 20)


def test_a_needle_stands_whole_at_a_sentence_break_with_its_question_at_the_end() -> None:
    needle = Needle("Lisbon", "1234567")
    prompt = build_prompt(HAYSTACK, [(needle, 0.5)], [needle], 400, TOKENIZER)
    text = TOKENIZER.decode(prompt.tokens)
    before, after = text.split("The special magic Lisbon number is: 1234567.")
    assert before[-2:] in (". ", "! ", ".\n")
    assert after[:1].isspace()
    assert text.endswith(
        "Question: What is the special magic Lisbon number?\nAnswer: The special magic Lisbon number is:"
    )
    assert prompt.tokens[0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(prompt.tokens[prompt.places[0] :]).startswith("The special magic Lisbon number is: 1234567")


def test_depth_zero_is_the_start_of_the_text_and_depth_one_its_end() -> None:
    needle = Needle("Oslo", "7654321")
    first = build_prompt(HAYSTACK, [(needle, 0.0)], [needle], 400, TOKENIZER)
    last = build_prompt(HAYSTACK, [(needle, 1.0)], [needle], 400, TOKENIZER)
    assert first.places == (1,)
    assert TOKENIZER.decode(last.tokens).split("7654321.")[1] == question([needle])


def test_an_abbreviated_number_is_no_sentence_break_and_a_newline_after_a_stop_is_one() -> None:
    text = TOKENIZER.encode("It was cold.\nA ship of 3.5 tons lay there")
    place = break_before(text, len(text) - 1, TOKENIZER)
    assert TOKENIZER.decode(text[:place]) == "It was cold."
    assert break_before(text, len(text), TOKENIZER) == len(text)
    assert break_before(TOKENIZER.encode("no end at all here"), 3, TOKENIZER) == 0


@settings(max_examples=60, deadline=None)
@given(
    context=st.integers(300, 1200),
    depths=st.lists(st.floats(0, 1), min_size=0, max_size=4),
    asked=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_prompts_fill_the_context_but_for_the_answer_and_hide_every_needle_once(
    context: int, depths: list[float], asked: int, seed: int
) -> None:
    needles = draw_needles(max(len(depths), asked), np.random.default_rng(seed))
    prompt = build_prompt(HAYSTACK, list(zip(needles, depths)), needles[:asked], context, TOKENIZER)
    assert len(prompt.tokens) == context - answer_buffer(context)
    text = TOKENIZER.decode(prompt.tokens)
    for needle in needles[: len(depths)]:
        assert text.count(needle.sentence) == 1
    for needle in needles[len(depths) :]:
        assert needle.number not in text
    assert all(needle.city in question(needles[:asked]) for needle in needles[:asked])


def test_needles_of_one_prompt_have_different_cities_and_seven_digits() -> None:
    needles = draw_needles(len(CITIES), np.random.default_rng(0))
    assert len({needle.city for needle in needles}) == len({needle.number for needle in needles}) == len(CITIES)
    assert all(len(needle.number) == 7 and needle.number[0] != "0" for needle in needles)
    with pytest.raises(ValueError, match="cities"):
        draw_needles(len(CITIES) + 1, np.random.default_rng(0))
    twice = [(Needle("Rome", "1111111"), 0.1), (Needle("Rome", "2222222"), 0.9)]
    with pytest.raises(ValueError, match="one city"):
        build_prompt(HAYSTACK, twice, [twice[0][0]], 400, TOKENIZER)


def test_a_context_without_room_is_the_users_mistake_and_says_what_would_do() -> None:
    needle = Needle("Rome", "1111111")
    with pytest.raises(UserError, match=r"evaluate\.needle\.contexts: 40 tokens leave no room"):
        build_prompt(HAYSTACK, [(needle, 0.5)], [needle], 40, TOKENIZER)


def test_answers_are_judged_by_the_share_of_numbers_in_them() -> None:
    asked = [Needle("Rome", "1111111"), Needle("Oslo", "2222222")]
    assert found("It is 2222222, I think.", asked) == 0.5
    assert found("1111111 and 2222222", asked) == 1.0
    assert found("111111", asked) == 0.0


def test_an_answers_ids_continue_the_question_and_its_digits_are_found() -> None:
    truth = follow(TOKENIZER, "is:", "1234567")
    whole = TOKENIZER.encode("number is: 1234567")
    assert list(whole[-len(truth) :]) == list(truth)
    assert [TOKENIZER.decode([truth[index]]) for index in digits_of(truth, TOKENIZER)] == list("1234567")


def test_of_many_needles_hidden_at_drawn_depths_some_are_asked_for() -> None:
    hidden, asked = draw_hidden(6, 3, np.random.default_rng(5))
    needles = [needle for needle, _ in hidden]
    assert len({needle.city for needle in needles}) == 6
    assert len(asked) == len(set(asked)) == 3
    assert set(asked) <= set(needles)
    assert (hidden, asked) == draw_hidden(6, 3, np.random.default_rng(5))
    depths = [depth for seed in range(50) for _, depth in draw_hidden(6, 3, np.random.default_rng(seed))[0]]
    assert 0 <= min(depths) < 0.05
    assert 0.95 < max(depths) <= 1
    first = {draw_hidden(2, 1, np.random.default_rng(seed))[1][0] for seed in range(20)}
    assert len(first) > 10
