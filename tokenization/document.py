"""The data types between raw objects and shards: a tokenized document, and a packed sequence of documents."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Document:
    """One training example before packing.

    tokens: int32 [L], joint vocabulary, BOS and EOS included. loss_spans: half-open ranges of tokens that are predicted
    with loss (token 0 is never a target). key: unique and stable within a run. source: its name in the recipe.
    provenance: plain JSON from which the original bytes can be found (object URL and etag, frame times, field spec).
    """

    key: str
    source: str
    tokens: np.ndarray
    loss_spans: tuple[tuple[int, int], ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [L]: True where the token is predicted with loss."""
        mask = np.zeros(len(self.tokens), dtype=bool)
        for start, end in self.loss_spans:
            mask[start:end] = True
        return mask


@dataclass(frozen=True)
class PackedSequence:
    """Exactly one context of tokens made of whole documents or pieces of them.

    tokens: int32 [S]. cu_seqlens: int32 [n+1], document boundaries from 0 to S; unfilled room at the end is one last
    document of weight 0 that is not an example. loss_weight: float32 [S], of each token *as a target* (`loss_weights`),
    before the division by the number of examples in the global batch. n_examples: the documents that are examples.
    lineage: of each example its key, source, length in tokens and provenance.
    """

    key: str
    tokens: np.ndarray
    cu_seqlens: np.ndarray
    loss_weight: np.ndarray
    n_examples: int
    lineage: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class EncodedLineage(Sequence[Mapping[str, Any]]):
    """A lineage as the JSON list that a shard holds of it, which is parsed only when an entry is asked for.

    n_examples: its entries. n_documents: those that are a whole document or the first piece of one.
    """

    json: bytes
    n_examples: int
    n_documents: int

    def __len__(self) -> int:
        return self.n_examples

    def __getitem__(self, number: Any) -> Any:
        return self._entries[number]

    @functools.cached_property
    def _entries(self) -> list[Mapping[str, Any]]:
        return json.loads(self.json)
