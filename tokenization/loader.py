"""Shards to batches: each rank's micro-batches of one optimizer step, with the normaliser of the whole global batch.

In: shard sets (one a source), the global order of their sequences, and this rank's place. Out: `(Batch, state)` without
end; handing the state to a new loader goes on at the exact next sequence, on any number of ranks.

Step k takes the next `batch_sequences` positions of the order. They are dealt out micro-batch by micro-batch, in each
rank by rank, `rows` neighbours to a micro-batch, so the union over ranks is the same for every geometry. The number of
examples N in the global batch is summed from the index of all its sequences, of which this rank reads only its own: no
communication. Reading runs ahead in one background thread, a bounded number of batches, and so does what the caller has
to do to each micro-batch before it is trained on.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from tokenization.document import PackedSequence
from tokenization.errors import BadData, UserError
from tokenization.order import SequenceOrder
from tokenization.shard_index import ShardSet, ShardStats
from tokenization.shards import hash_file, read_sequence

State = dict[str, int]
Opener = Callable[[str], BinaryIO]


@dataclass(frozen=True)
class MicroBatch:
    """`rows` packed sequences end to end: S' = rows * S tokens for one forward pass.

    tokens: int32 [S']. labels: int32 [S'], the next token where it is a target with loss, else 0. loss_weight: float32
    [S'], aligned to labels, before the division by N; 0 where there is no target. cu_seqlens: int32 [n+1], from 0 to
    S', padding runs included. keys: of the sequences, in order.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_weight: np.ndarray
    cu_seqlens: np.ndarray
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """One optimizer step of one data-parallel rank.

    micro_batches: each a `MicroBatch`, or what the loader's `prepare` made of it. n_examples: N of the whole global
    batch, equal on all ranks.
    """

    micro_batches: tuple[Any, ...]
    n_examples: int


def join_sequences(sequences: Sequence[PackedSequence]) -> MicroBatch:
    """Concatenate packed sequences and turn per-target weights into labels: position t is weighed by target t+1.

    A document's first token has weight 0, so no label crosses a document or a sequence.
    """
    tokens = np.concatenate([sequence.tokens for sequence in sequences])
    weight = np.concatenate([sequence.loss_weight for sequence in sequences])
    loss_weight = np.append(weight[1:], np.float32(0))
    labels = np.where(loss_weight > 0, np.append(tokens[1:], np.int32(0)), np.int32(0))
    starts = np.cumsum([0, *(len(sequence.tokens) for sequence in sequences)])
    shifted = [sequence.cu_seqlens[1:] + start for sequence, start in zip(sequences, starts)]
    cu_seqlens = np.concatenate([[0], *shifted]).astype(np.int32)
    return MicroBatch(tokens, labels, loss_weight, cu_seqlens, tuple(sequence.key for sequence in sequences))


class Loader:
    """Iterates over `(Batch, state)`; each iteration starts from the state the loader was made with.

    opener: opens a shard by its name in the sets, as a seekable binary file. sources: one set a source of `order`, of
    one context, vocabulary and objective. batch_sequences: sequences of a global batch. rows: sequences of a
    micro-batch, by default what batch_sequences leaves. state: from an earlier loader of any geometry. prefetch:
    batches read ahead in a thread, 0 for none. max_open: shards held open. verify: re-hash each shard when it is first
    opened. prepare: called with each micro-batch where it is read, hence in that thread; what it returns takes the
    micro-batch's place.

    Raises ValueError where the batch does not divide, UserError where sets disagree or hold nothing. Iterating raises
    BadData naming shard and sequence on corrupt data, and whatever the opener and `prepare` raise.
    """

    def __init__(
        self,
        opener: Opener,
        sources: Sequence[ShardSet],
        order: SequenceOrder,
        batch_sequences: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        grad_accum: int = 1,
        rows: int | None = None,
        state: Mapping[str, Any] | None = None,
        prefetch: int = 2,
        max_open: int = 8,
        verify: bool = False,
        prepare: Callable[[MicroBatch], Any] | None = None,
    ) -> None:
        self.rows = _rows(batch_sequences, dp_size, grad_accum, rows)
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not one of {dp_size} data-parallel ranks")
        _check_sources(sources, order)
        self.sources = tuple(sources)
        self.order = order
        self.batch_sequences = batch_sequences
        self.dp_rank, self.dp_size, self.grad_accum = dp_rank, dp_size, grad_accum
        self.position = 0 if state is None else order.position(state)
        self.prefetch = prefetch
        self._opener = opener
        self._max_open = max_open
        self._verify = verify
        self._prepare = prepare or (lambda micro_batch: micro_batch)

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        steps = self._steps()
        return _read_ahead(steps, self.prefetch) if self.prefetch else steps

    def _steps(self) -> Iterator[tuple[Batch, State]]:
        position = self.position
        with _OpenShards(self._opener, self.sources, self._max_open, self._verify) as shards:
            while True:
                source, number = self.order.at(np.arange(position, position + self.batch_sequences))
                n_examples = sum(int(self.sources[s].n_examples[number[source == s]].sum()) for s in np.unique(source))
                # [grad_accum, dp, rows]: the dealing order of the positions of one step.
                dealt = np.arange(self.batch_sequences).reshape(self.grad_accum, self.dp_size, self.rows)
                micro_batches = tuple(
                    self._prepare(join_sequences([shards.read(int(source[i]), int(number[i])) for i in row]))
                    for row in dealt[:, self.dp_rank]
                )
                position += self.batch_sequences
                yield Batch(micro_batches, n_examples), self.order.state(position)


class _OpenShards:
    """Reads sequences through at most `limit` open shards, closing the least recently used."""

    def __init__(self, opener: Opener, sources: Sequence[ShardSet], limit: int, verify: bool) -> None:
        self.opener, self.sources, self.limit, self.verify = opener, sources, limit, verify
        self.files: OrderedDict[str, BinaryIO] = OrderedDict()
        self.verified: set[str] = set()

    def __enter__(self) -> _OpenShards:
        return self

    def __exit__(self, *_: object) -> None:
        while self.files:
            self.files.popitem()[1].close()

    def read(self, source: int, number: int) -> PackedSequence:
        name, stats, entry = self.sources[source].locate(number)
        try:
            return read_sequence(self._open(name, stats), entry)
        except BadData as error:
            raise BadData(f"shard {name}: {error}") from error

    def _open(self, name: str, stats: ShardStats) -> BinaryIO:
        if name in self.files:
            self.files.move_to_end(name)
            return self.files[name]
        while len(self.files) >= self.limit:
            self.files.popitem(last=False)[1].close()
        self.files[name] = file = self.opener(name)
        if self.verify and name not in self.verified:
            if (digest := hash_file(file)) != stats.sha256:
                raise BadData(f"sha256 is {digest}, the manifest says {stats.sha256}: make the shard again")
            self.verified.add(name)
        return file


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _read_ahead(steps: Iterator[tuple[Batch, State]], depth: int) -> Iterator[tuple[Batch, State]]:
    """`steps`, produced in a thread at most `depth` ahead. Its errors are raised here; closing this ends the thread."""
    ready: queue.Queue[tuple[Batch, State] | _Failed] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def hand_over(item: tuple[Batch, State] | _Failed) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in steps:
                hand_over(item)
                if closed.is_set():
                    break
        except BaseException as error:  # handed to the consumer, who raises it
            hand_over(_Failed(error))
        finally:
            steps.close()  # type: ignore[attr-defined]  # a generator: closes its shards

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        closed.set()
        thread.join()


def _rows(batch_sequences: int, dp_size: int, grad_accum: int, rows: int | None) -> int:
    micro_batches = dp_size * grad_accum
    fitting = batch_sequences // micro_batches if rows is None else rows
    if fitting < 1 or fitting * micro_batches != batch_sequences:
        raise ValueError(
            f"a global batch of {batch_sequences} sequences does not divide into {dp_size} data-parallel ranks x "
            f"{grad_accum} accumulation steps" + (" of whole sequences" if rows is None else f" x {rows} rows")
        )
    return fitting


def _check_sources(sources: Sequence[ShardSet], order: SequenceOrder) -> None:
    if tuple(map(len, sources)) != order.sizes:
        raise ValueError(f"the order is over {order.sizes} sequences, the sources hold {tuple(map(len, sources))}")
    names = [name for source in sources for name in source.names]
    if len(set(names)) != len(names):
        raise ValueError("two sources share a shard name: tell them apart with ShardSet.under(folder)")
    for what in ("context", "vocabulary", "objective"):
        values = {getattr(source, what) for source in sources}
        if len(values) > 1:
            raise UserError(f"sources to mix were packed with different {what}: {sorted(map(str, values))}")
