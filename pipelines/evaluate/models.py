"""The run's trained models, on the device that evaluates them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from model.llama.llama import load_llama
from pipelines.dag.manifest import StageOutput
from pipelines.evaluate.job import EvaluateJob
from pipelines.train.record import TrainRecord
from pipelines.train.stage import TrainStage


def trained_model(job: EvaluateJob, stage: str) -> LlamaForCausalLM:
    """The model that a training stage made; parts of one stage that follow each other in a process share it."""
    trained: StageOutput[TrainRecord] = job.inputs[TrainStage.named(stage)]
    bf16 = job.device == "cuda" and job.recipe.training.precision == "bf16"
    folder = trained.store.fetch_folder(trained.record.outputs.model)
    return _model(folder, job.device, torch.bfloat16 if bf16 else torch.float32)


@functools.lru_cache(maxsize=1)
def _model(folder: Path, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    model = load_llama(folder, dtype=dtype)
    return model.to(device).eval()  # type: ignore[arg-type]
