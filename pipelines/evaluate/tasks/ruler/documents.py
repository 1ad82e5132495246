"""Questions with the paragraphs that answer them, from files as SQuAD and HotpotQA are published. Pure.

    SQuAD      {"data": [{"paragraphs": [{"context": TEXT, "qas": [{"question": TEXT, "answers": [{"text": TEXT}, ..],
               "is_impossible": false}]}]}]}; questions that are impossible, or have no answers, are left out
    HotpotQA   [{"question": TEXT, "answer": TEXT, "context": [[TITLE, [SENTENCE, ..]], ..],
               "supporting_facts": [[TITLE, NUMBER], ..]}, ..]; paragraphs of the titles named there answer it

In: the parsed JSON. Out: the questions, and all paragraphs, of which those of other questions fill a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import BadData


@dataclass(frozen=True)
class AskedDocuments:
    """A question. paragraphs: what is needed to answer it. near: others that belong to it and do not answer it."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Documents:
    """questions: all of a file. paragraphs: all different ones of it, in order."""

    questions: tuple[AskedDocuments, ...]
    paragraphs: tuple[str, ...]


def read_documents(tree: Any) -> Documents:
    """The questions of a file of either form. Raises BadData on another form, and where no question can be used."""
    try:
        questions = tuple(_of_squad(tree) if isinstance(tree, Mapping) else _of_hotpotqa(tree))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadData(
            f"neither SQuAD's form (data, paragraphs, context, qas, question, answers, text) nor HotpotQA's (question, "
            f"answer, context, supporting_facts): {type(error).__name__} at {error}"
        ) from None
    if not questions:
        raise BadData("it holds no question with an answer")
    every = (text for one in questions for text in (*one.paragraphs, *one.near))
    return Documents(questions, tuple(dict.fromkeys(every)))


def _of_squad(tree: Mapping[str, Any]) -> Iterator[AskedDocuments]:
    for article in tree["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(_text(answer["text"]) for answer in asked["answers"]))
                if answers and not asked.get("is_impossible"):
                    yield AskedDocuments(_text(asked["question"]), answers, (_text(paragraph["context"]),))


def _of_hotpotqa(rows: Any) -> Iterator[AskedDocuments]:
    for row in rows:
        named = {title for title, _ in row["supporting_facts"]}
        texts = [(title, f"{title}\n{''.join(map(_text, sentences)).strip()}") for title, sentences in row["context"]]
        needed = tuple(text for title, text in texts if title in named)
        near = tuple(text for title, text in texts if title not in named)
        if not needed:
            raise ValueError(f"the supporting_facts of {row['question']!r} name no paragraph of its context")
        yield AskedDocuments(_text(row["question"]), (_text(row["answer"]),), needed, near)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r}, which is no text")
    return value
