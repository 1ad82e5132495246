"""A batch of sequences extended and decoded over a KV cache that one rank holds, or several share.

In: a model, prompts as id arrays, and the ranks that share the cache, each of which makes the same calls in the same
order on the same model. Out: the logits of every row's next token, on every rank. Prompts enter in chunks through the
ring (`prefill.py`), and every rank keeps the keys that it made; new tokens' keys go to the ranks by turns, so that none
fills up before the others. Decoding shares what grows with the context, the attention; the model's position-wise part
every rank repeats, unless the weights are split over the ranks too (`split_weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM

from model.attention.flash_kernels import pinned
from model.attention.p2p import Exchange, Group, as_exchange
from model.attention.plan.hardware import CPU_CORES, AttentionShape, Hardware
from model.attention.plan.runs import Run, Runs
from model.inference.cached_attention import ChunkAttention, PeekAttention, StepAttention
from model.inference.forward import Attention, WholeWeights, final_hidden
from model.inference.gathering import gather
from model.inference.kv_cache import KVCache, KVShape, Row, store
from model.inference.prefill import Chunk, chunk_tokens, plan_chunks
from model.inference.scaled_numbers import DTYPES, CacheFormat
from model.inference.split_weights import GatheredWeights, SharedProducts, SplitLlama
from model.llama.config import attention_sizes

LEAST_ROOM = 64
"""Tokens of a row that a rank makes room for at once, where no more are announced."""


class RankLost(RuntimeError):  # noqa: N818 - it names what happened
    """Another of the ranks that share the cache ended or is out of reach; what was decoded together cannot go on."""


@dataclass(frozen=True)
class Peek:
    """Tokens that may follow the rows of a decoder, row after row: counts[b] of row b, which then had lengths[b].

    hidden: final hidden states [T, D]. layers: by layer, keys and values [T, Hkv, D].
    """

    hidden: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]


class Decoder:
    """State of a batch of B sequences: this rank's cache, and the hidden states that predict the next tokens.

    Use within `model.llama.llama.inference`. prompts: integer arrays [L_b] of joint ids, none empty. prefill_chunk:
    tokens a rank that enter at once, None for `chunk_tokens`. room: tokens a row that will be appended, as far as is
    known: memory for them is made beside the prompt's; where it ends, more is made. group: the ranks that share the
    cache; None for one. Those of a `SplitLlama` are its own. cache: keeps keys and values in 8 bits, None in the dtype
    of the model.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        prompts: Sequence[np.ndarray],
        prefill_chunk: int | None = None,
        room: int = 0,
        group: Group = None,
        cache: CacheFormat | None = None,
    ):
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("every prompt needs at least one token")
        heads, kv_heads, head_dim = attention_sizes(model.config)
        weight = model.lm_head.weight
        shape = KVShape(model.config.num_hidden_layers, kv_heads, head_dim)
        self.model = model
        self.device = weight.device
        self.exchange: Exchange = model.exchange if isinstance(model, SplitLlama) else as_exchange(group)
        self.prefill_chunk, self.room = prefill_chunk or chunk_tokens(self.exchange.size), room
        dtype = DTYPES[cache] if cache else weight.dtype
        self.cache = KVCache(shape, dtype, weight.device, [Row() for _ in prompts])
        self.hidden = weight.new_empty(len(prompts), weight.shape[1])  # [B, D], of the last token
        self._heads_per_kv = heads // kv_heads
        self._scale = model.model.layers[0].self_attn.scaling
        self._attention = AttentionShape(heads, kv_heads, head_dim, weight.dtype.itemsize)
        self.extend(prompts)

    def __len__(self) -> int:
        """B, rows that are decoded."""
        return len(self.cache.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row so far, which is the position of its next one."""
        return [row.length for row in self.cache.rows]

    def logits(self, first: int, last: int) -> Tensor:
        """fp32 logits [B, last - first] of the next token over the ids first..last-1 only."""
        return self.logits_of(self.hidden, first, last)

    def logits_of(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """The same of any final hidden states [n, D]: fp32 [n, last - first]."""
        if isinstance(self.model, SplitLlama):
            with _ranks_alive(self.exchange):
                return self.model.logits(hidden, first, last).float()
        return torch.nn.functional.linear(hidden, self.model.lm_head.weight[first:last]).float()

    def extend(
        self, tokens: Sequence[np.ndarray], on_hidden: Callable[[Chunk, Tensor], object] = lambda chunk, hidden: None
    ) -> None:
        """Extend each row by its own tokens, integer arrays [n_b], through the ring; none where the array is empty.

        on_hidden: called with each chunk of them and the final hidden states [T, hidden] of what this rank holds of it.
        """
        if len(tokens) != len(self):
            raise ValueError(f"{len(tokens)} arrays of tokens for {len(self)} rows")
        hardware = CPU_CORES if self.device.type == "cpu" else Hardware()
        size = self.exchange.size
        chunks = plan_chunks([len(new) for new in tokens], self.prefill_chunk, size, self._attention, hardware)
        given = np.zeros(len(self), np.int64)
        for chunk in chunks:
            np.add.at(given, [piece.row for piece in chunk.pieces], chunk.held[self.exchange.rank])
        room = -(-self.room // size)
        self.cache.reserve([int(n) + room if len(new) else 0 for n, new in zip(given, tokens)])
        for chunk in chunks:
            on_hidden(chunk, self._prefill(chunk, tokens))

    def append(self, ids: Tensor) -> None:
        """Extend every row by one token. ids: int64 [B], the same on every rank (see `agreed`)."""
        rank, size = self.exchange.rank, self.exchange.size
        # By turns, from row to row too.
        mine = [(row.length + number) % size == rank for number, row in enumerate(self.cache.rows)]
        if any(turn and row.room == 0 for turn, row in zip(mine, self.cache.rows)):
            self.cache.reserve([max(LEAST_ROOM, row.stored // 4) for row in self.cache.rows])
        positions = torch.tensor(self.lengths)
        writes = self.cache.claim([(number, number, number + 1) for number, turn in enumerate(mine) if turn])
        reads = self.cache.reads([(number, 1) for number in range(len(self))], self._heads_per_kv)
        attention = StepAttention(writes, reads, self.exchange, self._scale)
        self.hidden = self._forward(ids, positions, attention, SharedProducts)
        for row in self.cache.rows:
            row.length += 1

    def peek(self, ids: Tensor, counts: Sequence[int]) -> Peek:
        """Further tokens of each row and their hidden states, without extending the rows: `commit` does, by some.

        ids: int64 [T], the same on every rank, counts[b] of row b, row after row; a row may have none.
        """
        lengths = self.lengths
        positions = np.concatenate([np.arange(n) + length for n, length in zip(counts, lengths, strict=True)])
        ends = np.cumsum([0, *counts]).tolist()
        own = Runs(Run(a, b, a, b, True) for a, b in pairwise(ends) if a < b)
        reads = self.cache.reads(list(enumerate(counts)), self._heads_per_kv)
        attention = PeekAttention(reads, own, self.exchange, self._scale)
        hidden = self._forward(ids, torch.from_numpy(positions.astype(np.int64)), attention, SharedProducts)
        return Peek(hidden, tuple(counts), tuple(lengths), tuple(attention.layers))

    def commit(self, peek: Peek, counts: Sequence[int]) -> None:
        """Extend each row by the first counts[b] of the tokens that were peeked at; the others leave nothing behind.

        Raises ValueError where rows went on since.
        """
        if list(peek.lengths) != self.lengths or any(n > most for n, most in zip(counts, peek.counts, strict=True)):
            raise ValueError("what was peeked at does not follow what the rows hold")
        rank, size = self.exchange.rank, self.exchange.size
        starts = np.cumsum([0, *peek.counts[:-1]])
        # By turns, as one by one.
        mine = [
            start + np.arange((rank - length - number) % size, n, size)
            for number, (start, length, n) in enumerate(zip(starts, peek.lengths, counts))
        ]
        wanted = list(map(len, mine))
        rows = self.cache.rows
        self.cache.reserve(
            [n if n <= row.room else max(n, LEAST_ROOM, row.stored // 4) for n, row in zip(wanted, rows)]
        )
        ends = np.cumsum([0, *wanted]).tolist()
        writes = self.cache.claim([(number, *ends[number : number + 2]) for number in range(len(rows))])
        kept = torch.from_numpy(np.concatenate(mine)).to(self.device)
        for layer, (k, v) in enumerate(peek.layers):
            store(writes, layer, k[kept], v[kept])
        for row, n in zip(rows, counts):
            row.length += n
        going = [number for number, n in enumerate(counts) if n]
        last = torch.tensor([int(starts[number]) + counts[number] - 1 for number in going], device=self.device)
        self.hidden = self.hidden.index_copy(0, torch.tensor(going, device=self.device), peek.hidden[last])

    def agreed(self, ids: Tensor) -> Tensor:
        """Rank 0's choice of the next tokens, int64 [B], on every rank: draws of different devices may differ."""
        with _ranks_alive(self.exchange):
            mine = ids if self.exchange.rank == 0 else ids[:0]
            return gather(mine, [len(ids)] + [0] * (self.exchange.size - 1), self.exchange)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only, in this order."""
        self.cache = self.cache.select(rows)
        self.hidden = self.hidden[list(rows)]

    def fork(self, rows: Sequence[int]) -> Decoder:
        """Another decoder whose rows begin as these rows; one may be named many times. Both go on independently.

        The keys so far are shared, not copied: many questions about one prompt are one prefill, a fork and an `extend`.
        """
        fork = object.__new__(Decoder)
        fork.__dict__ |= self.__dict__
        fork.cache = self.cache.fork(rows)
        fork.hidden = self.hidden[list(rows)]
        return fork

    def join(self, other: Decoder) -> None:
        """Go on with the rows of another decoder of this model behind one's own; the other is not used any more."""
        self.cache = self.cache.select(range(len(self)))
        self.cache.rows += other.cache.rows
        self.hidden = torch.cat((self.hidden, other.hidden))

    def _prefill(self, chunk: Chunk, tokens: Sequence[np.ndarray]) -> Tensor:
        rank, size = self.exchange.rank, self.exchange.size
        rows = self.cache.rows
        lengths = [rows[piece.row].length for piece in chunk.pieces]
        old = [i for i, length in enumerate(lengths) if length]
        queries = [(chunk.pieces[i].row, int(chunk.held[peer, i])) for peer in range(size) for i in old]
        reads = self.cache.reads(queries, self._heads_per_kv)
        ends = np.cumsum([0, *chunk.held[rank]]).tolist()
        writes = self.cache.claim([(piece.row, *ends[i : i + 2]) for i, piece in enumerate(chunk.pieces)])
        asking = [chunk.ranges(peer, old) for peer in range(size)]
        attention = ChunkAttention(writes, chunk.plan.rank(rank), asking, reads, self.exchange, self._scale)
        hidden = self._forward(*_share(chunk, tokens, lengths, rank), attention, GatheredWeights)
        self._take_last(chunk, [len(new) for new in tokens], hidden)
        for piece in chunk.pieces:
            rows[piece.row].length += piece.end - piece.start
        return hidden

    def _take_last(self, chunk: Chunk, lengths: Sequence[int], hidden: Tensor) -> None:
        """The hidden states of rows that end in this chunk, from the ranks that hold their last tokens to all."""
        ending = [i for i, piece in enumerate(chunk.pieces) if piece.end == lengths[piece.row]]
        if not ending:
            return
        places = chunk.last_tokens(ending)
        by_rank = [
            [(at, i) for i, (owner, at) in zip(ending, places) if owner == peer] for peer in range(self.exchange.size)
        ]
        mine = hidden[[at for at, _ in by_rank[self.exchange.rank]]]
        with _ranks_alive(self.exchange):
            found = gather(mine, [len(ones) for ones in by_rank], self.exchange)
        order = [chunk.pieces[i].row for ones in by_rank for _, i in ones]
        self.hidden = self.hidden.index_copy(0, torch.tensor(order, device=self.device), found)

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: Attention,
        if_split: type[GatheredWeights] | type[SharedProducts],
    ) -> Tensor:
        ids, positions = (pinned(x).to(self.device, non_blocking=True) for x in (ids, positions))
        with _ranks_alive(self.exchange):
            weights = if_split(self.model) if isinstance(self.model, SplitLlama) else WholeWeights(self.model)
            return final_hidden(self.model, ids, positions, attention, weights)


def _share(chunk: Chunk, tokens: Sequence[np.ndarray], lengths: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """ids and positions int64 [T] of what a rank holds of a chunk, whose rows had `lengths` tokens before."""
    new = [np.asarray(tokens[piece.row])[piece.start : piece.end] for piece in chunk.pieces]
    ids = np.zeros(chunk.plan.n_tokens, np.int64)
    ids[: sum(map(len, new))] = np.concatenate(new)
    positions = chunk.plan.positions.copy()
    positions[: sum(map(len, new))] += np.repeat(lengths, list(map(len, new)))
    mine = chunk.plan.indices(rank)
    return torch.from_numpy(ids[mine]), torch.from_numpy(positions[mine])


@contextmanager
def _ranks_alive(exchange: Exchange) -> Iterator[None]:
    """Name the loss of another rank as what it is, among other failures of a step."""
    try:
        yield
    except (dist.DistError, RuntimeError, OSError) as error:
        if exchange.size > 1 and not isinstance(error, torch.OutOfMemoryError) and _is_lost(error):
            raise RankLost(
                f"rank {exchange.rank} of {exchange.size} that share the cache lost another one: {error}"
            ) from error
        raise


def _is_lost(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in words for sign in ("connection", "timed out", "peer"))
