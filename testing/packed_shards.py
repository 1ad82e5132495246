"""A few shards of made-up documents, as a pack stage leaves them, and the numbers of a short training on them."""

from __future__ import annotations

from itertools import islice

import numpy as np

from pipelines.pack.record import PackOutputs, PackRecord
from storage.store import Store
from testing.tiny_run import VOCABULARY
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard

CONTEXT, PER_SHARD, STEPS, BATCH, HELDOUT = 64, 8, 5, 8, 5


def packed(store: Store, shards: int = 4) -> tuple[PackRecord, ShardSet]:
    """The record of a pack stage of one source, and its set of training; a few sequences more are held out."""
    rng = np.random.default_rng(5)
    documents = (
        Document(f"b{number}", "books", rng.integers(3, 500, 40).astype(np.int32), ((1, 40),)) for number in range(999)
    )
    sequences = pack(documents, CONTEXT, VOCABULARY, "text", window=100)
    names, stats = [f"shards/{number}.tar" for number in range(shards)], []
    for name in names:
        with store.writing(name) as file:
            stats.append(write_shard(file, islice(sequences, PER_SHARD), VOCABULARY))
    shard_set = ShardSet(CONTEXT, VOCABULARY, "text", tuple(names), tuple(stats))
    write_set(store, "sets/books-train.json", shard_set)
    with store.writing("shards/heldout.tar") as file:
        heldout = write_shard(file, islice(sequences, HELDOUT), VOCABULARY)
    write_set(
        store, "sets/books-heldout.json", ShardSet(CONTEXT, VOCABULARY, "text", ("shards/heldout.tar",), (heldout,))
    )
    files = {split: {"file": f"sets/books-{split}.json"} for split in ("train", "heldout")}
    return PackRecord(PackOutputs({"books": files})), shard_set
