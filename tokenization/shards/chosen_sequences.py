"""Some sequences of a shard set by their numbers, as evaluations read them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from storage.store import Store
from tokenization.document import PackedSequence
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import read_sequence


def read_sequences(store: Store, shard_set: ShardSet, numbers: Iterable[int]) -> Iterator[PackedSequence]:
    """The sequences of these ascending numbers, one shard open at a time; of an object store, their ranges alone."""
    located = (shard_set.locate(int(number)) for number in numbers)
    for shard, places in itertools.groupby(located, key=lambda place: place[0]):
        with store.open_ranged(shard) as file:
            for _, _, entry in places:
                yield read_sequence(file, entry)
