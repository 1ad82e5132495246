"""Reads sequences from shards by their number, through a bounded number of open files, in one thread or several.

In: an opener and the shard sets. Out: `PackedSequence`s without lineage, each by one ranged read at the offset in the
index: no tar is parsed, nothing is unpickled, and each checksum is compared.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from storage.errors import BadData, UserError
from tokenization.document import PackedSequence
from tokenization.packing.sequences import PAD_ID
from tokenization.shards.index import ShardSet, ShardStats
from tokenization.shards.shard import hash_file, read_tensors

Opener = Callable[[str], BinaryIO]
Place = tuple[int, int]
"""(number of the source, number of the sequence within it)."""

PADDING_RUN = 1024  # tokens of a document in a sequence of padding: longer ones would waste work in attention


class ShardReader:
    """Reads sequences of `sources`; the user closes it.

    opener: opens a shard by its name, as a seekable binary file; called from every reading thread. skip: names of bad
    shards, which are not opened; padding replaces their sequences. workers: threads that read, to hide the latency of
    an object store; 0 reads in the caller's. max_open: files kept open by all threads together (at least one each).
    verify: re-hash each shard when it is first opened.
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

    def read_all(self, places: Iterable[Place]) -> Generator[PackedSequence]:
        """The sequences at `places`, which may be endless, in order; with workers, read up to two a worker ahead."""
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
        """One sequence. Raises BadData with shard, sequence and hash on corrupt data, and what the opener raises."""
        source, number = place
        name, stats, entry = self.sources[source].locate(number)
        if name in self.skip:
            return padding(entry.key, stats.context)
        try:
            file = self._open(name, stats)
            try:
                return read_tensors(file, entry)
            except BadData:
                return read_tensors(file, entry)  # damage on the way from the store is gone at the second read
        except BadData as error:
            raise BadData(f"shard {name}: {error}{self._hash_differs(name, stats)}") from error

    def close(self) -> None:
        """Close all open files. No thread may be reading."""
        for files in self._files:
            files.close()

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
        """For the error about a bad sequence: how the hash of its shard differs from the manifest's, if it does."""
        if self.verify:
            return ""
        with contextlib.suppress(OSError, BadData, UserError), contextlib.closing(self.opener(name)) as file:
            if (digest := hash_file(file)) != stats.sha256:
                return f"; the shard's sha256 is {digest}, the manifest says {stats.sha256}: make the shard again"
        return ""


class _OpenFiles:
    """The open shards of one thread, at most `limit`; the least recently used is closed first."""

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
    """A sequence of `context` padding tokens in short runs, without loss and without an example."""
    boundaries = np.append(np.arange(0, context, PADDING_RUN, dtype=np.int32), np.int32(context))
    tokens = np.full(context, PAD_ID, dtype=np.int32)
    return PackedSequence(key, tokens, boundaries, np.zeros(context, dtype=np.float32), n_examples=0)
