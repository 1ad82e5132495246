"""The tasks of RULER by name, one example at a time, the same for the same seed; and the effective context. Pure.

The paper asks 500 examples of each task. A model's effective context is the longest at which it reaches 85.6%, which is
what LLaMA-2 7B (chat) reaches at 4K.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipelines.evaluate.tasks.ruler.aggregation import common_words_example, frequent_words_example
from pipelines.evaluate.tasks.ruler.documents import Documents
from pipelines.evaluate.tasks.ruler.documents_prompt import documents_example
from pipelines.evaluate.tasks.ruler.example import Example
from pipelines.evaluate.tasks.ruler.retrieval import RETRIEVALS, retrieval_example
from pipelines.evaluate.tasks.ruler.tracing import tracing_example
from tokenization.text.tokenizer import TextTokenizer

GENERATED = (*RETRIEVALS, "vt", "cwe", "fwe")
"""The eleven tasks that need no file."""
QUESTIONS = ("qa_1", "qa_2")
"""SQuAD and HotpotQA."""
THRESHOLD = 0.856


def make_example(
    task: str,
    context: int,
    number: int,
    seed: int,
    text: np.ndarray,
    tokenizer: TextTokenizer,
    documents: Documents | None = None,
) -> Example:
    """The number-th example of a task at a context, with its answer within it.

    text: ids of real text [n], not empty, for the tasks that hide needles in it. documents: of the tasks of QUESTIONS.
    Raises UserError where the context has no room for the task, ValueError on a task that there is not.
    """
    if task not in GENERATED + QUESTIONS:
        raise ValueError(f"{task!r} is no task of RULER: {', '.join(GENERATED + QUESTIONS)}")
    generator = np.random.default_rng([seed, (GENERATED + QUESTIONS).index(task), number])
    if task in RETRIEVALS:
        return retrieval_example(RETRIEVALS[task], context, text, tokenizer, generator)
    if task == "vt":
        return tracing_example(context, tokenizer, generator)
    if task == "cwe":
        return common_words_example(context, tokenizer, generator)
    if task == "fwe":
        return frequent_words_example(context, tokenizer, generator)
    assert documents is not None
    return documents_example(documents, number % len(documents.questions), context, tokenizer, generator)


def effective_context(scores: Mapping[int, float]) -> int | None:
    """The longest context up to which every one that was tested has a mean score of at least `THRESHOLD`.

    scores: the mean over the tasks, 0 to 1, by context. None where the shortest is below.
    """
    reached = None
    for context in sorted(scores):
        if scores[context] < THRESHOLD:
            break
        reached = context
    return reached
