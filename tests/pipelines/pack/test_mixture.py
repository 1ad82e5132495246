"""A stage's mixture is kept in tokens, though one source's sequences are half padding and another's full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.pack.record import PackOutputs, PackRecord
from pipelines.train.data import sequence_order, shard_sets
from pipelines.train.job import TrainJob
from storage.store import Store
from testing.tiny_run import VOCABULARY, tiny_recipe
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard

CONTEXT = 64


def write_source(store: Store, name: str, length: int, documents: int) -> None:
    """Shards of one source whose documents have one length."""
    tokens = np.arange(3, 3 + length, dtype=np.int32)
    made = [Document(f"{name}{n}", name, tokens, ((1, length),)) for n in range(documents)]
    shard = f"shards/{name}.tar"
    with store.writing(shard) as file:
        stats = write_shard(file, pack(made, CONTEXT, VOCABULARY, "text", key_prefix=f"{name}-"), VOCABULARY)
    write_set(store, f"sets/{name}.json", ShardSet(CONTEXT, VOCABULARY, "text", (shard,), (stats,)))


def test_the_loader_draws_shares_of_tokens(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name, length, documents in (("full", 32, 200), ("sparse", 33, 70), ("whole", 64, 50)):
        write_source(store, name, length, documents)
    recipe = tiny_recipe(tmp_path)
    mixture = {"whole": 0.25, "sparse": 0.5, "full": 0.25}
    stage = recipe.train.stages[0].model_copy(update={"mixture": mixture})
    record = PackRecord(PackOutputs({name: {"train": {"file": f"sets/{name}.json"}} for name in mixture}))
    job = TrainJob(recipe, stage, VOCABULARY, store, record, None, store)
    sets = shard_sets(job)
    source, _ = sequence_order(job, sets).at(np.arange(100_000))
    held = {"full": 64, "sparse": 33, "whole": 64}
    drawn = {name: held[name] * np.count_nonzero(source == number) for number, name in enumerate(sets)}
    assert {name: tokens / sum(drawn.values()) for name, tokens in drawn.items()} == pytest.approx(mixture, abs=1e-3)
