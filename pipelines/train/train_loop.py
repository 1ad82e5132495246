"""One rank of a train stage, from start or last checkpoint to the exported model."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import ray
import torch
import torch.distributed as dist
import transformers

from model import checkpoint
from model.attention.flash_kernels import kernel_name
from model.checkpoint.stored_weights import CONFIG
from model.convert.export_hf import export_hf
from model.llama.initial_weights import BlankWeights, Weights
from model.training.engine import TrainingEngine
from model.training.mesh import Mesh, build_mesh
from model.training.rank_batch import RankBatch
from pipelines.cluster.heartbeat import HeartbeatSender, Stop
from pipelines.cluster.progress import Meter
from pipelines.train.bad_steps import BadStepWatch
from pipelines.train.data import describe, rank_batches, stage_dispatcher
from pipelines.train.engine_setup import engine_settings, initial_weights, last_step_before, schedule
from pipelines.train.heldout import Best, Heldout, better
from pipelines.train.job import CHECKPOINTS, MODEL, TrainJob
from pipelines.train.metrics.files import remove_uncommitted
from pipelines.train.metrics.monitor import Monitor
from storage.errors import UserError
from tokenization.loader.batch import Batch

log = logging.getLogger("ringworld")


def train_worker(config: Mapping[str, Any]) -> None:
    """One rank, from start or last checkpoint to the end of the stage."""
    job: TrainJob = config["job"]
    _quiet()
    torch.set_num_threads(max(1, int(job.recipe.training.resources.cpus)))
    if job.recipe.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it, before its first use
        torch.use_deterministic_algorithms(True)
    watch = config["watch"]
    with HeartbeatSender(watch, config["attempt"], dist.get_rank()) as heartbeat:
        _Rank(job, build_mesh(job.stage.sp, heartbeat.piece, job.collective_timeout), watch, heartbeat).run()


class _Rank:
    """The training loop of one rank; what it counts and decides is the same on all of them."""

    def __init__(self, job: TrainJob, mesh: Mesh, watch: Any, heartbeat: HeartbeatSender) -> None:
        self.job, self.mesh, self.watch, self.heartbeat = job, mesh, watch, heartbeat
        self.label = f"train-{job.stage.name}"
        self.checkpoints = job.store.at(CHECKPOINTS)
        self.before = mesh.on_rank_zero(lambda: last_step_before(job))
        settings = engine_settings(job.recipe.training, job.stage, mesh.dp)
        self.engine = TrainingEngine(self._weights(), mesh, settings, schedule(job.stage))
        self.writer = checkpoint.Writer(self.engine, self.checkpoints, job.recipe.training.keep_checkpoints)
        self.bad_steps = BadStepWatch(job.recipe.training.bad_steps, self.label)
        self.meter = Meter(self.label)
        self.rolled_back: dict[str, Any] = {}  # for the record of the step that follows
        self.state: Mapping[str, int] | None = None  # of the loader, after the last batch
        self.best: Best | None = None  # of the committed checkpoints, by held-out loss
        if restored := self._restore():
            self.state = restored["loader"]
            log.info("%s: rank %d carries on at step %d", self.label, mesh.rank, self.engine.step)
        elif self.before is not None:
            self._take_over(self.before)
        elif job.before is not None and mesh.rank == 0:
            log.warning(
                "%s: the last checkpoint of the stage before is gone from %s; starting from the model that it exported",
                *(self.label, job.before.at(CHECKPOINTS).path()),
            )
        self.monitor = Monitor(job, self.engine, watch)
        if mesh.rank == 0:
            attention, kernels = kernel_name(self.engine.deepspeed.device), job.recipe.training.kernels
            log.info("%s: attention by %s; norms, rotary embedding and SwiGLU by %s", self.label, attention, kernels)

    def _weights(self) -> Weights:
        """The engine's first weights, blank where those of a checkpoint take their place."""
        weights = initial_weights(self.job)
        is_begun = self.mesh.on_rank_zero(lambda: bool(checkpoint.committed_steps(self.checkpoints)))
        return BlankWeights(weights.config) if is_begun or self.before is not None else weights

    def _take_over(self, step: int) -> None:
        """Start from the fp32 weights of the stage before's last checkpoint."""
        assert self.job.before is not None
        store = self.job.before.at(CHECKPOINTS)
        if self.mesh.rank == 0:
            log.info("%s: starts from the fp32 weights at %s, step %d", self.label, store.path(), step)
        try:
            checkpoint.load_weights(self.engine, store, step)
        except checkpoint.DamagedError as error:
            remedy = "restore it, or delete this folder to start from the model that was exported"
            raise UserError(
                f"{self.label}: {error.place}, to start from, is damaged: {error.flaw}; {remedy}"
            ) from error

    def run(self) -> None:
        """Train to the end of the stage and export its model, or stop on request after a checkpoint."""
        engine, stage, mesh = self.engine, self.job.stage, self.mesh
        dispatcher = stage_dispatcher(self.job, mesh, engine.model.config)
        batches = rank_batches(self.job, mesh, dispatcher, self.state)
        wanted = self.job.recipe.training.heldout
        heldout = Heldout(wanted, self.job, engine, dispatcher) if wanted is not None else None
        first, every = engine.step, self.job.recipe.training.checkpoint_steps
        while engine.step < stage.steps:
            self.heartbeat.at(engine.step, "load")
            batch, self.state = self.monitor.next(batches)
            if engine.step == first and mesh.rank == 0:
                log.info("%s: first batch: %s", self.label, describe(batch.micro_batches[0]))
            if not self._step(batch):
                continue
            stop = mesh.largest([self.heartbeat.stop])[0]
            is_saved = engine.step % every == 0 or engine.step == stage.steps or stop == Stop.AFTER_STEP
            if heldout is not None and heldout.is_due(engine.step) and stop != Stop.AFTER_STEP:
                self._measure(heldout, is_saved)
            if is_saved:
                self._save()
                if stop:
                    break
        self.writer.close()
        self.monitor.close()
        if engine.step < stage.steps:
            log.info("%s: rank %d stops at step %d, on request", self.label, mesh.rank, engine.step)
            return
        self.heartbeat.at(engine.step, "export")
        export_hf(engine, self.job.store.at(MODEL))
        if mesh.rank == 0:
            ray.get(self.watch.finish.remote())

    def _step(self, batch: Batch[RankBatch]) -> bool:
        """Train on a batch. False where the stage went back to its last checkpoint."""
        self.heartbeat.at(self.engine.step, "train")
        metrics = self.engine.train_step(batch.micro_batches, batch.n_examples, self.bad_steps.is_spike)
        # Of the batch alone: the last micro-batches of some ranks may have padding too.
        metrics = dataclasses.replace(metrics, tokens=self.job.stage.sequences * self.job.stage.context)
        verdict, why = self.bad_steps.judge(metrics)
        if verdict != "good" and self.mesh.rank == 0:
            log.warning("%s: step %d is dropped: %s", self.label, metrics.step, why)
        if verdict == "rollback":
            self.heartbeat.at(self.engine.step, "save")  # in pieces, as a save is
            if self._restore():
                log.info("%s: rank %d went back to step %d", self.label, self.mesh.rank, self.engine.step)
                self.monitor.discard()
                self.rolled_back = {"rolled_back": [metrics.step, why]}
                self._save()  # at once, with the loader's position: a killed run does not train on this batch again
                self.writer.wait()
                return False
        further = self.rolled_back if verdict == "good" else {"dropped": why, **self.rolled_back}
        if lost := len(batch.lost):
            tokens = lost * self.job.stage.context
            further = {"lost_sequences": lost, "lost_tokens": tokens, **further}
            if self.mesh.rank == 0:
                message = "%s: step %d: %d sequences, %d tokens lost to bad shards"
                log.warning(message, self.label, self.engine.step, lost, tokens)
        self.monitor.step(metrics, further)
        self.rolled_back = {}
        return True

    def _measure(self, heldout: Heldout, is_saved: bool) -> None:
        """Measure the held-out loss after a step. is_saved: a checkpoint of these weights follows."""
        step = self.engine.step
        self.heartbeat.at(step, "evaluate")
        measured = heldout.measure()
        self.monitor.heldout(measured.line, measured.seconds)
        if is_saved:
            self.best = better(self.best, step, measured)
            if self.mesh.rank == 0 and self.best is not None and self.best["step"] == step:
                log.info("%s: step %d has the best held-out loss so far, %.4f", self.label, step, measured.loss)

    def _restore(self) -> Mapping[str, Any] | None:
        """Load the last whole checkpoint, if there is one, in engine and bad-step watch; its client state."""
        self.writer.wait()
        restored = checkpoint.load_latest(self.engine, self.checkpoints)
        if restored is not None:
            self.bad_steps.restore(restored["bad_steps"])
            best = restored.get("best")
            is_there = self.mesh.on_rank_zero(
                lambda: best is not None and best["step"] in checkpoint.committed_steps(self.checkpoints)
            )
            self.best = best if is_there else None
        if self.mesh.rank == 0:
            remove_uncommitted(self.job.store, self.engine.step)
        return restored

    def _save(self) -> None:
        """Begin to commit engine, loader, bad-step watch, and the steps since the last checkpoint."""
        self.heartbeat.at(self.engine.step, "save")
        recipe = self.job.recipe.public_json()
        config = self.engine.model.config.to_dict()
        client_state = {"loader": self.state, "bad_steps": self.bad_steps.state, "recipe": recipe, CONFIG: config}
        if self.best is not None:
            client_state["best"] = self.best
        publish = self.monitor.take()

        def before_commit() -> None:
            assert self.writer.cost is not None
            publish(round(self.writer.cost.seconds, 4))

        cost = self.writer.save(client_state, before_commit, [self.best["step"]] if self.best else [])
        if self.mesh.rank == 0:
            self.meter.set(checkpoint_stall_seconds=cost.seconds, checkpoint_snapshot_bytes=cost.n_bytes)
            if committed := self.writer.committed:  # of the checkpoint before
                self.meter.set(checkpoint_write_seconds=committed.seconds, checkpoint_bytes=committed.n_bytes)


def _quiet() -> None:
    """Keep libraries' warnings and bars out of the workers' log."""
    for name in ("DeepSpeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
