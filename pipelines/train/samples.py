"""What a model draws while it trains: continuations of the beginnings of held-out documents, as joint ids.

In: the stage's held-out shards and a model whole on this rank. Out: ids, which a report decodes, so that a trainer
needs neither tokenizer nor codec. Each token is drawn from the ids of the kind that the document has there, text or a
modality's codes, and its markers stand where the document has them: whatever is drawn decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from model.inference.kv_decoder import Decoder
from model.inference.sampling import choose
from model.llama.llama import inference
from pipelines.train.job import TrainJob
from tokenization.shards.chosen_sequences import read_sequences
from tokenization.shards.index import ShardSet
from tokenization.vocabulary import JointVocabulary

PROMPT = 256
"""Tokens of a document that are given, at most."""
TOP_K = 50


class Sampler:
    """The beginnings of the first held-out document of each source, and what follows them there."""

    def __init__(self, job: TrainJob, sets: Mapping[str, ShardSet], n_tokens: int) -> None:
        self._seed, self._vocabulary = job.recipe.seed, job.vocabulary
        self._documents = {}
        for source, shard_set in sets.items():
            (sequence,) = read_sequences(job.shards, shard_set, [0])
            document = sequence.tokens[: int(sequence.cu_seqlens[1])]
            given = min(PROMPT, len(document) // 2)
            self._documents[source] = document[:given], document[given : given + n_tokens]

    def draw(self, model: LlamaForCausalLM, step: int) -> list[dict[str, Any]]:
        """A continuation of each source's document, plain JSON: source, prompt, document, sample, of joint ids.

        step: decides the draws, with the recipe's seed.
        """
        generator = torch.Generator(model.device).manual_seed(self._seed + step)
        drawn = []
        with inference(model):
            for source, (prompt, document) in self._documents.items():
                if len(prompt):
                    ids = self._continue(model, prompt, document, generator)
                    row = {"prompt": prompt.tolist(), "document": document.tolist(), "sample": ids}
                    drawn.append({"source": source, **row})
        return drawn

    def _continue(
        self, model: LlamaForCausalLM, prompt: np.ndarray, document: np.ndarray, generator: torch.Generator
    ) -> list[int]:
        decoder = Decoder(model, [prompt], room=len(document))
        drawn: list[torch.Tensor] = []
        for number, ids in enumerate(kinds(document, self._vocabulary)):
            if len(ids) == 1:
                token = torch.tensor([ids.start], device=decoder.device)
            else:
                token = choose(decoder.logits(ids.start, ids.stop), TOP_K, 1.0, generator) + ids.start
            drawn.append(token)
            if number < len(document) - 1:
                decoder.append(token)
        found: list[int] = torch.cat(drawn).tolist() if drawn else []
        return found


def kinds(document: np.ndarray, vocabulary: JointVocabulary) -> Iterator[range]:
    """Of each token the ids among which one in its place is drawn: its modality's codes; of a marker it alone."""
    for token in document.tolist():
        modality = next(one for one in vocabulary.modalities if one.contains(token))
        codes = range(modality.start, modality.start + modality.n_codes)
        yield codes if token in codes else range(token, token + 1)
