"""Questions of a user's file: which lines can be used, why others cannot, and the prompts that they become."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.evaluate.tasks.question_lines import Question, read_questions
from pipelines.evaluate.tasks.question_prompts import LETTER_TEMPLATE, TEMPLATE, check_template, question_prompt
from storage.errors import UserError
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

TOKENIZER = load_text_tokenizer()
VOCABULARY = JointVocabulary.for_codebook(32000, 64)
CHOICE = {"question": "What does the bear do?", "choices": ["sleep", "eat", "run"], "answer": 1}


def lines(*trees: object) -> list[bytes | None]:
    return [tree if isinstance(tree, bytes) else json.dumps(tree).encode() for tree in trees]


@pytest.mark.parametrize("answer", [1, "B", "b", " (b) ", "B."])
def test_the_right_choice_is_named_by_its_number_from_zero_or_its_letter(answer: object) -> None:
    ((one,), bad) = read_questions(lines({**CHOICE, "answer": answer, "video": "bear.mp4"}), "choice")
    assert (one.right, one.answers, one.medium, bad) == (1, ("eat",), ("video", "bear.mp4"), [])


def test_a_question_without_choices_has_the_answers_that_are_accepted() -> None:
    rows = lines({"question": " Who? ", "answers": ["Ann", "Anna"], "context": "Ann did.", "id": "q7"}, b"", b"  ")
    ((one,), bad) = read_questions(rows, "qa")
    assert one == Question(1, "q7", "Who?", ("Ann", "Anna"), context="Ann did.")
    assert bad == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        ([1], "not an object with fields but list"),
        ({**CHOICE, "answer": 3}, "answer is 3, and there are 3 choices"),
        ({**CHOICE, "answer": -1}, "answer is -1, and there are 3 choices"),
        ({**CHOICE, "answer": "D"}, 'answer is "D", and there are 3 choices'),
        ({**CHOICE, "answer": "eat"}, 'answer is "eat", neither the number of a choice'),
        ({**CHOICE, "answer": True}, "answer is true, neither"),
        ({"question": "a", "choices": ["x", "y"]}, "answer is absent, neither"),
        ({**CHOICE, "choices": ["x"], "answer": 0}, "choices holds one"),
        ({**CHOICE, "choices": ["x"] * 27}, "choices holds 27"),
        ({**CHOICE, "choices": ["x", ""]}, 'one of choices is "", not text'),
        ({**CHOICE, "choices": "xy"}, 'choices is "xy", not a list of texts'),
        ({**CHOICE, "question": 3}, "question is 3, not text"),
        ({**CHOICE, "question": "a\0b"}, "question holds a NUL character"),
        (b'{"question": "\\ud800", "choices": ["x", "y"], "answer": 0}', "question holds a lone surrogate"),
        ({**CHOICE, "image": "a.png", "video": "b.mp4"}, "it names an image and a video"),
        ({**CHOICE, "image": ["a.png"]}, 'image is ["a.png"], not text'),
    ],
)
def test_a_line_that_cannot_be_used_is_left_out_with_its_reason(line: object, reason: str) -> None:
    questions, (bad,) = read_questions([*lines(CHOICE, line), *lines(CHOICE)], "choice")
    assert [one.line for one in questions] == [1, 3]
    assert bad.line == 2
    assert bad.reason.startswith(reason)


def test_a_line_that_is_longer_than_a_record_is_left_out() -> None:
    assert "longer than" in read_questions([None], "qa")[1][0].reason


def test_a_prompt_has_the_frames_where_training_had_them_and_the_text_behind_them() -> None:
    codes = np.arange(8).reshape(2, 4)
    question = Question(1, "1", "What is {this}?", ("a", "b c"), ("a", "b c"), 0, "Some text.")
    prompt = question_prompt(question, TEMPLATE, TOKENIZER, VOCABULARY, codes)
    text = "Some text.\n\nQuestion: What is {this}?\nAnswer:"
    record = {"vision": codes, "text": text}
    trained, _ = build_tokens(record, FieldSpec.parse("vision,text"), TOKENIZER, VOCABULARY, add_eos=False)
    np.testing.assert_array_equal(prompt.tokens, trained)
    whole = [TOKENIZER.encode(f"{text} {choice}") for choice in question.choices]
    ends = [one[len(TOKENIZER.encode(text)) :].tolist() for one in whole]
    assert [choice.tolist() for choice in prompt.choices] == ends
    assert [TOKENIZER.decode(choice) for choice in prompt.choices] == ["a", "b c"]


def test_a_prompt_may_have_text_before_the_frames_or_no_frames_at_all() -> None:
    question = Question(1, "1", "What?", ("a",), ("a", "b"))
    template = "USER: {vision}\n{question}\n{choices} ASSISTANT:"
    prompt = question_prompt(question, template, TOKENIZER, VOCABULARY, np.zeros((1, 4), int), letters=True)
    before = [VOCABULARY.bos_id, *TOKENIZER.encode("USER: "), *TOKENIZER.encode("<vision>")]
    assert prompt.tokens[: len(before)].tolist() == before
    assert TOKENIZER.decode(prompt.tokens[prompt.tokens < 32000]).endswith("\nWhat?\nA. a\nB. b ASSISTANT:")
    assert [TOKENIZER.decode(choice) for choice in prompt.choices] == ["A", "B"]
    alone = question_prompt(question, TEMPLATE, TOKENIZER, VOCABULARY)
    assert TOKENIZER.decode(alone.tokens) == "Question: What?\nAnswer:"


def test_a_template_is_refused_with_what_is_wrong_in_it() -> None:
    check_template("k", TEMPLATE, letters=False)
    check_template("k", LETTER_TEMPLATE, letters=True)
    check_template("k", "{{}} {question}", letters=False)
    for template, letters, reason in [
        ("{question} {answer}", False, r"k: there is no \{answer\}"),
        ("{question.x}", False, r"there is no \{question.x\}"),
        ("{vision}", False, r"has \{question\}"),
        ("{question} {", False, "write {{ for a brace"),
        ("{vision}{vision}{question}", False, "once at most"),
        (TEMPLATE, True, "has to be listed"),
        ("{question}{vision} ", False, r"nothing stands behind \{vision\}"),
    ]:
        with pytest.raises(UserError, match=reason):
            check_template("k", template, letters)
