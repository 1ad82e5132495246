"""What a stage's engine starts from: the weights, the engine's settings and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path

from model import checkpoint
from model.llama.config import llama_config
from model.llama.hf_weights import CONFIG, StoredWeights, stored_config
from model.llama.initial_weights import RandomWeights, Weights, join_modalities
from model.training.lr_schedule import Schedule
from model.training.settings import EngineSettings, TrainingSettings
from pipelines.recipe import Train, TrainStage
from pipelines.train.job import CHECKPOINTS, MODEL, TrainJob
from pipelines.train.lwm_init import lwm_file, lwm_weights
from storage.errors import UserError
from storage.store import Store
from tokenization.loader.loader import accumulation


def initial_weights(job: TrainJob) -> Weights:
    """Those of the stage before as it exported them, of the recipe's checkpoint, or random ones by the seed.

    A checkpoint is a Hugging Face Llama, the folder of a train stage with one, or LWM's released file; it gets the rows
    of the modalities that it lacks. Of a folder in an object store only the configuration is fetched here, the rest
    when a weight is read; a file of LWM's, which has no such part, is fetched once a node.
    """
    recipe, stage = job.recipe, job.stage
    if job.before is None and recipe.model.init is None:
        ends = {"bos_id": job.vocabulary.bos_id, "eos_id": job.vocabulary.eos_id}
        config = llama_config(recipe.model.size, job.vocabulary.sizes, stage.context, stage.rope_theta, **ends)
        return RandomWeights(config, recipe.seed)
    try:
        return join_modalities(_stored(job), job.vocabulary.sizes, recipe.seed)
    except UserError as error:
        raise UserError(f"model.init {recipe.model.init}: {error}") from None


def _stored(job: TrainJob) -> Weights:
    """The weights of the checkpoint to start from."""
    recipe, stage = job.recipe, job.stage
    if job.before is None and recipe.model.init is not None:
        file = lwm_file(recipe.model.init, recipe.storage.options)
        if file is not None:
            return lwm_weights(recipe, file, stage.context, stage.rope_theta)
    fetch = _fetcher(job)
    return StoredWeights(stored_config(fetch(CONFIG), stage.context, stage.rope_theta), fetch)


def last_step_before(job: TrainJob) -> int | None:
    """The last step of the stage before. None for a first stage, and where its last checkpoint is gone."""
    if job.before is None:
        return None
    steps = next(before.steps for before, after in pairwise(job.recipe.curriculum) if after.name == job.stage.name)
    store = job.before.at(CHECKPOINTS)
    return steps if checkpoint.latest_committed(store) == steps else None


def _fetcher(job: TrainJob) -> Callable[..., Path]:
    """A function that returns a local folder with the checkpoint to start from, or with some of its files alone."""
    url = job.recipe.model.init
    if job.before is not None:
        return partial(job.before.fetch_folder, MODEL)
    assert url is not None
    store = Store(url, job.recipe.storage.options)
    return partial(store.fetch_folder, MODEL if store.exists(f"{MODEL}/{CONFIG}") else "")


def engine_settings(train: Train, stage: TrainStage, dp: int) -> EngineSettings:
    """How the engine trains: the recipe's settings, with the accumulation that makes the global batch on dp ranks."""
    own = train.for_stage(stage)
    common = {field.name: getattr(own, field.name) for field in fields(TrainingSettings)}
    return EngineSettings(**common, grad_accum=accumulation(stage.sequences, dp, stage.rows))


def schedule(stage: TrainStage) -> Schedule:
    """The stage's learning rate by update."""
    if stage.final_lr is None:
        return Schedule(stage.lr, "constant", stage.warmup_steps)
    return Schedule(stage.lr, "cosine", stage.warmup_steps, stage.steps, stage.final_lr)
