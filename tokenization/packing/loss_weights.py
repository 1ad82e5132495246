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
from tokenization.compiled import compiled
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
    weights = np.zeros(len(document), dtype=np.float32)
    spans = np.array(document.loss_spans, dtype=np.int64).reshape(-1, 2)
    modality, n_targets = weigh(document.tokens, spans, *modality_shares(vocabulary, objective), weights)
    if n_targets:
        raise outside_objective(document.key, document.source, vocabulary, modality, n_targets, objective)
    return weights


def modality_shares(vocabulary: JointVocabulary, objective: str) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [M], float64 [M]): where the range of each modality begins, and its share of a document's weight.

    The share of a modality that is not in the objective is 0. Raises UserError as `objective_modalities` does.
    """
    names = objective_modalities(objective)
    shares = [1 / len(names) if one.name in names else 0 for one in vocabulary.modalities]
    return np.array([one.start for one in vocabulary.modalities], np.int64), np.array(shares, np.float64)


def outside_objective(
    key: str, source: str, vocabulary: JointVocabulary, modality: int, n_targets: int, objective: str
) -> UserError:
    """The error about a document with targets of a modality, by its number, that the objective does not have."""
    name = vocabulary.modalities[modality].name
    return UserError(
        f"document {key} of source {source} has {n_targets} {name} targets under the objective {objective!r}: set the "
        f"stage's objective to '{name}-{objective}'"
    )


@compiled
def weigh(
    tokens: np.ndarray, spans: np.ndarray, starts: np.ndarray, shares: np.ndarray, weights: np.ndarray
) -> tuple[int, int]:
    """Set `weights` (float32 [L], all 0) of a document's tokens (int32 [L]) with its loss spans (int64 [n, 2]).

    starts, shares: of `modality_shares`. Returns the number of a modality with targets and without a share, and the
    number of its targets, or (0, 0) where there is none, as it has to be.
    """
    for span in range(len(spans)):  # a mark on each target, once where spans overlap
        weights[max(spans[span, 0], 1) : spans[span, 1]] = 1
    from_here = np.zeros(len(starts) + 1, np.int64)  # targets of a modality and of those after it, as ranges adjoin
    for modality in range(len(starts) - 1, -1, -1):
        count = 0
        for at in range(len(tokens)):
            count += (weights[at] != 0) & ((modality == 0) | (tokens[at] >= starts[modality]))
        from_here[modality] = count
        n_targets = count - from_here[modality + 1]
        if n_targets and shares[modality] == 0:
            return modality, n_targets
    for modality in range(len(starts)):
        n_targets = from_here[modality] - from_here[modality + 1]
        if n_targets:
            weight = np.float32(shares[modality] / n_targets)
            for at in range(len(tokens)):
                if (weights[at] != 0) & ((modality == 0) | (tokens[at] >= starts[modality])):
                    weights[at] = weight  # those of the modalities after it are overwritten
    return 0, 0
