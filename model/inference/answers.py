"""How likely candidate answers are after prompts that are prefilled once: multiple choice.

In: a decoder whose rows are prompts, and the candidates of each. Out: log-probabilities. All candidates of all rows
enter together behind forks of their prompts, through the ring, and each rank scores the tokens that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.inference.gathering import gather
from model.inference.kv_decoder import Decoder
from model.inference.prefill import Chunk
from model.llama.config import modality_ranges
from model.llama.loss import token_nll


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """The candidates of one prompt. log_probability: float64 [A], in nats, the sum over an answer's tokens. tokens:
    int64 [A], of each answer.
    """

    log_probability: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """float64 [A]: the mean over an answer's tokens, by which answers of different lengths are compared."""
        return self.log_probability / self.tokens


def score_answers(decoder: Decoder, answers: Sequence[Sequence[np.ndarray]]) -> list[AnswerScores]:
    """The candidates of each row after what the row holds, within `model.llama.llama.inference`. Collective.

    answers: of each row its candidates, integer arrays [n] of joint ids, none empty, which end as they are to be
    compared (with EOS or without). Each token is one of its own modality's, as in the loss: a model of text alone has
    its whole vocabulary. The decoder stays as it was. Raises ValueError where rows and answers do not fit.
    """
    flat = [np.asarray(answer, np.int64) for candidates in answers for answer in candidates]
    if len(answers) != len(decoder) or not all(map(len, answers)) or not all(map(len, flat)):
        raise ValueError(f"{len(decoder)} rows need as many lists of answers, none of them and no answer empty")
    rows = [row for row, candidates in enumerate(answers) for _ in candidates]
    first = torch.from_numpy(np.array([answer[0] for answer in flat]))
    sums = -_nll(decoder, decoder.hidden[rows], first)  # every rank has them
    later = torch.zeros_like(sums)

    def add(chunk: Chunk, hidden: Tensor) -> None:
        owners, labels = _targets(chunk, flat, decoder.exchange.rank)
        held = hidden[: len(labels)]
        later.index_add_(0, owners.to(hidden.device), -_nll(decoder, held, labels))

    fork = decoder.fork(rows)
    fork.room = 0  # nothing is appended
    fork.extend([answer[:-1] for answer in flat], add)
    of_ranks = gather(later, [len(later)] * decoder.exchange.size, decoder.exchange)
    total = (sums + of_ranks.unflatten(0, (-1, len(later))).sum(0)).cpu().numpy()
    lengths = np.array([len(answer) for answer in flat])
    ends = np.cumsum([0, *map(len, answers)])
    return [AnswerScores(total[a:b], lengths[a:b]) for a, b in pairwise(ends)]


def _targets(chunk: Chunk, answers: Sequence[np.ndarray], rank: int) -> tuple[Tensor, Tensor]:
    """Of the tokens of a chunk that a rank holds, but for what fills the chunk up, which lies last: the answer that
    each belongs to, and the token that follows it there.
    """
    following = [answers[piece.row][piece.start + 1 : piece.end + 1] for piece in chunk.pieces]
    owners = np.repeat([piece.row for piece in chunk.pieces], [len(one) for one in following])
    labels = np.concatenate(following)
    mine = chunk.plan.indices(rank)
    mine = mine[mine < len(labels)]
    return torch.from_numpy(owners[mine]), torch.from_numpy(labels[mine])


def _nll(decoder: Decoder, hidden: Tensor, labels: Tensor) -> Tensor:
    ranges = tuple(modality_ranges(decoder.model.config).values())
    return token_nll(hidden, decoder.model.lm_head.weight, labels.to(hidden.device), ranges).double()
