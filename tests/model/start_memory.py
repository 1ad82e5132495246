"""What a rank's host holds while an engine takes its first weights: for tests to compare with what it may."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import deepspeed
import torch
from torch import nn

from model.llama.config import llama_config
from model.llama.hf_weights import StoredWeights, stored_config
from model.llama.initial_weights import RandomWeights, Weights, join_modalities, weight_shapes
from model.llama.llama import build_llama
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import Mesh
from model.training.settings import EngineSettings

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 8}
TEXT, JOINT = 6144, 8192
SIZES_OF_IDS = {"text": TEXT, "vision": JOINT - TEXT}
CONFIG = llama_config(SIZES, SIZES_OF_IDS, 64, 1e4)
N_PARAMETERS = sum(shape.numel() for shape in weight_shapes(CONFIG).values())
N_LAYER = sum(shape.numel() for name, shape in weight_shapes(CONFIG).items() if ".layers.0." in name)


_M_MMAP_THRESHOLD = -3


class Start(NamedTuple):
    """Of one rank: bytes by which it grew, at most, until all weights were there; names of weights that are others."""

    grown: int
    other: list[str]


class _Filled(Exception):  # noqa: N818 - it ends a start where what is looked at has happened
    pass


def save_text_model(folder: Path) -> None:
    """A bf16 checkpoint of text alone, in many files."""
    model = build_llama(llama_config(SIZES, TEXT, 64, 1e4), seed=1, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="50MB")


def starts(mesh: Mesh, folder: str) -> dict[str, Start]:
    """At ZeRO-3 and 2, from random weights and from what `save_text_model` left in `folder`."""
    stored = StoredWeights(stored_config(folder), lambda: Path(folder))
    random = RandomWeights(CONFIG, seed=1)
    return {
        "random": _start(mesh, random, EngineSettings(3, "fp32")),
        "stored": _start(mesh, join_modalities(stored, SIZES_OF_IDS, seed=2), EngineSettings(3, "fp32"), compared=True),
        "replicated": _start(mesh, random, EngineSettings(2, "bf16")),
    }


def _start(mesh: Mesh, weights: Weights, settings: EngineSettings, compared: bool = False) -> Start:
    """As far as DeepSpeed begins to make its own state."""
    gc.collect()
    # As for a large model's weights: what is freed is given back at once, so that no old block is taken again unseen.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    with mock.patch("deepspeed.initialize", side_effect=_Filled) as initialize, contextlib.suppress(_Filled):
        TrainingEngine(weights, mesh, settings, Schedule(0.0))
    grown = _status("VmHWM") - before
    return Start(grown, _others(initialize.call_args.kwargs["model"].model, weights) if compared else [])


def _others(model: nn.Module, weights: Weights) -> list[str]:
    others = []
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            if not torch.equal(parameter, weights.read(name).float()):
                others.append(name)
    return others


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
