"""Sequences out of shards by their number, through a bounded number of open files, in one thread or several.

In: an opener and the shard sets. Out: `PackedSequence`s without lineage, each by one ranged read at the offset that the
index gives; no tar is parsed, nothing is unpickled, and what does not match its checksum is refused. Any number of
threads may read at once: where each read waits for an object store, reads side by side hide the waiting.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from storage.errors import BadData, UserError
from tokenization.document import PackedSequence
from tokenization.packing.pack import PAD_ID
from tokenization.shards.index import IndexEntry, ShardSet, ShardStats
from tokenization.shards.shard import hash_file, read_tensors

Opener = Callable[[str], BinaryIO]
Place = tuple[int, int]
"""(number of the source, number of the sequence within it)."""

PADDING_RUN = 1024
"""Tokens of a document in a sequence of padding: whole contexts would cost attention for nothing."""


class ShardReader:
    """Reads sequences of `sources`.

    opener: opens a shard by its name, as a seekable binary file; called from every reading thread. skip: names of
    shards that are not opened: padding stands for their sequences. workers: threads that read, 0 for the caller's.
    max_open: files held open, over all threads (each thread holds one at least). verify: re-hash each shard when it is
    first opened. To be closed.
    """

    def __init__(
        self,
        opener: Opener,
        sources: Sequence[ShardSet],
        *,
        skip: Collection[str] = (),
        workers: int = 0,
        max_open: int = 8,
        verify: bool = False,
    ) -> None:
        self.opener, self.sources, self.skip = opener, sources, frozenset(skip)
        self.workers, self.verify = workers, verify
        self._open_each = max(1, max_open // max(1, workers))
        self._mine = threading.local()
        self._files: list[_OpenFiles] = []
        self._verified: set[str] = set()

    def read_all(self, places: Iterable[Place]) -> Iterator[PackedSequence]:
        """The sequences at `places` (without end, if they are), in their order; with workers, read ahead.

        Two sequences a worker are read ahead at most. An error is raised in its place, after what lies before it.
        """
        if not self.workers:
            yield from map(self.read, places)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader-reader")
        reading: deque[Future[PackedSequence]] = deque()
        try:
            for place in places:
                reading.append(pool.submit(self.read, place))
                if len(reading) > 2 * self.workers:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, place: Place) -> PackedSequence:
        """One sequence. Raises BadData naming shard, sequence and hash on corrupt data; what the opener raises."""
        source, number = place
        name, stats, entry = self.sources[source].locate(number)
        if name in self.skip:
            return padding(entry.key, stats.context)
        try:
            return self._read(name, stats, entry)
        except BadData as error:
            raise BadData(f"shard {name}: {error}{self._hash_differs(name, stats)}") from error

    def close(self) -> None:
        """Close the files that are open; no thread may be reading."""
        for files in self._files:
            files.close()

    def _read(self, name: str, stats: ShardStats, entry: IndexEntry) -> PackedSequence:
        file = self._open(name, stats)
        try:
            return read_tensors(file, entry)
        except BadData:
            return read_tensors(file, entry)  # once more: what was damaged on its way is whole in the store

    def _open(self, name: str, stats: ShardStats) -> BinaryIO:
        files = getattr(self._mine, "files", None)
        if files is None:
            files = self._mine.files = _OpenFiles(self.opener, self._open_each)
            self._files.append(files)
        file = files.open(name)
        if self.verify and name not in self._verified:
            if (digest := hash_file(file)) != stats.sha256:
                raise BadData(f"sha256 is {digest}, the manifest says {stats.sha256}: make the shard again")
            self._verified.add(name)
        return file

    def _hash_differs(self, name: str, stats: ShardStats) -> str:
        """Said of a shard with a bad sequence: whether its bytes are those that were written."""
        if self.verify:
            return ""
        with contextlib.suppress(OSError, BadData, UserError), contextlib.closing(self.opener(name)) as file:
            if (digest := hash_file(file)) != stats.sha256:
                return f"; the shard's sha256 is {digest}, the manifest says {stats.sha256}: make the shard again"
        return ""


class _OpenFiles:
    """One thread's open shards, at most `limit`, the least recently used closed first."""

    def __init__(self, opener: Opener, limit: int) -> None:
        self.opener, self.limit = opener, limit
        self.files: OrderedDict[str, BinaryIO] = OrderedDict()

    def open(self, name: str) -> BinaryIO:
        if name in self.files:
            self.files.move_to_end(name)
            return self.files[name]
        while len(self.files) >= self.limit:
            self.files.popitem(last=False)[1].close()
        self.files[name] = file = self.opener(name)
        return file

    def close(self) -> None:
        while self.files:
            self.files.popitem()[1].close()


def padding(key: str, context: int) -> PackedSequence:
    """A sequence that teaches nothing: `context` padding tokens in short runs, no loss, no example."""
    boundaries = np.append(np.arange(0, context, PADDING_RUN, dtype=np.int32), np.int32(context))
    tokens = np.full(context, PAD_ID, dtype=np.int32)
    return PackedSequence(key, tokens, boundaries, np.zeros(context, dtype=np.float32), n_examples=0)
