"""Generated documents: of the length that is drawn, with loss on what looking back tells, the same every time."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from tokenization.generated.documents import generate
from tokenization.generated.pieces import pieces_of
from tokenization.generated.settings import KeyValues, Kind, Needles, Spans
from tokenization.text.continuation import follow
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer

SPANS = Spans(kind="spans", documents=40, tokens=(24, 64), span=(3, 12), alphabet=64)
PAIRS = KeyValues(kind="key-values", documents=40, tokens=(128, 400), pairs=(2, 40), asked=(1, 6))
NEEDLES = Needles(kind="needles", documents=40, tokens=(288, 700), text="plays", needles=(1, 8), asked=(1, 4))
KINDS = [SPANS, PAIRS, NEEDLES]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_text_tokenizer()


@pytest.fixture(scope="module")
def text(tokenizer: TextTokenizer) -> np.ndarray:
    lines = [f"The ship sailed on for the {n}th time. Nobody saw it go, and nobody cared!\n" for n in ("nine", "ten")]
    return tokenizer.encode("".join(lines) * 20)


@pytest.mark.parametrize("settings", KINDS, ids=lambda one: one.kind)
def test_a_document_follows_from_its_number_alone(settings: Kind, tokenizer: TextTokenizer, text: np.ndarray) -> None:
    more = replace(settings, documents=10_000)
    for number in (0, 7, 31):
        tokens, spans = generate(settings, number, tokenizer, text)
        again, same_spans = generate(more, number, tokenizer, text)
        np.testing.assert_array_equal(tokens, again)
        assert spans == same_spans
    others = [generate(settings, number, tokenizer, text)[0].tobytes() for number in range(20)]
    others += [generate(replace(settings, seed=1), number, tokenizer, text)[0].tobytes() for number in range(20)]
    assert len(set(others)) == 40


@pytest.mark.parametrize("settings", KINDS, ids=lambda one: one.kind)
def test_lengths_are_those_of_the_settings_and_every_document_has_something_to_learn(
    settings: Kind, tokenizer: TextTokenizer, text: np.ndarray
) -> None:
    lengths = set()
    for number in range(settings.documents):
        tokens, spans = generate(settings, number, tokenizer, text)
        lengths.add(len(tokens))
        assert tokens.dtype == np.int32
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert spans
        assert all(1 <= start < end < len(tokens) for start, end in spans)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))
    assert settings.tokens[0] <= min(lengths) <= max(lengths) <= settings.tokens[1]
    assert len(lengths) > 10


def test_what_has_loss_of_a_span_stood_one_span_earlier(tokenizer: TextTokenizer) -> None:
    pieces = pieces_of(tokenizer)
    allowed = {*pieces.plain[: SPANS.alphabet].tolist(), *pieces.digits.tolist()}
    assert {tokenizer.decode([one]) for one in pieces.digits.tolist()} == set("0123456789")
    for number in range(SPANS.documents):
        tokens, spans = generate(SPANS, number, tokenizer)
        inside = tokens[1:-1]
        assert set(inside.tolist()) <= allowed
        periods = [one for one in range(1, 13) if (inside[one:] == inside[:-one]).all()]
        assert periods
        assert spans[0][0] - 1 > periods[0]  # the first token of the second time cannot be known
    everything = replace(SPANS, targets=1.0)
    (tokens, spans), (_, some) = generate(everything, 3, tokenizer), generate(SPANS, 3, tokenizer)
    assert spans == ((spans[0][0], len(tokens) - 1),)
    assert sum(end - start for start, end in some) < len(tokens) / 2


@pytest.mark.parametrize("settings", [PAIRS, NEEDLES], ids=lambda one: one.kind)
def test_loss_is_on_answers_that_the_document_told_before(
    settings: KeyValues | Needles, tokenizer: TextTokenizer, text: np.ndarray
) -> None:
    """Each span ends with a number and what ends its sentence; the same tokens stood there before."""
    asked = set()
    for number in range(settings.documents):
        tokens, spans = generate(settings, number, tokenizer, text)
        numbers = 0
        for start, end in spans:
            answers = re.findall(r"\d+", tokenizer.decode(tokens[start:end]))
            assert answers
            assert all(settings.digits[0] <= len(one) <= settings.digits[1] for one in answers)
            told = tokenizer.decode(tokens[: start - 1])
            assert all(re.search(rf"\b{one}\b", told) for one in answers)
            numbers += len(answers)
        asked.add(numbers)
    assert len(asked) > 2
    assert max(asked) <= settings.asked[1]


def test_a_question_ends_in_the_words_before_the_number_that_it_asks_for(
    tokenizer: TextTokenizer, text: np.ndarray
) -> None:
    for number in range(20):
        tokens, spans = generate(replace(NEEDLES, needles=(1, 1)), number, tokenizer, text)
        ((start, end),) = spans
        answer = tokens[start:end]
        told = next(at for at in range(start) if (tokens[at : at + len(answer)] == answer).all())
        np.testing.assert_array_equal(tokens[told - 3 : told], tokens[start - 3 : start])


def test_some_questions_ask_for_several_needles_and_have_loss_on_the_words_between(
    tokenizer: TextTokenizer, text: np.ndarray
) -> None:
    settings = replace(NEEDLES, tokens=(1024, 1024), needles=(8, 8), asked=(8, 8))
    counts = []
    for number in range(20):
        tokens, spans = generate(settings, number, tokenizer, text)
        counts += [len(re.findall(r"\d+", tokenizer.decode(tokens[start:end]))) for start, end in spans]
    assert set(counts) == {1, 2, 3}
    assert counts.count(1) > len(counts) / 2


def test_needles_stand_at_sentence_breaks_all_over_the_text(tokenizer: TextTokenizer, text: np.ndarray) -> None:
    settings = replace(NEEDLES, tokens=(1024, 1024), needles=(1, 1))
    depths = []
    for number in range(40):
        tokens, ((start, end),) = generate(settings, number, tokenizer, text)
        told = next(at for at in range(start) if (tokens[at : at + end - start] == tokens[start:end]).all())
        assert told < start
        depths.append(told / len(tokens))
    assert min(depths) < 0.2
    assert max(depths) > 0.6
    breaks = pieces_of(tokenizer).breaks(text)
    assert {tokenizer.decode(text[one : one + 1]) for one in breaks[1:].tolist()} <= {"The", "Nobody", "\n"}


def test_text_goes_on_behind_the_needles_as_it_was(tokenizer: TextTokenizer, text: np.ndarray) -> None:
    whole = tokenizer.decode(np.concatenate([text, text]))
    tokens, spans = generate(replace(NEEDLES, needles=(1, 1)), 5, tokenizer, text)
    answer = tokenizer.decode(tokens[spans[0][0] : spans[0][1]])
    before, needle, _ = tokenizer.decode(tokens).partition(answer)
    assert needle
    assert before[:60] in whole


def test_a_text_follows_a_space_as_in_one_string(tokenizer: TextTokenizer) -> None:
    for before, text in ((".", "Who goes there?"), ("is", "1234567."), (".", "\n\nQ: who?")):
        ids = follow(tokenizer, before, text)
        joined = f"{before} {text}" if not text[:1].isspace() else before + text
        np.testing.assert_array_equal(np.concatenate([tokenizer.encode(before), ids]), tokenizer.encode(joined))


def test_a_range_whose_least_is_above_its_most_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens \[64, 24\] has its least above its most"):
        Spans(kind="spans", documents=1, tokens=(64, 24))
