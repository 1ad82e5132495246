"""RULER's examples: what is hidden stands in them, they fill their context to the token, and answers are judged."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from pipelines.evaluate.tasks.ruler.aggregation import zeta_counts
from pipelines.evaluate.tasks.ruler.documents import Documents, read_documents
from pipelines.evaluate.tasks.ruler.example import Example
from pipelines.evaluate.tasks.ruler.examples import GENERATED, QUESTIONS, effective_context, make_example
from pipelines.evaluate.tasks.ruler.haystacks import NOISE
from pipelines.evaluate.tasks.ruler.retrieval import RETRIEVALS
from storage.errors import BadData, UserError
from tokenization.text.tokenizer import load_text_tokenizer

TOKENIZER = load_text_tokenizer()
TEXT = TOKENIZER.encode("The sea was calm. The ship went slowly home to Mr. Gray. Birds sang! " * 30)
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town number {n} lies on the river Ouse. Its mayor is called Ann-{n}.",
                    "qas": [
                        {
                            "question": f"Who is the mayor of town {n}?",
                            "answers": [{"text": f"Ann-{n}"}, {"text": "Ann"}],
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ]
        }
        for n in range(60)
    ]
}
HOTPOTQA = [
    {
        "question": f"Who wrote book {n}?",
        "answer": f"Writer {n}",
        "context": [[f"Book {n}", ["It is old. ", f"Writer {n} wrote it."]], [f"Film {n}", ["It is new."]]],
        "supporting_facts": [[f"Book {n}", 1]],
    }
    for n in range(60)
]
DOCUMENTS = {"qa_1": read_documents(SQUAD), "qa_2": read_documents(HOTPOTQA)}


def example(task: str, context: int = 1500, number: int = 0) -> Example:
    return make_example(task, context, number, 7, TEXT, TOKENIZER, DOCUMENTS.get(task))


def body(made: Example) -> str:
    """The text without what is asked."""
    return TOKENIZER.decode(made.tokens).rpartition("\n\nQuestion:")[0]


SLACK = {"niah_single_1": 40, "niah_multikey_2": 40, "niah_multikey_3": 90, "vt": 40, "cwe": 40, "fwe": 40, "qa_1": 60}
"""The longest piece that such a text is made of, in tokens, which may be left over. Real text is cut anywhere."""


@pytest.mark.parametrize("context", [1500, 4500])
@pytest.mark.parametrize("task", GENERATED + QUESTIONS)
def test_an_example_fills_its_context_up_to_one_more_piece_and_leaves_room_for_the_answer(
    task: str, context: int
) -> None:
    made = example(task, context)
    left = context - len(made.tokens) - made.answer_tokens
    assert left >= 0
    if task not in QUESTIONS or context == 1500:  # the made files have no more paragraphs
        assert left <= SLACK.get(task, 60 if task in QUESTIONS else 0)
    assert made.tokens.dtype == np.int32
    assert made.tokens[0] == TOKENIZER.bos_id
    longest = max(len(TOKENIZER.encode(" ".join(made.answers))), 1)
    assert longest <= made.answer_tokens


@pytest.mark.parametrize("task", GENERATED + QUESTIONS)
def test_the_same_seed_makes_the_same_example_and_another_number_another(task: str) -> None:
    np.testing.assert_array_equal(example(task).tokens, example(task).tokens)
    assert not np.array_equal(example(task).tokens, example(task, number=1).tokens)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe"])
def test_ids_of_generated_text_are_those_of_the_whole_text_encoded_at_once(task: str) -> None:
    tokens = example(task).tokens[1:]
    np.testing.assert_array_equal(tokens, TOKENIZER.encode(TOKENIZER.decode(tokens)))


@pytest.mark.parametrize("task", RETRIEVALS)
def test_every_value_asked_for_stands_once_in_the_text_beside_a_key_of_the_question(task: str) -> None:
    made, settings = example(task), RETRIEVALS[task]
    question = TOKENIZER.decode(made.tokens).rpartition("\n\nQuestion:")[2]
    assert len(made.answers) == settings.values * settings.asked
    for value in made.answers:
        assert re.fullmatch(r"[0-9a-f-]{36}" if settings.uuid_values else r"[1-9]\d{6}", value)
        (key,) = re.findall(rf"of (\S+) is: {value}\.", body(made))
        assert key in question
    for place in made.places:
        assert "special magic" in TOKENIZER.decode(made.tokens[place : place + 12])
    hidden = re.findall(r"of (\S+) is: ", body(made))
    assert len(set(hidden)) == len(hidden) or settings.values > 1
    assert len(hidden) > 12 if settings.text == "needles" else len(hidden) == settings.keys * settings.values


def test_noise_repeats_and_real_text_is_the_evaluations_own() -> None:
    assert body(example("niah_single_1")).count(" ".join(NOISE)) > 20
    assert "The ship went slowly home to Mr. Gray." in body(example("niah_single_2"))


def test_needles_are_spread_over_the_whole_text() -> None:
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        places = [place for number in range(40) for place in example(task, number=number).places]
        assert min(places) < 250
        assert max(places) > 1100


def test_variables_are_assigned_in_order_and_only_the_asked_chain_stands_in_the_text() -> None:
    made = example("vt")
    _, _, text = body(made).rpartition("Trace them.")
    value = re.search(r"VAR (\w+) = (\d+)\.", text)
    assert value
    names = [value[1]]
    for name, source in re.findall(r"VAR (\w+) = VAR (\w+)\.", text):
        assert source == names[-1]
        names.append(name)
    assert tuple(names) == made.answers
    assert value[2] in TOKENIZER.decode(made.tokens[-40:])
    assert made.score(f"{', '.join(names[:3])}.") == pytest.approx(0.6)


@pytest.mark.parametrize(("context", "often", "seldom"), [(1500, 6, 1), (6000, 30, 3)])
def test_common_words_occur_more_often_than_the_others_in_a_numbered_list(
    context: int, often: int, seldom: int
) -> None:
    made = example("cwe", context)
    _, _, text = body(made).rpartition("common ones.")
    numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]+)", text))
    assert list(map(int, numbers)) == list(range(1, len(words) + 1))
    counts = Counter(words)
    assert {word for word, count in counts.items() if count == often} == set(made.answers)
    assert {count for word, count in counts.items() if word not in made.answers} == {seldom}


def test_the_three_most_frequent_coded_words_after_the_noise_are_asked_for() -> None:
    made = example("fwe")
    counts = Counter(body(made).partition("frequent ones.")[2].split())
    first, *ranked = counts.most_common(4)
    assert first[0] == "..."
    assert [word for word, _ in ranked] == list(made.answers)
    assert ranked[2][1] > counts.most_common(5)[4][1]


def test_frequencies_fall_with_the_square_of_the_rank() -> None:
    counts = zeta_counts(10_000, 100)
    assert counts[0] == pytest.approx(10_000 * 6 / np.pi**2, abs=1)
    assert counts[1] == pytest.approx(counts[0] / 4, abs=1)
    assert counts.sum() == pytest.approx(10_000, rel=0.02)


@pytest.mark.parametrize("task", QUESTIONS)
def test_the_paragraphs_that_answer_a_question_stand_among_others_of_the_file(task: str) -> None:
    made = example(task)
    asked = DOCUMENTS[task].questions[0]
    text = body(made)
    assert text.count(asked.paragraphs[0]) == 1
    assert TOKENIZER.decode(made.tokens[made.places[0] :]).lstrip().startswith("Document")
    shown = [one for one in DOCUMENTS[task].paragraphs if one in text]
    assert len(shown) == text.count("Document ") > 10
    assert made.score(f"I think it is {asked.answers[0]}.") == 1.0
    assert made.score("no idea") == 0.0


def test_paragraphs_that_belong_to_a_question_come_before_those_of_others() -> None:
    made = example("qa_2", context=200)
    assert "Film 0" in body(made)


def test_impossible_questions_are_left_out() -> None:
    assert [one.question for one in DOCUMENTS["qa_1"].questions[:2]] == [
        "Who is the mayor of town 0?",
        "Who is the mayor of town 1?",
    ]


@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        {"data": []},
        3,
        [{"question": "who?", "answer": "me"}],
        [{**HOTPOTQA[0], "supporting_facts": [["none", 0]]}],
        [{**HOTPOTQA[0], "answer": None}],
    ],
)
def test_a_file_of_another_form_is_bad_data(tree: object) -> None:
    with pytest.raises(BadData):
        read_documents(tree)


def test_the_whole_string_match_is_the_share_of_the_answers_that_occur_in_any_case() -> None:
    made = Example(np.zeros(1, np.int32), ("AB12", "cd"), 8)
    assert made.score("ab12") == 0.5
    assert made.score("xCDxAB12") == 1.0
    assert Example(made.tokens, made.answers, 8, one_is_enough=True).score("cd") == 1.0


@pytest.mark.parametrize("task", GENERATED + QUESTIONS)
def test_a_context_without_room_is_refused_with_one_that_has(task: str) -> None:
    with pytest.raises(UserError, match=r"evaluate\.ruler\.contexts: 60 tokens .* at least (\d+)") as refused:
        example(task, context=60)
    enough = int(str(refused.value).rpartition(" ")[2])
    assert len(example(task, context=enough).tokens) <= enough


def test_the_effective_context_ends_at_the_first_that_falls_below_the_threshold() -> None:
    assert effective_context({4096: 0.9, 8192: 0.856, 16384: 0.8, 32768: 0.9}) == 8192
    assert effective_context({4096: 0.85, 8192: 0.9}) is None


def test_a_task_that_is_not_rulers_is_no_task() -> None:
    with pytest.raises(ValueError, match="niah_single_9"):
        example("niah_single_9")


def test_documents_of_a_file_are_each_listed_once() -> None:
    twice = Documents(DOCUMENTS["qa_1"].questions * 2, DOCUMENTS["qa_1"].paragraphs)
    assert len(set(twice.paragraphs)) == len(twice.paragraphs) == 60
