"""Per-token loss weights by which packed documents have the loss that they would have in padded rows.

In: a document, the vocabulary, the objective. Out: one float32 per token, before the division by the number of examples
in the global batch, which only the loader knows.

LWM's released loss (arXiv 2402.08268 and its code) averages the token losses over a padded row's targets of a modality,
then over the rows, then over both modalities (or takes the text loss alone in text-only training); a row without
targets of a modality counts as 0. For an objective of M modalities this is one weight per token: 1/(M T) for each of a
document's T targets of a modality, divided by the number of rows. The weight does not depend on the other documents of
the sequence, so packing does not change the loss or its gradient.
"""

from __future__ import annotations

import functools

import numpy as np

from storage.errors import UserError
from tokenization.document import Document
from tokenization.vocabulary import JointVocabulary


@functools.lru_cache(maxsize=32)
def objective_modalities(objective: str) -> tuple[str, ...]:
    """The modalities of an objective: names joined by hyphens, text last. Raises UserError on anything else."""
    *others, last = names = tuple(objective.split("-"))
    if last != "text" or not all(others) or len(set(names)) < len(names):
        raise UserError(
            f"unknown objective {objective!r}: set it to 'text', or to further modalities before it, as 'vision-text'"
        )
    return names


def loss_weights(document: Document, vocabulary: JointVocabulary, objective: str) -> np.ndarray:
    """float32 [L]: the weight of each of the document's tokens as a target; 0 where it is predicted without loss.

    The first token is never a target, since no token precedes it. Under an objective of M modalities the weights of a
    document's targets of each modality sum to 1/M. Raises UserError on targets of a modality not in the objective.
    """
    names = objective_modalities(objective)
    target = document.loss_mask
    target[:1] = False
    weights = np.zeros(len(document), dtype=np.float32)
    for modality in reversed(vocabulary.modalities):  # the ranges are contiguous: one comparison each is enough
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
