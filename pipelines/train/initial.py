"""What a stage's engine starts from: the weights, the engine's settings and the learning-rate schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from model.config import llama_config
from model.engine import EngineSettings
from model.llama import build_llama, join_vision, load_llama
from model.schedule import Schedule
from pipelines.recipe import Train, TrainStage
from pipelines.storage import Store, fetch_url_folder
from pipelines.train.job import MODEL, TrainJob
from tokenization.errors import UserError
from tokenization.loader import accumulation


def initial_model(job: TrainJob) -> LlamaForCausalLM:
    """The model of the stage before, the recipe's checkpoint, or random weights by the seed; alike on every rank.

    A checkpoint is a Hugging Face Llama, or the folder of a train stage, whose model it then is. A text model is given
    the rows of vision ids.
    """
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
        folder = _fetch_checkpoint(recipe.model.init, recipe.storage.options)
    model = load_llama(folder, dtype=torch.float32, context=stage.context, rope_theta=stage.rope_theta)
    try:
        return join_vision(model, job.vocabulary.text_size, job.vocabulary.size, seed)
    except UserError as error:
        raise UserError(f"model.init {recipe.model.init}: {error}") from None


def _fetch_checkpoint(url: str, options: dict[str, Any]) -> Path:
    """A local copy of the checkpoint at a URL, or of the model in the train stage's folder there."""
    if not url.startswith("package://") and Store(url, options).exists(f"{MODEL}/config.json"):
        return Store(url, options).fetch_folder(MODEL)
    return fetch_url_folder(url, options)


def engine_settings(train: Train, stage: TrainStage, dp: int) -> EngineSettings:
    """How the engine trains: the recipe's settings, with the accumulation that makes the global batch on dp ranks."""
    return EngineSettings(
        zero_stage=train.zero_of(stage),
        precision=train.precision,
        grad_accum=accumulation(stage.sequences, dp, stage.rows),
        clip_norm=train.clip_norm,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        decay=train.decay,
        loss_chunk=train.loss_chunk,
        memory=train.memory_of(stage).settings(),
    )


def schedule(stage: TrainStage) -> Schedule:
    """The stage's learning rate by update."""
    if stage.final_lr is None:
        return Schedule(stage.lr, "constant", stage.warmup_steps)
    return Schedule(stage.lr, "cosine", stage.warmup_steps, stage.steps, stage.final_lr)
