"""The train stage: one stage of the curriculum on Ray Train workers.

In: packed shards and the weights of the stage before. Out: `model/` (a plain Hugging Face Llama), `checkpoints/`, and
`metrics/`, one JSON line a step. A checkpoint commits engine, loader position and the metrics up to it together, so
a run that is killed anywhere carries on from the last one with the exact next sequence, and no step is listed twice.
Each worker's loader plans its micro-batches and takes out the worker's share of them ahead of the steps. Shards that
are not what was written end the stage, or, as many as `train.max_bad_shards`, are skipped and what is lost is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import transformers
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import LlamaConfig

from model import checkpoint
from model.config import llama_config
from model.engine import EngineSettings, StepMetrics, TrainingEngine
from model.export import export_hf
from model.llama import build_llama, extend_vocabulary, load_llama
from model.mesh import Mesh, build_mesh
from model.rank_batch import Dispatcher, RankBatch, attention_shape
from model.schedule import Schedule
from pipelines.bad_shards import bad_shards, opener
from pipelines.cluster import own_errors
from pipelines.pack import read_set
from pipelines.progress import Bar, Meter, following
from pipelines.recipe import Recipe, TrainStage
from pipelines.shard_cache import ShardCache
from pipelines.storage import Store, fetch_url_folder
from pipelines.urls import CACHE
from tokenization.errors import BadData, UserError
from tokenization.loader import Batch, Loader
from tokenization.order import SequenceOrder
from tokenization.shard_index import ShardSet
from tokenization.shard_reader import Opener
from tokenization.vocabulary import JointVocabulary

log = logging.getLogger("ringworld")

MODEL = "model"
CHECKPOINTS = "checkpoints"
METRICS = "metrics"
READERS = 4
"""Threads by which a worker's loader reads from an object store, where each read waits for an answer."""


@dataclass(frozen=True)
class TrainJob:
    """What every worker needs to know. skip: names of bad shards, which all workers skip."""

    recipe: Recipe
    stage: TrainStage
    vocabulary: JointVocabulary
    shards: Store
    manifest: dict[str, Any]
    before: Store | None
    store: Store
    skip: tuple[str, ...] = ()


def train_stage(
    recipe: Recipe,
    stage: TrainStage,
    vocabulary: JointVocabulary,
    packed: tuple[Store, dict[str, Any]],
    before: Store | None,
    store: Store,
    line: Bar,
) -> dict[str, Any]:
    """Run the stage on the cluster and return its part of the manifest."""
    label = f"train-{stage.name}"
    job = TrainJob(recipe, stage, vocabulary, *packed, before, store)
    with own_errors():
        bad = bad_shards(job.shards, list(_sets(job).values()), recipe.train.max_bad_shards, store, label)
    job = dataclasses.replace(job, skip=tuple(shard["name"] for shard in bad))
    pool = recipe.train.resources
    with following(line) as reports, tempfile.TemporaryDirectory() as scratch, _bad_data_told(label), own_errors():
        TorchTrainer(
            _worker,
            train_loop_config={"job": job, "reports": reports},
            torch_config=TorchConfig(backend="nccl" if pool.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=recipe.train.workers,
                use_gpu=pool.gpus > 0,
                resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {}), **pool.custom},
            ),
            # Ray Train's own bookkeeping; checkpoints are committed by the workers themselves, into the stage's folder.
            run_config=RunConfig(  # type: ignore[call-arg]  # ray.train swaps in its second version at import
                name=label,
                storage_path=scratch,
                logging_config=LoggingConfig(log_level="WARNING"),
                failure_config=FailureConfig(max_failures=recipe.train.max_restarts),
            ),
        ).fit()
    steps = list(read_metrics(store))
    tokens = sum(step["tokens"] for step in steps)
    seconds = sum(step["seconds"] for step in steps)
    if stage.export:
        _export(store, Store(stage.export, recipe.storage.options))
    return {
        "outputs": {
            "model": MODEL,
            "files": store.hashes(MODEL),
            "context": stage.context,
            "rope_theta": stage.rope_theta,
        },
        "figures": {
            "steps": len(steps),
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            **({"bad_shards": list(job.skip), **_total_lost(steps)} if job.skip else {}),
        },
    }


def read_metrics(store: Store) -> Iterator[dict[str, Any]]:
    """The committed steps of a train stage, in order."""
    for name in store.names(METRICS):
        with store.open(name) as file:
            yield from (json.loads(line) for line in file)


def _worker(config: Mapping[str, Any]) -> None:
    """One rank, from start or last checkpoint to the end of the stage."""
    job: TrainJob = config["job"]
    recipe, stage, store = job.recipe, job.stage, job.store
    _quiet()
    torch.set_num_threads(max(1, int(recipe.train.resources.cpus)))
    mesh = build_mesh(stage.sp)
    engine = TrainingEngine(_initial_model(job), mesh, _engine_settings(job, mesh), _schedule(stage))
    checkpoints = store.at(CHECKPOINTS)
    last = checkpoint.latest_committed(checkpoints.path(), options=checkpoints.options)
    state = None
    if last is not None:
        state = checkpoint.load(engine, checkpoints.path(), last, checkpoints.options)["loader"]
        log.info("train-%s: rank %d carries on at step %d", stage.name, mesh.rank, engine.step)
    meter = Meter(f"train-{stage.name}")
    pending: list[dict[str, Any]] = []
    batches = iter(_loader(job, mesh, _dispatcher(job, mesh, engine.model.config), state))
    first = engine.step
    while engine.step < stage.steps:
        batch, state = next(batches)
        if mesh.rank == 0 and engine.step == first:
            log.info("train-%s: first batch: %s", stage.name, _describe(batch.micro_batches[0]))
        metrics = engine.train_step(batch.micro_batches, batch.n_examples)
        lost = _lost(batch, stage.context)
        pending.append({**dataclasses.asdict(metrics), **lost})
        if mesh.rank == 0:
            figures = {**_figures(metrics), **lost}
            meter.set(**figures)
            if lost:
                log.warning(
                    "train-%s: step %d: %d sequences, %d tokens lost to bad shards",
                    *(stage.name, engine.step, lost["lost_sequences"], lost["lost_tokens"]),
                )
            config["reports"].report.remote(engine.step, {key: figures[key] for key in ("loss", "tokens_per_second")})
        if engine.step % recipe.train.checkpoint_steps == 0 or engine.step == stage.steps:
            if mesh.rank == 0:
                _write_metrics(store, pending)
            pending = []
            checkpoint.save(
                engine,
                checkpoints.path(),
                # Storage options may hold credentials, which belong in no file of the run.
                {"loader": state, "recipe": recipe.model_dump(mode="json", exclude={"storage": {"options"}})},
                keep=recipe.train.keep_checkpoints,
                options=checkpoints.options,
            )
            ray.train.report({"step": engine.step, "loss": metrics.loss})
    export_hf(engine, store.path(MODEL), options=store.options)


def _quiet() -> None:
    """Leave the workers' log to what a reader of the run wants to know."""
    for name in ("DeepSpeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()


def _initial_model(job: TrainJob) -> Any:
    recipe, stage = job.recipe, job.stage
    seed = recipe.seed
    if job.before is None and recipe.model.init is None:
        config = llama_config(
            recipe.model.size,
            vocab_size=job.vocabulary.size,
            context=stage.context,
            rope_theta=stage.rope_theta,
            text_size=job.vocabulary.text_size,
            bos_id=job.vocabulary.bos_id,
            eos_id=job.vocabulary.eos_id,
        )
        return build_llama(config, seed)
    if job.before is not None:
        folder = job.before.fetch_folder(MODEL)
    else:
        assert recipe.model.init is not None
        folder = fetch_url_folder(recipe.model.init, recipe.storage.options)
    model = load_llama(folder, dtype=torch.float32, context=stage.context, rope_theta=stage.rope_theta)
    if model.config.vocab_size < job.vocabulary.size:
        extend_vocabulary(model, job.vocabulary.size, seed)
    return model


def _engine_settings(job: TrainJob, mesh: Mesh) -> EngineSettings:
    train, stage = job.recipe.train, job.stage
    return EngineSettings(
        zero_stage=train.zero if stage.zero is None else stage.zero,
        precision=train.precision,
        grad_accum=stage.sequences // (mesh.dp * stage.rows),
        clip_norm=train.clip_norm,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        loss_chunk=train.loss_chunk,
        activation_checkpointing=train.activation_checkpointing,
    )


def _schedule(stage: TrainStage) -> Schedule:
    if stage.final_lr is None:
        return Schedule(stage.lr, "constant", stage.warmup_steps)
    return Schedule(stage.lr, "cosine", stage.warmup_steps, stage.steps, stage.final_lr)


def _dispatcher(job: TrainJob, mesh: Mesh, config: LlamaConfig) -> Dispatcher:
    """What makes this rank's share of a micro-batch, in the loader's thread."""
    train = job.recipe.train
    shape, attention = attention_shape(config, train.precision), train.attention_of(job.stage)
    if wrong := attention.unfit_for(shape.kv_heads):
        raise UserError(f"train-{job.stage.name}: attention.{wrong}")
    return Dispatcher(mesh.sp, mesh.sp_rank, shape, train.hardware.speeds(), **attention.model_dump())


def _describe(batch: RankBatch) -> str:
    plan = batch.plan
    return (
        f"{len(plan.cu_seqlens) - 1} documents of {plan.n_tokens} tokens over {plan.sp} rank(s): layout {plan.layout}, "
        f"Ulysses degree {plan.ulysses}, route {plan.route}"
    )


def _sets(job: TrainJob) -> dict[str, ShardSet]:
    """The stage's shards by source, in the order in which sources are numbered; at least one is there for each."""
    sets = {source: read_set(job.shards, job.manifest, source, "train") for source in sorted(job.stage.mixture)}
    return {source: shard_set for source, shard_set in sets.items() if shard_set is not None}


def _loader(job: TrainJob, mesh: Mesh, dispatcher: Dispatcher, state: Mapping[str, Any] | None) -> Loader:
    sets = _sets(job)
    return Loader(
        _opener(job, sets),
        list(sets.values()),
        _order(job, sets),
        job.stage.sequences,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        grad_accum=job.stage.sequences // (mesh.dp * job.stage.rows),
        rows=job.stage.rows,
        state=state,
        workers=0 if job.shards.is_local else READERS,
        skip=job.skip,
        prepare=dispatcher,
    )


def _order(job: TrainJob, sets: Mapping[str, ShardSet]) -> SequenceOrder:
    """The recipe's mixture is of tokens: how full the sequences of each source are decides how many are drawn."""
    return SequenceOrder(
        seed=job.recipe.seed,
        sizes=tuple(map(len, sets.values())),
        weights=tuple(job.stage.mixture[source] for source in sets),
        tokens=tuple(shard_set.totals()["n_filled"] for shard_set in sets.values()),
    )


def _opener(job: TrainJob, sets: Mapping[str, ShardSet]) -> Opener:
    """Opens the stage's shards, those of an object store through the node's cache, if the recipe gives it room."""
    remote, limit = opener(job.shards), int(job.recipe.train.shard_cache_gib * 2**30)
    if job.shards.is_local or not limit:
        return remote
    cache = ShardCache(CACHE / "shards", limit)
    stats = {name: stats for one in sets.values() for name, stats in zip(one.names, one.stats)}
    return lambda name: cache.open(remote, name, stats[name])


@contextlib.contextmanager
def _bad_data_told(label: str) -> Iterator[None]:
    """A shard that is not what was written is the user's to mend, or to put up with."""
    try:
        yield
    except BadData as error:
        raise UserError(
            f"{label}: {error}; to go on without such shards, set train.max_bad_shards and run again"
        ) from error


def _lost(batch: Batch, context: int) -> dict[str, int]:
    """Of a step, over all ranks; nothing where nothing is lost."""
    return {"lost_sequences": len(batch.lost), "lost_tokens": len(batch.lost) * context} if batch.lost else {}


def _total_lost(steps: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(step.get(name, 0) for step in steps) for name in ("lost_sequences", "lost_tokens")}


def _figures(metrics: StepMetrics) -> dict[str, float]:
    figures = {
        "loss": metrics.loss,
        "lr": metrics.lr,
        "grad_norm": metrics.grad_norm,
        "tokens_per_second": metrics.tokens / max(metrics.seconds, 1e-9),
    }
    if metrics.text_targets:
        figures["text_nats_per_token"] = metrics.text_nats / metrics.text_targets
    if metrics.vision_targets:
        figures["vision_nats_per_token"] = metrics.vision_nats / metrics.vision_targets
    return figures


def _write_metrics(store: Store, steps: list[dict[str, Any]]) -> None:
    """Commit the steps since the last checkpoint; a repeat after a kill writes the same name again."""
    with store.writing(f"{METRICS}/{steps[-1]['step'] + 1:08d}.jsonl") as file:
        for step in steps:
            file.write((json.dumps(step) + "\n").encode())


def _export(store: Store, target: Store) -> None:
    for name in store.names(MODEL):
        with store.open(name) as source, target.writing(name.removeprefix(f"{MODEL}/")) as file:
            while piece := source.read(2**24):
                file.write(piece)
