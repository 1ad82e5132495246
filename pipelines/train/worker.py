"""One rank of a train stage, from start or last checkpoint to the exported model."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import torch
import transformers

from model import checkpoint
from model.engine import TrainingEngine
from model.export import export_hf
from model.mesh import Mesh, build_mesh
from pipelines.progress import Meter
from pipelines.train.data import batch_loader, describe, stage_dispatcher
from pipelines.train.initial import engine_settings, initial_model, schedule
from pipelines.train.job import CHECKPOINTS, MODEL, TrainJob
from pipelines.train.metrics import lost_to_bad_shards, step_figures, write_metrics
from pipelines.train.pulse import Pulse

log = logging.getLogger("ringworld")


def train_worker(config: Mapping[str, Any]) -> None:
    """One rank, from start or last checkpoint to the end of the stage."""
    job: TrainJob = config["job"]
    _quiet()
    torch.set_num_threads(max(1, int(job.recipe.train.resources.cpus)))
    mesh = build_mesh(job.stage.sp)
    watch = config["watch"]
    with Pulse(watch, config["attempt"], mesh.rank) as pulse:
        _train(job, mesh, watch, pulse)


def _train(job: TrainJob, mesh: Mesh, watch: Any, pulse: Pulse) -> None:
    recipe, stage, store = job.recipe, job.stage, job.store
    engine = TrainingEngine(initial_model(job), mesh, engine_settings(job, mesh), schedule(stage))
    checkpoints = store.at(CHECKPOINTS)
    last = checkpoint.latest_committed(checkpoints.path(), options=checkpoints.options)
    state = None
    if last is not None:
        state = checkpoint.load(engine, checkpoints.path(), last, checkpoints.options)["loader"]
        log.info("train-%s: rank %d carries on at step %d", stage.name, mesh.rank, engine.step)
    meter = Meter(f"train-{stage.name}")
    pending: list[dict[str, Any]] = []
    batches = iter(batch_loader(job, mesh, stage_dispatcher(job, mesh, engine.model.config), state))
    first = engine.step
    while engine.step < stage.steps:
        pulse.at(engine.step, "load")
        batch, state = next(batches)
        if mesh.rank == 0 and engine.step == first:
            log.info("train-%s: first batch: %s", stage.name, describe(batch.micro_batches[0]))
        pulse.at(engine.step, "train")
        metrics = engine.train_step(batch.micro_batches, batch.n_examples)
        lost = lost_to_bad_shards(batch, stage.context)
        pending.append({**dataclasses.asdict(metrics), **lost})
        if mesh.rank == 0:
            figures = {**step_figures(metrics), **lost}
            meter.set(**figures)
            if lost:
                log.warning(
                    "train-%s: step %d: %d sequences, %d tokens lost to bad shards",
                    *(stage.name, engine.step, lost["lost_sequences"], lost["lost_tokens"]),
                )
            watch.report.remote(engine.step, {key: figures[key] for key in ("loss", "tokens_per_second")})
        if engine.step % recipe.train.checkpoint_steps == 0 or engine.step == stage.steps:
            pulse.at(engine.step, "save")
            if mesh.rank == 0:
                write_metrics(store, pending)
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
            if engine.step < stage.steps and mesh.agreed(lambda: ray.get(watch.must_stop.remote())):
                log.info("train-%s: rank %d stops at step %d for a larger group", stage.name, mesh.rank, engine.step)
                return
    pulse.at(engine.step, "export")
    export_hf(engine, store.path(MODEL), options=store.options)
    if mesh.rank == 0:
        ray.get(watch.finish.remote())


def _quiet() -> None:
    """Leave the workers' log to what a reader of the run wants to know."""
    for name in ("DeepSpeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
