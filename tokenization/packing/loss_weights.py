"""Per-token loss weights that make a packed sequence weigh its examples as padded rows would be weighed.

In: a document, the vocabulary, the objective. Out: one float32 a token, before the division by the number of examples
in the global batch, which only the loader knows.

LWM's released loss (arXiv 2402.08268 and its code) takes, per padded row and modality, the sum of the token losses over
the row's valid targets, then the mean over rows, then half the sum of both modalities, or the text loss alone in
text-only training; a row without targets of a modality counts as 0 in that mean. Written as one weight a token that is
1/T or 0.5/T for each of a document's T text targets and 0.5/V for each of its V vision targets, all over the number of
rows. No term depends on what else shares the sequence, so packing leaves the loss and its gradient as they were.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from storage.errors import UserError
from tokenization.document import Document
from tokenization.vocabulary import JointVocabulary

Objective = Literal["text", "vision-text"]


def check_objective(objective: str) -> Objective:
    """The objective, or UserError where the recipe names one that does not exist."""
    if objective not in get_args(Objective):
        raise UserError(f"unknown objective {objective!r}: set it to 'text' or 'vision-text'")
    return objective  # type: ignore[return-value]  # narrowed by the line above


def loss_weights(document: Document, vocabulary: JointVocabulary, objective: Objective) -> np.ndarray:
    """float32 [L]: the weight of each of the document's tokens as a target; 0 where it is predicted without loss.

    The first token is never a target: nothing precedes it. The weights of an example sum to 1 under "text", and under
    "vision-text" to 0.5 for each modality that has targets. Raises UserError on vision targets under "text".
    """
    target = document.loss_mask
    target[:1] = False
    vision = vocabulary.is_vision(document.tokens)
    n_vision = int(np.count_nonzero(target & vision))
    n_text = int(np.count_nonzero(target)) - n_vision
    if objective == "text" and n_vision:
        raise UserError(
            f"document {document.key} of source {document.source} has {n_vision} vision targets under the objective "
            "'text': set the stage's objective to 'vision-text'"
        )
    share = 1.0 if objective == "text" else 0.5
    weights = np.zeros(len(document), dtype=np.float32)
    weights[target & ~vision] = share / max(n_text, 1)
    weights[target & vision] = share / max(n_vision, 1)
    return weights
