"""The law for a third modality: text, vision and audio packed have the gradient and the losses of padded rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from model.llama.config import llama_config
from model.llama.initial_weights import RandomWeights
from model.llama.llama import build_llama
from model.training.engine import LossMetrics, TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import build_mesh
from model.training.rank_batch import Dispatcher, attention_shape
from model.training.settings import EngineSettings
from testing.engine_state import whole_gradient
from testing.law_batch import CONTEXT, SEED, law_documents, relative_difference, tiny_config
from testing.law_batch import VOCABULARY as TWO
from tests.model.attention_groups import run_in_processes
from tests.model.test_gradient_law import TOLERANCE
from tokenization.document import Document
from tokenization.loader.join import join_sequences
from tokenization.packing.pack import pack

VOCABULARY = TWO.extended("audio", 50)
OBJECTIVE = "audio-vision-text"


def documents() -> list[Document]:
    """Those of the gradient law, with audio codes in the last third of every second."""
    codes = np.random.default_rng(1)
    made = []
    for number, document in enumerate(law_documents("vision-text")):
        tokens = document.tokens.copy()
        if number % 2:
            start = 2 * len(tokens) // 3
            tokens[start:-1] = VOCABULARY["audio"].codes_to_ids(codes.integers(0, 50, len(tokens) - 1 - start))
        made.append(replace(document, tokens=tokens))
    return made


def config() -> Any:
    two = tiny_config()
    sizes = {name: getattr(two, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {name: getattr(two, name) for name in ("num_attention_heads", "num_key_value_heads", "initializer_range")}
    return llama_config({**sizes, **heads}, VOCABULARY.sizes, 1024, 1e6)


def padded() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient, and each modality's part of the loss: a third of the mean over rows of the row's mean."""
    model = LlamaForCausalLM(config())
    model.load_state_dict(build_llama(config(), SEED).state_dict())
    model.set_attn_implementation("sdpa")
    rows = documents()
    losses = dict.fromkeys(VOCABULARY.sizes, torch.zeros(()))
    for document in rows:
        tokens, valid = torch.from_numpy(document.tokens).long(), torch.from_numpy(document.loss_mask[1:])
        logits, labels = model(input_ids=tokens[None]).logits[0, :-1], tokens[1:]
        for modality in VOCABULARY.modalities:
            mine = valid & (labels >= modality.start) & (labels < modality.stop)
            if mine.any():
                own = logits[mine, modality.start : modality.stop]
                mean = F.cross_entropy(own, labels[mine] - modality.start)
                losses[modality.name] = losses[modality.name] + mean / (3 * len(rows))
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, {n: x.item() for n, x in losses.items()}


def packed(group: Any, sp: int, zero_stage: int) -> tuple[dict[str, torch.Tensor], LossMetrics]:
    """The gradient and the step's figures by the engine; in each process of a group."""
    mesh = build_mesh(sp)
    sequences = list(pack(documents(), CONTEXT, VOCABULARY, OBJECTIVE, seed=SEED))
    n_examples = sum(sequence.n_examples for sequence in sequences)
    dispatcher = Dispatcher(mesh.sp, mesh.sp_rank, attention_shape(config(), "fp32"))
    mine = range(mesh.dp_rank, len(sequences), mesh.dp)
    batches = [dispatcher(join_sequences([sequences[number]])) for number in mine]
    settings = EngineSettings(zero_stage, "fp32", grad_accum=len(batches))
    engine = TrainingEngine(RandomWeights(config(), SEED), mesh, settings, Schedule(peak=0.0))
    evaluated = engine.eval_step(batches, n_examples)
    engine.accumulate(batches, n_examples)
    gradient = whole_gradient(engine)
    engine.update()
    engine.close()
    return gradient, evaluated


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "sp", "zero_stage"), [(1, 1, 0), (2, 2, 3), (2, 1, 2)])
def test_packed_training_on_three_modalities_equals_padded_training(world_size, sp, zero_stage):
    expected, losses = padded()
    assert min(losses.values()) > 0
    for gradient, metrics in run_in_processes(packed, world_size, sp, zero_stage):
        assert relative_difference(gradient, expected) < TOLERANCE
        assert {name: part.loss for name, part in metrics.modalities.items()} == pytest.approx(losses, rel=TOLERANCE)
        assert metrics.loss == pytest.approx(sum(losses.values()), rel=TOLERANCE)
        assert sum(part.targets for part in metrics.modalities.values()) == metrics.sources[0].targets
