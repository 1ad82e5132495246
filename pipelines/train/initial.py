"""What a stage's engine starts from: the weights, the engine's settings and the learning-rate schedule."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from model.config import llama_config
from model.engine import EngineSettings
from model.llama import build_llama, extend_vocabulary, load_llama
from model.mesh import Mesh
from model.schedule import Schedule
from pipelines.recipe import TrainStage
from pipelines.storage import fetch_url_folder
from pipelines.train.job import MODEL, TrainJob


def initial_model(job: TrainJob) -> LlamaForCausalLM:
    """The model of the stage before, the recipe's checkpoint, or random weights by the seed; alike on every rank.

    A model that knows fewer ids than the vocabulary is extended by the missing ones.
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
        folder = fetch_url_folder(recipe.model.init, recipe.storage.options)
    model = load_llama(folder, dtype=torch.float32, context=stage.context, rope_theta=stage.rope_theta)
    if model.config.vocab_size < job.vocabulary.size:
        extend_vocabulary(model, job.vocabulary.size, seed)
    return model


def engine_settings(job: TrainJob, mesh: Mesh) -> EngineSettings:
    """How the engine trains: the recipe's settings, with the accumulation that makes the global batch on this mesh."""
    train, stage = job.recipe.train, job.stage
    return EngineSettings(
        zero_stage=train.zero_of(stage),
        precision=train.precision,
        grad_accum=stage.sequences // (mesh.dp * stage.rows),
        clip_norm=train.clip_norm,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        loss_chunk=train.loss_chunk,
        memory=train.memory_of(stage).settings(),
    )


def schedule(stage: TrainStage) -> Schedule:
    """The stage's learning rate by update."""
    if stage.final_lr is None:
        return Schedule(stage.lr, "constant", stage.warmup_steps)
    return Schedule(stage.lr, "cosine", stage.warmup_steps, stage.steps, stage.final_lr)
