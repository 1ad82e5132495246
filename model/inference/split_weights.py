"""A Llama whose matrices are split over the ranks that share its cache, where they would not fit beside it whole.

In: weights that can be read in parts, and the group. Out: a `SplitLlama`, of which this rank holds its share of every
matrix and the norms whole; `Decoder` takes it like any other. Which side of a matrix is cut is Megatron's choice (arXiv
1909.08053): queries, keys, values, gate, up and the head by their outputs, what follows them by its inputs; a cut need
not fall between heads. How the ranks use their shares depends on the tokens:

`SharedProducts`, in decoding, where all ranks have the same few tokens: tensor parallelism on the cache's own ranks
(Helix, arXiv 2507.07120). Each multiplies by its share, and products of one hidden state travel, three times a layer.
Gathering would move all weights for every token.

`GatheredWeights`, in prefill, where each rank has thousands of tokens of its own: a layer's matrices are gathered while
the layer before is computed, used whole and dropped (as in ZeRO-3, arXiv 1910.02054). Tensor parallelism would gather
all T P tokens' hidden states before each half of a layer and scatter sums behind it: 4 T P hidden numbers a layer, more
than LWM-7B's layer itself from 12,000 tokens of all ranks on. Whole weights also give the bits of a model that is not
split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from model.attention.p2p import Exchange, Group, as_exchange
from model.inference.forward import WholeWeights
from model.inference.gathering import Gathering, gather
from model.llama.hf_weights import CONFIG
from model.llama.initial_weights import Weights
from model.llama.llama import empty_llama, fill
from storage.errors import UserError

BY_INPUT = ("o_proj", "down_proj")
"""Matrices cut by columns. The table of embeddings is too, so that every rank has a part of each token's."""


def share(size: int, rank: int, ranks: int) -> range:
    """The rows or columns of `size` that a rank has."""
    return range(size * rank // ranks, size * (rank + 1) // ranks)


class SplitLlama(LlamaForCausalLM):
    """This rank's share of a model. Its parameters are smaller than `config` says; it runs in a `Decoder` alone."""

    exchange: Exchange

    def forward(self, *args: object, **kwargs: object) -> object:
        """Raises: one rank cannot compute it."""
        raise TypeError("a split model runs in a Decoder, on all of its ranks together")

    def counts(self, size: int) -> list[int]:
        """How many of the rows or columns of a matrix each rank has."""
        return [len(share(size, rank, self.exchange.size)) for rank in range(self.exchange.size)]

    def logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Logits [B, last - first] of hidden [B, hidden] over a range of ids. Collective."""
        shares = [share(self.config.vocab_size, rank, self.exchange.size) for rank in range(self.exchange.size)]
        asked = [range(max(first, ids.start), max(first, min(last, ids.stop))) for ids in shares]
        start = shares[self.exchange.rank].start
        mine = asked[self.exchange.rank]
        rows = self.lm_head.weight[mine.start - start : mine.stop - start] if mine else self.lm_head.weight[:0]
        return gather(F.linear(rows, hidden), [len(ids) for ids in asked], self.exchange).t()


def split_llama(weights: Weights, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu") -> SplitLlama:
    """This rank's share of the model of these weights, of which nothing else is kept, and a part of a file alone read.

    Every rank of the group calls it. dtype: of the parameters. Raises UserError where `weights` cannot be read.
    """
    weights.check()
    config = weights.config
    if config.attention_bias or config.mlp_bias:
        raise UserError(f"{CONFIG}: a model with biases cannot be split over ranks; give each rank all of it")
    model = cast("SplitLlama", empty_llama(config, dtype=dtype))
    model.__class__ = SplitLlama
    model.exchange = as_exchange(group)

    def read(name: str, empty: nn.Parameter) -> Tensor:
        if empty.dim() == 1:
            return weights.read(name).to(device, dtype)
        dim = 1 if name.split(".")[-2] in (*BY_INPUT, "embed_tokens") else 0
        mine = weights.read_part(name, dim, share(empty.shape[dim], model.exchange.rank, model.exchange.size))
        # What is cut lies outermost, so that shares of different ranks are neighbours where they are gathered.
        return mine.to(device, dtype) if dim == 0 else mine.t().to(device, dtype).contiguous().t()

    fill(model, read)
    return model


class SharedProducts(WholeWeights):
    """Products of the same tokens on every rank, each by its own share; sums in the order of ranks, so all agree."""

    model: SplitLlama

    def embedded(self, ids: Tensor) -> Tensor:
        """See `WholeWeights`."""
        return self._beside(super().embedded(ids), self.model.config.hidden_size)

    def projected(self, heads: LlamaAttention, x: Tensor) -> Sequence[Tensor]:
        """See `WholeWeights`."""
        counts = [self.model.counts(part.out_features) for part in (heads.q_proj, heads.k_proj, heads.v_proj)]
        mine = torch.cat(list(super().projected(heads, x)), dim=-1)
        rows = gather(mine.t(), [sum(parts) for parts in zip(*counts)], self._ranks)
        parts = rows.split([n for parts in zip(*counts) for n in parts])
        return [torch.cat(parts[which::3]).t().contiguous() for which in range(3)]

    def attended(self, heads: LlamaAttention, out: Tensor) -> Tensor:
        """See `WholeWeights`."""
        mine = share(out.shape[-1], self._ranks.rank, self._ranks.size)
        return self._summed(super().attended(heads, out[:, mine.start : mine.stop]))

    def mlp(self, mlp: LlamaMLP, x: Tensor) -> Tensor:
        """See `WholeWeights`."""
        return self._summed(super().mlp(mlp, x))

    @property
    def _ranks(self) -> Exchange:
        return self.model.exchange

    def _beside(self, mine: Tensor, size: int) -> Tensor:
        return gather(mine.t(), self.model.counts(size), self._ranks).t()

    def _summed(self, mine: Tensor) -> Tensor:
        results = gather(mine, [len(mine)] * self._ranks.size, self._ranks).unflatten(0, (self._ranks.size, -1))
        return results.sum(0, dtype=torch.promote_types(mine.dtype, torch.float32)).to(mine.dtype)


class GatheredWeights(WholeWeights):
    """Products of each rank's own tokens by whole matrices, which arrive a layer ahead."""

    model: SplitLlama

    def __init__(self, model: SplitLlama) -> None:
        super().__init__(model)
        self._ahead = self._start(0)
        self._here: dict[nn.Linear, Tensor] = {}

    def embedded(self, ids: Tensor) -> Tensor:
        """See `WholeWeights`: the ids of all ranks are looked up in each one's columns, which then change places."""
        ranks, table = self.model.exchange, self.model.model.embed_tokens.weight
        found = F.embedding(gather(ids, [len(ids)] * ranks.size, ranks), table).unflatten(0, (ranks.size, -1))
        others = [peer for peer in range(ranks.size) if peer != ranks.rank]
        columns = [found.new_empty(len(ids), n) for n in self.model.counts(self.model.config.hidden_size)]
        columns[ranks.rank] = found[ranks.rank]
        sends = {peer: found[peer] for peer in others if found.shape[-1]}
        ranks.start(sends, {peer: columns[peer] for peer in others if columns[peer].numel()}).wait()
        return torch.cat(columns, dim=-1)

    def enter(self, layer: int) -> None:
        """See `WholeWeights`."""
        self._here.clear()  # before the next layer's memory is asked for
        arrived = {part: gathering.wait() for part, gathering in self._ahead.items()}
        self._here = {part: rows.t() if _is_cut_by_input(part) else rows for part, rows in arrived.items()}
        self._ahead = self._start(layer + 1)

    def linear(self, part: nn.Linear, x: Tensor) -> Tensor:
        """See `WholeWeights`."""
        return F.linear(x, self._here[part])

    def _start(self, number: int) -> dict[nn.Linear, Gathering]:
        layer = self.model.model.layers[number : number + 1]
        parts = [part for part in layer.modules() if isinstance(part, nn.Linear)]
        return {part: self._gathering(part) for part in parts}

    def _gathering(self, part: nn.Linear) -> Gathering:
        rows = part.weight.t() if _is_cut_by_input(part) else part.weight
        size = part.in_features if _is_cut_by_input(part) else part.out_features
        return Gathering(rows, self.model.counts(size), self.model.exchange)


def _is_cut_by_input(part: nn.Linear) -> bool:
    """Of one rank too: `split_llama` lays the cut side outermost."""
    return part.weight.stride(0) == 1
