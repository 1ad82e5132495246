"""Shards to batches: each rank's micro-batches of one optimizer step, with the normaliser of the whole global batch.

In: shard sets (one per source), the global order of their sequences, and this rank's place. Out: `(batch, state)`
without end. A new loader that is given a state continues at the next sequence, on any number of ranks.

Step k takes the next `batch_sequences` positions of the order. They are dealt out `rows` at a time, to micro-batch 0 of
every rank in turn, then to micro-batch 1, so the union over the ranks is the same for every geometry. All ranks make
the same number of micro-batches of the same shape; padding of weight 0 fills those for which no sequences are left. The
number of examples N of the global batch is summed from the index of all its sequences, so no communication is needed,
and a rank reads its own sequences only. One background thread reads and prepares micro-batches a bounded number of
batches ahead; it can use further threads to read.

Shards that are known to be bad are skipped: padding of weight 0 replaces their sequences, N leaves out their examples,
and nothing else moves. They are an input, the same on all ranks and after every restart, since every rank needs N but
reads only its own sequences. A shard that is found to be bad while it is read is therefore an error.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from storage.errors import UserError
from tokenization.loader.batch import Batch, MicroBatch, Part
from tokenization.loader.join import join_sequences
from tokenization.loader.order import SequenceOrder
from tokenization.loader.shard_reader import Opener, Place, ShardReader, padding
from tokenization.shards.index import ShardSet

State = dict[str, int]
Item = TypeVar("Item")

IDLE = "idle"  # key of the padding in rows of a micro-batch for which the global batch has no sequence
_BLOCK = 4096  # positions of the order computed at once; one at a time would take longer than reading


class Loader:
    """Iterates over `(Batch[MicroBatch], state)`; each iteration starts from the state that the loader was made with.

    sources: one set per source of `order`, all of one context, vocabulary and objective. batch_sequences: sequences of
    a global batch. rows: sequences of a micro-batch; by default the global batch divided by the micro-batches,
    otherwise the batch need not fill them all. state: of an earlier loader of any geometry. prefetch: batches read
    ahead in a thread; 0 for no thread. opener, workers, max_open, verify, skip: as in `ShardReader`.

    Raises ValueError where the batch does not divide, UserError where the sets disagree or are empty. Iterating raises
    BadData with the shard and the sequence on corrupt data, and whatever the opener raises.
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
        skip = frozenset(skip)
        self.rows = _rows(batch_sequences, dp_size, grad_accum, rows)
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not one of {dp_size} data-parallel ranks")
        _check_sources(sources, order)
        self.sources = tuple(sources)
        self.order = order
        self.batch_sequences = batch_sequences
        self.position = 0 if state is None else order.position(state)
        self.prefetch = prefetch
        self._reader = lambda: ShardReader(
            opener, self.sources, skip=skip, workers=workers, max_open=max_open, verify=verify
        )
        # [grad_accum, rows]: this rank's positions within a global batch; those beyond its end are idle rows.
        mine = np.arange(grad_accum * dp_size * self.rows).reshape(grad_accum, dp_size, self.rows)[:, dp_rank]
        self._mine = mine[mine < batch_sequences]
        self._rows_read = (mine < batch_sequences).sum(axis=1).tolist()
        self._lost_shards = [np.array([name in skip for name in source.names], bool) for source in sources]

    def __iter__(self) -> Iterator[tuple[Batch[MicroBatch], State]]:
        return self.prepared(lambda micro_batch: micro_batch)

    def prepared(self, prepare: Callable[[MicroBatch], Part]) -> Iterator[tuple[Batch[Part], State]]:
        """The same batches with `prepare(micro_batch)`, called in the thread that reads, for each micro-batch."""
        batches = self._batches(prepare)
        return _read_ahead(batches, self.prefetch) if self.prefetch else batches

    def _batches(self, prepare: Callable[[MicroBatch], Part]) -> Generator[tuple[Batch[Part], State]]:
        steps, reading = itertools.tee(self._steps())
        reader = self._reader()
        sequences = reader.read_all(place for places, *_ in reading for place in places)
        try:
            for places, n_examples, lost, end in steps:
                sources = (source for source, _ in places)
                micro_batches = []
                for n_rows in self._rows_read:
                    read, of = list(itertools.islice(sequences, n_rows)), list(itertools.islice(sources, n_rows))
                    idle = [padding(IDLE, self.sources[0].context)] * (self.rows - n_rows)
                    micro_batches.append(prepare(join_sequences(read + idle, of + [0] * len(idle))))
                yield Batch(tuple(micro_batches), n_examples, lost), self.order.state(end)
        finally:
            sequences.close()
            reader.close()

    def _steps(self) -> Iterator[tuple[list[Place], int, tuple[str, ...], int]]:
        """Of each step: the sequences that this rank reads, N, the keys of the lost sequences, the next position."""
        n_steps = -(-_BLOCK // self.batch_sequences)
        position = self.position
        while True:
            source, number = self.order.at(np.arange(position, position + n_steps * self.batch_sequences))
            n_examples = np.zeros(len(source), np.int64)
            lost = np.zeros(len(source), bool)
            for s in np.unique(source):
                here = source == s
                n_examples[here] = self.sources[s].n_examples[number[here]]
                if self._lost_shards[s].any():
                    lost[here] = self._lost_shards[s][self.sources[s].shard_of(number[here])]
            n_examples[lost] = 0
            for start in range(0, len(source), self.batch_sequences):
                position += self.batch_sequences
                here = slice(start, start + self.batch_sequences)
                mine = start + self._mine
                gone = start + np.flatnonzero(lost[here])
                keys = (self.sources[source[i]].locate(int(number[i]))[2].key for i in gone)
                # With every sequence lost there is no loss, and any number above 0 can divide it.
                n = max(1, int(n_examples[here].sum()))
                yield list(zip(source[mine].tolist(), number[mine].tolist())), n, tuple(keys), position


def _read_ahead(items: Generator[Item], depth: int) -> Iterator[Item]:
    """The items or error of an endless generator, produced up to `depth` ahead in a thread; closing ends the thread."""
    made: queue.SimpleQueue[Future[Item]] = queue.SimpleQueue()
    room, is_closed = threading.Semaphore(depth + 1), threading.Event()

    def produce() -> None:
        while room.acquire() and not is_closed.is_set():
            item: Future[Item] = Future()
            try:
                item.set_result(next(items))
            except BaseException as error:
                item.set_exception(error)
            made.put(item)

    # An executor's thread would keep a process from ending until it has read all that it was to read.
    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            yield made.get().result()
            room.release()
    finally:
        is_closed.set()
        room.release()
        thread.join()
        items.close()


def accumulation(batch_sequences: int, dp_size: int, rows: int) -> int:
    """Micro-batches of `rows` sequences that each of `dp_size` ranks makes of a global batch; the last may be idle."""
    return -(-batch_sequences // (dp_size * rows))


def _rows(batch_sequences: int, dp_size: int, grad_accum: int, rows: int | None) -> int:
    micro_batches = dp_size * grad_accum
    batch = f"a global batch of {batch_sequences} sequences"
    if rows is None:
        if batch_sequences < micro_batches or batch_sequences % micro_batches:
            geometry = f"{dp_size} data-parallel ranks x {grad_accum} accumulation steps of whole sequences"
            raise ValueError(f"{batch} does not divide into {geometry}")
        return batch_sequences // micro_batches
    if (steps := accumulation(batch_sequences, dp_size, rows)) != grad_accum:
        geometry = f"{dp_size} data-parallel ranks x {rows} rows"
        raise ValueError(f"{batch} takes {steps} accumulation steps of {geometry}, not {grad_accum}")
    return rows


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
