"""Shards to batches: each rank's micro-batches of one optimizer step, with the normaliser of the whole global batch.

In: shard sets (one a source), the global order of their sequences, and this rank's place. Out: `(batch, state)` without
end; handing the state to a new loader goes on at the exact next sequence, on any number of ranks.

Step k takes the next `batch_sequences` positions of the order. They are dealt out micro-batch by micro-batch, in each
rank by rank, `rows` neighbours to a micro-batch, so the union over ranks is the same for every geometry. Where they do
not go round, padding of no weight fills the last micro-batches up, for every rank has to make as many. The number of
examples N in the global batch is summed from the index of all its sequences, of which this rank reads only its own: no
communication. Reading runs ahead in one background thread, a bounded number of batches, and so does what the caller has
to do to each micro-batch before it is trained on; that thread may have others read for it.

Shards known to be bad are skipped without moving anything else: padding of no weight stands where their sequences would
be, and N leaves their examples out. Which shards those are is an input, the same on all ranks and after every restart,
and not what a rank came across: ranks read different sequences, and each has to know N and, of a shared sequence, its
documents, before it could ask the others. So a shard that turns out bad on the way is an error, not a skip.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from storage.errors import UserError
from tokenization.document import PackedSequence
from tokenization.loader.batch import Batch, MicroBatch, Part
from tokenization.loader.order import SequenceOrder
from tokenization.loader.shard_reader import Opener, Place, ShardReader, padding
from tokenization.shards.index import ShardSet

State = dict[str, int]
Item = TypeVar("Item")

IDLE = "idle"
"""Key of the padding that stands where a rank has no sequence of the batch left to read."""
_BLOCK = 4096
"""Positions of the order worked out at once; one at a time costs more than reading them."""


@dataclass(frozen=True)
class _Step:
    """What a rank does in one step: the sequences it reads, in order, and what all ranks know of the batch."""

    mine: tuple[Place, ...]
    n_examples: int
    lost: tuple[str, ...]
    end: int


def join_sequences(sequences: Sequence[PackedSequence], sources: Sequence[int] | None = None) -> MicroBatch:
    """Concatenate packed sequences and turn per-target weights into labels: position t is weighed by target t+1.

    A document's first token has weight 0, so no label crosses a document or a sequence. sources: the number of each
    sequence's source, all 0 by default.
    """
    starts = list(itertools.accumulate((len(sequence.tokens) for sequence in sequences), initial=0))
    tokens, labels = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.int32)
    loss_weight = np.empty(starts[-1], np.float32)
    source = np.full(starts[-1], -1, np.int16)
    cu_seqlens = [np.zeros(1, np.int32)]
    for sequence, number, start, end in zip(sequences, sources or [0] * len(sequences), starts, starts[1:]):
        tokens[start:end] = sequence.tokens
        loss_weight[start : end - 1] = sequence.loss_weight[1:]
        np.multiply(sequence.tokens[1:], sequence.loss_weight[1:] > 0, out=labels[start : end - 1])
        loss_weight[end - 1] = labels[end - 1] = 0
        source[start : start + sequence.cu_seqlens[sequence.n_examples]] = number
        cu_seqlens.append(sequence.cu_seqlens[1:] + np.int32(start))
    keys = tuple(sequence.key for sequence in sequences)
    return MicroBatch(tokens, labels, loss_weight, np.concatenate(cu_seqlens), keys, source)


class Loader:
    """Iterates over `(Batch[MicroBatch], state)`; each iteration starts from the state the loader was made with.

    opener: opens a shard by its name in the sets, as a seekable binary file. sources: one set a source of `order`, of
    one context, vocabulary and objective. batch_sequences: sequences of a global batch. rows: sequences of a
    micro-batch, by default what batch_sequences leaves; given, the batch need not fill them all. state: from an earlier
    loader of any geometry. prefetch: batches read ahead in a thread, 0 for none. workers: threads that read sequences
    for it, two ahead each, 0 for none; worthwhile where reads wait for an object store. max_open: shards held open.
    verify: re-hash each shard when it is first opened. skip: names of bad shards, the same on all ranks; see above.

    Raises ValueError where the batch does not divide, UserError where sets disagree or hold nothing. Iterating raises
    BadData naming shard and sequence on corrupt data, and whatever the opener raises.
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
        state: Mapping[str, int] | None = None,
        prefetch: int = 2,
        workers: int = 0,
        max_open: int = 8,
        verify: bool = False,
        skip: Collection[str] = (),
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
        self._reader = lambda: ShardReader(
            opener, self.sources, skip=skip, workers=workers, max_open=max_open, verify=verify
        )
        self._lost = [_lost(source, frozenset(skip)) for source in self.sources]
        self._n_examples = [source.n_examples * ~lost for source, lost in zip(self.sources, self._lost)]

    def __iter__(self) -> Iterator[tuple[Batch[MicroBatch], State]]:
        return self.prepared(lambda micro_batch: micro_batch)

    def prepared(self, prepare: Callable[[MicroBatch], Part]) -> Iterator[tuple[Batch[Part], State]]:
        """The same batches with `prepare(micro_batch)` in place of each micro-batch.

        It is called where the micro-batch is put together, hence in the thread that reads ahead; what it raises is
        raised by the iteration.
        """
        batches = self._batches(prepare)
        return _read_ahead(batches, self.prefetch) if self.prefetch else batches

    def _batches(self, prepare: Callable[[MicroBatch], Part]) -> Iterator[tuple[Batch[Part], State]]:
        steps, reading = itertools.tee(self._steps())
        reader = self._reader()
        sequences = reader.read_all(place for step in reading for place in step.mine)
        try:
            for step in steps:
                sources = iter([source for source, _ in step.mine])
                micro_batches = []
                for n_rows in self._rows_read():
                    read, of = list(itertools.islice(sequences, n_rows)), list(itertools.islice(sources, n_rows))
                    idle = [padding(IDLE, self.sources[0].context)] * (self.rows - n_rows)
                    micro_batches.append(prepare(join_sequences(read + idle, of + [0] * len(idle))))
                yield Batch(tuple(micro_batches), step.n_examples, step.lost), self.order.state(step.end)
        finally:
            sequences.close()  # type: ignore[attr-defined]  # a generator: ends its threads
            reader.close()

    def _mine(self) -> np.ndarray:
        """[grad_accum, rows]: this rank's positions in a step; those beyond the batch are idle."""
        dealt = np.arange(self.grad_accum * self.dp_size * self.rows)
        return dealt.reshape(self.grad_accum, self.dp_size, self.rows)[:, self.dp_rank]

    def _rows_read(self) -> list[int]:
        """How many rows of each of its micro-batches this rank reads; they come before the idle ones."""
        return (self._mine() < self.batch_sequences).sum(axis=1).tolist()

    def _steps(self) -> Iterator[_Step]:
        mine = self._mine().ravel()
        mine = mine[mine < self.batch_sequences]
        n_steps = -(-_BLOCK // self.batch_sequences)
        position = self.position
        while True:
            source, number = self.order.at(np.arange(position, position + n_steps * self.batch_sequences))
            n_examples = np.zeros(len(source), np.int64)
            lost = np.zeros(len(source), bool)
            for s in np.unique(source):
                n_examples[source == s] = self._n_examples[s][number[source == s]]
                lost[source == s] = self._lost[s][number[source == s]]
            for start in range(0, len(source), self.batch_sequences):
                position += self.batch_sequences
                here = slice(start, start + self.batch_sequences)
                yield _Step(
                    tuple(zip(source[start + mine].tolist(), number[start + mine].tolist())),
                    max(1, int(n_examples[here].sum())),  # all lost: no loss at all, divided by something
                    tuple(self._key(source[i], number[i]) for i in start + np.flatnonzero(lost[here])),
                    position,
                )

    def _key(self, source: int, number: int) -> str:
        return self.sources[source].locate(int(number))[2].key


def _lost(source: ShardSet, skip: Collection[str]) -> np.ndarray:
    """bool [n_sequences]: whether a sequence is in a shard to skip."""
    return np.repeat([name in skip for name in source.names], np.diff(source.first)).astype(bool)


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _read_ahead(steps: Iterator[Item], depth: int) -> Iterator[Item]:
    """`steps`, produced in a thread at most `depth` ahead. Its errors are raised here; closing this ends the thread."""
    ready: queue.Queue[Item | _Failed] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def hand_over(item: Item | _Failed) -> None:
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


def accumulation(batch_sequences: int, dp_size: int, rows: int) -> int:
    """Micro-batches of `rows` sequences that each of `dp_size` ranks makes of a global batch; the last may be idle."""
    return -(-batch_sequences // (dp_size * rows))


def _rows(batch_sequences: int, dp_size: int, grad_accum: int, rows: int | None) -> int:
    micro_batches = dp_size * grad_accum
    if rows is None and (batch_sequences < micro_batches or batch_sequences % micro_batches):
        raise ValueError(
            f"a global batch of {batch_sequences} sequences does not divide into {dp_size} data-parallel ranks x "
            f"{grad_accum} accumulation steps of whole sequences"
        )
    if rows is not None and accumulation(batch_sequences, dp_size, rows) != grad_accum:
        raise ValueError(
            f"a global batch of {batch_sequences} sequences takes {accumulation(batch_sequences, dp_size, rows)} "
            f"accumulation steps of {dp_size} data-parallel ranks x {rows} rows, not {grad_accum}"
        )
    return batch_sequences // micro_batches if rows is None else rows


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
