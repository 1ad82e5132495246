"""A stage's batches: its shards by source, their order, and each rank's loader, which plans its micro-batches ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from model.training.mesh import Mesh
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from pipelines.train.job import TrainJob
from pipelines.train.shard_cache import ShardCache
from storage.cache import cache_folder
from storage.errors import UserError
from tokenization.loader.batch import Batch
from tokenization.loader.loader import Loader, State, accumulation
from tokenization.loader.order import SequenceOrder
from tokenization.loader.shard_reader import Opener
from tokenization.shards.index import ShardSet

if TYPE_CHECKING:
    from transformers import LlamaConfig

READERS = 4
"""Threads by which a worker's loader reads from an object store, where each read waits for an answer."""


def shard_sets(job: TrainJob) -> dict[str, ShardSet]:
    """The stage's shards by source, in the order in which sources are numbered; at least one is there for each."""
    sets = {source: job.packed.read_set(job.shards, source, "train") for source in source_names(job)}
    return {source: shard_set for source, shard_set in sets.items() if shard_set is not None}


def source_names(job: TrainJob) -> tuple[str, ...]:
    """The sources of the mixture that have shards to train on, in the order in which they are numbered."""
    sets = job.packed.outputs.sets
    return tuple(source for source in sorted(job.stage.mixture) if "train" in sets.get(source, {}))


def sequence_order(job: TrainJob, sets: Mapping[str, ShardSet]) -> SequenceOrder:
    """The recipe's mixture is of tokens: how full the sequences of each source are decides how many are drawn."""
    return SequenceOrder(
        seed=job.recipe.seed,
        sizes=tuple(map(len, sets.values())),
        weights=tuple(job.stage.mixture[source] for source in sets),
        tokens=tuple(shard_set.totals()["n_filled"] for shard_set in sets.values()),
    )


def rank_batches(
    job: TrainJob, mesh: Mesh, dispatcher: Dispatcher, state: Mapping[str, int] | None
) -> Iterator[tuple[Batch[RankBatch], State]]:
    """This rank's batches from `state` on, None: from the first; `dispatcher` makes this rank's share of each."""
    sets, stage = shard_sets(job), job.stage
    loader = Loader(
        shard_opener(job, sets),
        list(sets.values()),
        sequence_order(job, sets),
        stage.sequences,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        grad_accum=accumulation(stage.sequences, mesh.dp, stage.rows),
        rows=stage.rows,
        state=state,
        workers=0 if job.shards.is_local else READERS,
        skip=job.skip,
    )
    return loader.prepared(dispatcher)


def shard_opener(job: TrainJob, sets: Mapping[str, ShardSet]) -> Opener:
    """Opens the stage's shards; those of an object store through the node's cache, if the recipe gives it room."""
    remote, limit = job.shards.open_ranged, int(job.recipe.training.shard_cache_gib * 2**30)
    if job.shards.is_local or not limit:
        return remote
    cache = ShardCache(cache_folder(on_local_disk=True) / "shards", limit)
    stats = {name: stats for one in sets.values() for name, stats in zip(one.names, one.stats)}
    return lambda name: cache.open(remote, name, stats[name])


def stage_dispatcher(job: TrainJob, mesh: Mesh, config: LlamaConfig) -> Dispatcher:
    """What makes this rank's share of a micro-batch, in the loader's thread."""
    train = job.recipe.training
    shape, attention = attention_shape(config, train.precision), train.for_stage(job.stage).attention
    if wrong := attention.unfit_for(shape.kv_heads):
        raise UserError(f"train-{job.stage.name}: attention.{wrong}")
    n_sources = len(source_names(job))
    return Dispatcher(mesh.sp, mesh.sp_rank, shape, train.hardware, **asdict(attention), n_sources=n_sources)


def describe(batch: RankBatch) -> str:
    """How a micro-batch is shared, in one line."""
    plan = batch.plan
    return (
        f"{len(plan.cu_seqlens) - 1} documents of {plan.n_tokens} tokens over {plan.sp} rank(s): layout {plan.layout}, "
        f"Ulysses degree {plan.ulysses}, route {plan.route}"
    )
