"""Training in plain transformers and torch, to measure beside ours: the same Llama, attention by sdpa, torch's AdamW.

In: documents with the weight of each token as a target. Out: the same step of the optimizer as ours, by rows made in
one of three ways:

    packed         documents end to end in one row of a context, their position ids restarting: transformers' own
                   packing, which finds the documents by their position ids and masks the others.
    padded         a row a document, padded to the longest of its micro-batch, each of equally many rows and as many
                   micro-batches as ours: transformers' usual collation.
    padded_budget  the same, but a micro-batch takes as many of the next documents as fit a context's tokens, padding
                   counted, which no trainer of transformers does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from model.training.settings import EngineSettings


@dataclass(frozen=True)
class PlainDocument:
    """tokens: int64 [L]. weight: float32 [L], of each token as a target, before the division by the documents."""

    tokens: np.ndarray
    weight: np.ndarray


class PlainTrainer:
    """A model, the same as the one given, and its optimizer. rows: one of `ROWS`."""

    def __init__(self, model: LlamaForCausalLM, settings: EngineSettings, rows: str) -> None:
        self.model = LlamaForCausalLM._from_config(model.config, attn_implementation="sdpa", dtype=torch.float32)
        self.model.load_state_dict(model.state_dict())
        self.rows = ROWS[rows]
        self.clip_norm = settings.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def accumulate(self, sequences: Sequence[Sequence[PlainDocument]]) -> float:
        """Forward and backward of a global batch, the documents of each of its packed sequences; its loss."""
        n_documents = sum(map(len, sequences))
        total = 0.0
        for micro_batch in self.rows(sequences):
            loss = self._loss(*micro_batch) / n_documents
            loss.backward()
            total += loss.item()
        return total

    def update(self, lr: float) -> None:
        """Clip, step and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self) -> dict[str, np.ndarray]:
        """Of what was accumulated, by name."""
        return {name: p.grad.numpy().copy() for name, p in self.model.named_parameters() if p.grad is not None}

    def _loss(self, tokens: Tensor, positions: Tensor, attended: Tensor | None, weight: Tensor) -> Tensor:
        """Sum of weight x nll of one micro-batch of rows [B, L]."""
        logits = self.model(input_ids=tokens, position_ids=positions, attention_mask=attended, use_cache=False).logits[
            :, :-1
        ]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return (nll * weight[:, 1:].flatten()).sum()


Rows = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""tokens, position ids, attention mask if any, weights of the targets: [B, L] each."""


def packed_rows(sequences: Sequence[Sequence[PlainDocument]]) -> Iterator[Rows]:
    """A row a sequence."""
    for documents in sequences:
        tokens = torch.from_numpy(np.concatenate([document.tokens for document in documents]))
        positions = torch.cat([torch.arange(len(document.tokens)) for document in documents])
        weight = torch.from_numpy(np.concatenate([document.weight for document in documents]))
        yield tokens[None], positions[None], None, weight[None]


def padded_rows(sequences: Sequence[Sequence[PlainDocument]]) -> Iterator[Rows]:
    """A row a document, equally many in each of as many micro-batches as there are sequences."""
    documents = [document for sequence in sequences for document in sequence]
    rows = -(-len(documents) // len(sequences))
    for first in range(0, len(documents), rows):
        yield _padded(documents[first : first + rows])


def budgeted_rows(sequences: Sequence[Sequence[PlainDocument]]) -> Iterator[Rows]:
    """A row a document, as many rows as the budget of one sequence's tokens holds, padding counted."""
    documents = [document for sequence in sequences for document in sequence]
    budget = max(sum(len(document.tokens) for document in sequence) for sequence in sequences)
    rows: list[PlainDocument] = []
    for document in documents:
        longest = max(len(one.tokens) for one in [*rows, document])
        if rows and longest * (len(rows) + 1) > budget:
            yield _padded(rows)
            rows = []
        rows.append(document)
    yield _padded(rows)


def _padded(documents: Sequence[PlainDocument]) -> Rows:
    shape = (len(documents), max(len(document.tokens) for document in documents))
    tokens, attended = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    weight = torch.zeros(shape)
    for row, document in enumerate(documents):
        length = len(document.tokens)
        tokens[row, :length] = torch.from_numpy(document.tokens)
        weight[row, :length] = torch.from_numpy(document.weight)
        attended[row, :length] = 1
    return tokens, torch.arange(shape[1]).expand(shape), attended, weight


ROWS: dict[str, Callable[[Sequence[Sequence[PlainDocument]]], Iterator[Rows]]] = {
    "packed": packed_rows,
    "padded": padded_rows,
    "padded_budget": budgeted_rows,
}
