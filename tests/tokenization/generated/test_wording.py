"""Names and wordings of generated needles: many, and none of those with which models are evaluated."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from pipelines.evaluate.tasks.needle_prompts import CITIES, Needle, question
from tokenization.generated.documents import generate
from tokenization.generated.pieces import pieces_of
from tokenization.generated.settings import Needles
from tokenization.generated.wording import ASKED, CLAUSES, ENDINGS, FRAMES, draw_names, draw_question, draw_wording
from tokenization.text.tokenizer import load_text_tokenizer


@pytest.fixture(scope="module")
def words() -> tuple[str, ...]:
    return pieces_of(load_text_tokenizer()).words


def generator() -> np.random.Generator:
    return np.random.default_rng(3)


def test_no_made_up_name_can_be_a_city_of_the_evaluation(words: tuple[str, ...]) -> None:
    """A made-up part of a name ends as no city does, and all other parts are in small letters, as no city is."""
    assert not [city for city in CITIES if city.lower().endswith(ENDINGS)]
    assert all(word.islower() for word in words)
    names = draw_names(generator(), words, 5000)
    assert len(set(names)) == 5000
    for part in {part for name in names for part in name.split()}:
        assert part.islower() or part.lower().endswith(ENDINGS)


def test_no_template_shares_three_words_with_the_evaluations_needle_and_question() -> None:
    """Three words in a row, the name and the number counted as words."""
    needle = Needle("CITY", "1234567")
    evaluated = _runs(needle.sentence) | _runs(question([needle]))
    generated = set()
    for clause in CLAUSES:
        generated |= _runs(clause.replace("{key}", "CITY") + " 1234567.")
        for frame, asked in itertools.product(FRAMES, ASKED):
            filled = frame.replace("{asked}", asked).replace("{clause}", clause)
            generated |= _runs(filled.replace("{key}", "CITY"))
    assert len(evaluated) > 12
    assert not evaluated & generated


def test_no_generated_document_has_the_evaluations_words(words: tuple[str, ...]) -> None:
    tokenizer = load_text_tokenizer()
    settings = Needles(kind="needles", documents=1, tokens=(512, 512), text="t", needles=(8, 8))
    text = tokenizer.encode("All went well. " * 40)
    for number in range(60):
        made = tokenizer.decode(generate(settings, number, tokenizer, text)[0])
        assert not re.search(r"special magic|magic \S+ number|number is:", made)
        assert not [city for city in CITIES if re.search(rf"\b{city}\b", made)]


def test_wordings_hardly_ever_come_twice(words: tuple[str, ...]) -> None:
    draw = generator()
    wordings = [draw_wording(draw, words) for _ in range(400)]
    assert len({wording.clause for wording in wordings}) > 300
    questions = {draw_question(draw, words, [(wording, "Zorax")]) for wording in wordings}
    assert len(questions) > 350
    assert all(wording.told("Zorax") in draw_question(draw, words, [(wording, "Zorax")]) for wording in wordings)


def _runs(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    runs = {tuple(found[start : start + 3]) for start in range(len(found) - 2)}
    return {run for run in runs if sum(one.isalpha() for one in run) > 1}
