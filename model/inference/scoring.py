"""The loss of long sequences without gradients, each shared by the ranks of a group: sums by modality and by position.

In: a model whole on every rank, and micro-batches of packed sequences, or documents. Out: `Scores`, the same on every
rank. The planner of training shares a sequence out, attention goes through the ring, and all else is computed some
thousand tokens at a time. A softmax is over the target's own modality, as in training; the logits of all tokens never
exist.

A rank holds, for each of its S / P tokens, with D the hidden size, H heads and Hkv kv heads of size d, and b bytes an
element (`model.memory_estimate.scoring`):

    b D            the hidden states
    b d (H + 2 Hkv)    one layer's queries, keys and values
    (4 + b') H d       the attention's result in fp32, and that of one kernel call, b' = 4 on a CPU and b on a GPU
    6 b Hkv d      with several ranks at most: three blocks of other ranks' keys and values
    8 d + 8 H + 64     cosines and sines, log-sum-exps, ids, positions, labels, weights and losses

and, whatever S is, a tile's activations and a chunk's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.attention.p2p import Exchange, Group, as_exchange
from model.attention.plan.hardware import CPU_CORES, Hardware
from model.inference.gathering import gather
from model.inference.tiled_forward import hidden_in_tiles
from model.llama.config import modality_ranges
from model.llama.loss import CHUNK, token_nll
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from tokenization.loader.batch import MicroBatch

TILE = 4096
"""Tokens of a rank that all but the attention takes at once."""
EVERYWHERE = (0, 2**62)
"""The edges of one bin of all positions."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Sums over targets, by modality and by their position in their document.

    modalities: by name, in the order of their ids. edges: int64 [n + 1]; bin i has the targets at positions edges[i] to
    edges[i + 1] - 1. nll: float64 [M, n], nats. targets: int64 [M, n], how many there are.
    """

    modalities: tuple[str, ...]
    edges: np.ndarray
    nll: np.ndarray
    targets: np.ndarray

    def __add__(self, other: Scores) -> Scores:
        """The sums over both. Raises ValueError where their modalities or edges differ."""
        if self.modalities != other.modalities or not np.array_equal(self.edges, other.edges):
            raise ValueError("scores of other modalities or edges cannot be added")
        return dataclasses.replace(self, nll=self.nll + other.nll, targets=self.targets + other.targets)

    def of(self, modality: str) -> tuple[float, int]:
        """Nats and targets of a modality at all positions."""
        row = self.modalities.index(modality)
        return float(self.nll[row].sum()), int(self.targets[row].sum())

    @property
    def nats_per_token(self) -> np.ndarray:
        """float64 [n], over all modalities; NaN where a bin has no target. Its exponential is the perplexity."""
        targets = self.targets.sum(0)
        return np.divide(self.nll.sum(0), targets, out=np.full(len(targets), np.nan), where=targets > 0)


def score_batches(
    model: LlamaForCausalLM, batches: Iterable[MicroBatch], group: Group = None, edges: Sequence[int] | None = None
) -> Scores:
    """The targets with loss of packed sequences, one micro-batch after another, each document by itself. Collective.

    group: the ranks that share a sequence, each of which has the model and the sequences; None for one. edges: of
    `Scores`, ascending; None for one bin of all positions. Targets beyond the edges are in no sum.
    """
    names, bounds = tuple(modality_ranges(model.config)), _bounds(edges)
    shape = (len(names), len(bounds) - 1)
    total = Scores(names, bounds, np.zeros(shape), np.zeros(shape, np.int64))
    for batch in batches:
        total += score_batch(model, batch, group, edges)
    return total


def score_documents(
    model: LlamaForCausalLM, documents: Iterable[np.ndarray], group: Group = None, edges: Sequence[int] | None = None
) -> Scores:
    """Documents of integer ids [L], one after another: each token but a document's first is a target. Collective.

    With edges, the loss by position. group, edges: as in `score_batches`.
    """
    return score_batches(model, map(document_batch, documents), group, edges)


def document_batch(ids: np.ndarray) -> MicroBatch:
    """One document of integer ids [L], L >= 1, each of whose tokens but the first is a target of weight 1."""
    weight = np.ones(len(ids), np.float32)
    weight[-1] = 0
    tokens = np.asarray(ids, np.int32)
    return MicroBatch(tokens, np.append(tokens[1:], np.int32(0)), weight, np.array([0, len(ids)], np.int32), ())


@torch.inference_mode()
def score_batch(
    model: LlamaForCausalLM,
    batch: MicroBatch,
    group: Group = None,
    edges: Sequence[int] | None = None,
    tile: int = TILE,
    chunk: int = CHUNK,
) -> Scores:
    """The targets with loss of one micro-batch, whose weights do not matter where they are not 0. Collective.

    Its length need not be a multiple of the ranks. group, edges: as in `score_batches`. tile: tokens that all but the
    attention takes at once. chunk: targets whose logits exist at once.
    """
    exchange, ranges, bounds = as_exchange(group), modality_ranges(model.config), _bounds(edges)
    share = _share(model, batch, exchange)
    hidden = hidden_in_tiles(model, share.tokens, share.positions, share.plan.rank(exchange.rank), exchange, tile)
    counted = share.loss_weight != 0
    labels = share.labels.masked_fill(~counted, -1)
    nll = torch.cat(
        [
            token_nll(model.model.norm(rows), model.lm_head.weight, of_rows, tuple(ranges.values()), chunk)
            for rows, of_rows in zip(hidden.split(tile), labels.split(tile))
        ]
    )
    sums = _sums(nll, labels, share.positions + 1, bounds, [ids.start for ids in ranges.values()])
    sums = gather(sums, [len(sums)] * exchange.size, exchange).unflatten(0, (exchange.size, -1)).sum(0)
    nats, targets = sums.view(2, len(ranges), -1).cpu().numpy()
    return Scores(tuple(ranges), bounds, nats, targets.round().astype(np.int64))


def _bounds(edges: Sequence[int] | None) -> np.ndarray:
    bounds = np.asarray(EVERYWHERE if edges is None else edges, np.int64)
    if len(bounds) < 2 or (np.diff(bounds) <= 0).any():
        raise ValueError(f"the edges {bounds.tolist()} of bins of positions do not ascend")
    return bounds


def _share(model: LlamaForCausalLM, batch: MicroBatch, exchange: Exchange) -> RankBatch:
    """This rank's tokens, behind them as many in a document of their own as the ranks need to hold equally many."""
    weight = model.lm_head.weight
    missing = -len(batch.tokens) % exchange.size
    if missing:
        arrays = {name: np.pad(getattr(batch, name), (0, missing)) for name in ("tokens", "labels", "loss_weight")}
        ends = np.append(batch.cu_seqlens, np.int32(len(batch.tokens) + missing))
        batch = MicroBatch(**arrays, cu_seqlens=ends, keys=batch.keys)
    shape = attention_shape(model.config, "fp32" if weight.dtype.itemsize >= 4 else "bf16")
    hardware = CPU_CORES if weight.device.type == "cpu" else Hardware()
    return Dispatcher(exchange.size, exchange.rank, shape, hardware, ulysses=1)(batch).to(weight.device)


def _sums(nll: Tensor, labels: Tensor, positions: Tensor, edges: np.ndarray, starts: Sequence[int]) -> Tensor:
    """fp64 [2 M n]: nats, then targets, of each modality and bin. labels: -1 where there is no target; positions: of
    the targets. starts: the first id of each modality.
    """
    n_bins = len(edges) - 1
    bins = torch.bucketize(positions, torch.from_numpy(edges).to(nll.device), right=True) - 1
    modality = torch.bucketize(labels, torch.tensor(starts, device=nll.device), right=True) - 1
    counted = (labels >= 0) & (bins >= 0) & (bins < n_bins)
    places = (modality * n_bins + bins)[counted]
    sums = nll.new_zeros(2, len(starts) * n_bins, dtype=torch.float64)
    sums[0].index_add_(0, places, nll[counted].double())
    sums[1].index_add_(0, places, torch.ones_like(places, dtype=torch.float64))
    return sums.flatten()
