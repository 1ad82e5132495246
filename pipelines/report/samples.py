"""What a model drew while it trained, as text: the continuations of the last measurement of each training stage.

In: ids as `metrics/` keep them (`pipelines.train.samples`). Out: plain JSON of strings. Text is decoded; of another
modality the page says how many tokens there are, since a trainer's and a report's machine need no codec.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.recipe import Recipe
from pipelines.tokenize.vocabulary import joint_vocabulary
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer
from tokenization.vocabulary import JointVocabulary

PARTS = ("prompt", "document", "sample")


def last_samples(recipe: Recipe, training: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each stage that drew any: stage, step, source, and its prompt, document and sample as text."""
    drawn = []
    for stage in training:
        measured = [row for row in stage["heldout"] if row.get("samples")]
        if measured:
            drawn += [(stage["stage"], measured[-1]["step"], one) for one in measured[-1]["samples"]]
    if not drawn:
        return []
    vocabulary = joint_vocabulary(recipe)
    tokenizer = load_text_tokenizer(str(fetch_tokenizer(recipe.text_tokenizer.path, recipe.storage.options)))
    return [
        {"stage": stage, "step": step, "source": one["source"]}
        | {part: as_text(one[part], vocabulary, tokenizer) for part in PARTS}
        for stage, step, one in drawn
    ]


def as_text(ids: Sequence[int], vocabulary: JointVocabulary, tokenizer: TextTokenizer) -> str:
    """Joint ids for people: text decoded, runs of another modality's tokens counted."""

    def modality(token: int) -> str:
        return next(one.name for one in vocabulary.modalities if one.contains(token))

    parts = []
    for name, run in itertools.groupby(ids, modality):
        tokens = np.array(list(run), np.int32)
        parts.append(tokenizer.decode(tokens) if name == "text" else f"[{len(tokens)} {name} tokens]")
    return " ".join(part for part in parts if part)
