"""Per-token loss weights that make a packed sequence weigh its examples as padded rows would be weighed.

In: a document, the vocabulary, the objective. Out: one float32 a token, before the division by the number of examples
in the global batch, which only the loader knows.

LWM's released loss (arXiv 2402.08268 and its code) takes, per padded row and modality, the sum of the token losses over
the row's valid targets, then the mean over rows, then half the sum of both modalities, or the text loss alone in
text-only training; a row without targets of a modality counts as 0 in that mean. For an objective of any M modalities
that is one weight a token: 1/(M T) for each of a document's T targets of a modality, all over the number of rows. No
term depends on what else shares the sequence, so packing leaves the loss and its gradient as they were.
"""

from __future__ import annotations

import functools

import numpy as np

from storage.errors import UserError
from tokenization.document import Document
from tokenization.vocabulary import JointVocabulary


@functools.lru_cache(maxsize=32)
def objective_modalities(objective: str) -> tuple[str, ...]:
    """The modalities whose targets a stage trains on, from their names joined by hyphens, text last.

    "text" is text alone, "vision-text" both. Raises UserError on anything else.
    """
    *others, last = names = tuple(objective.split("-"))
    if last != "text" or not all(others) or len(set(names)) < len(names):
        raise UserError(
            f"unknown objective {objective!r}: set it to 'text', or to further modalities before it, as 'vision-text'"
        )
    return names


def loss_weights(document: Document, vocabulary: JointVocabulary, objective: str) -> np.ndarray:
    """float32 [L]: the weight of each of the document's tokens as a target; 0 where it is predicted without loss.

    The first token is never a target: nothing precedes it. Under an objective of M modalities the weights of an example
    sum to 1/M for each of them that has targets. Raises UserError on targets of a modality that the objective lacks.
    """
    names = objective_modalities(objective)
    target = document.loss_mask
    target[:1] = False
    weights = np.zeros(len(document), dtype=np.float32)
    for modality in reversed(vocabulary.modalities):  # the ranges follow each other, so one comparison each will do
        targets = target & (document.tokens >= modality.start) if modality.start else target
        n_targets = int(np.count_nonzero(targets))
        if not n_targets:
            continue
        if modality.name not in names:
            raise UserError(
                f"document {document.key} of source {document.source} has {n_targets} {modality.name} targets under "
                f"the objective {objective!r}: set the stage's objective to '{modality.name}-{objective}'"
            )
        weights[targets] = 1 / len(names) / n_targets
        target ^= targets
    return weights
