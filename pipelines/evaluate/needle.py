"""Needle in a haystack of held-out text, for one context: accuracy of the greedy answer, and nats of the true digits.

A small model finds no needle at all. The nats it gives the digits of the true answer, beside what it gives them when
the needle is not there, still show whether it looks back, and how far. In each round one needle goes through all depths
and is then taken out, so that depths, and presence and absence, differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from model.decoding import Decoder, choose
from model.llama import inference
from pipelines.evaluate.haystack import answer_buffer, build_prompt, digits_of, draw_needles, follow, found
from pipelines.evaluate.job import EvaluateJob
from pipelines.storage import open_url
from tokenization.errors import BadData
from tokenization.fields import FieldSpec
from tokenization.records import BadRecord, read_records
from tokenization.text import TextTokenizer
from tokenization.vocabulary import JointVocabulary

ANSWER_TOKENS = 24


def depths_of(count: int) -> list[float]:
    """Depths from 0 (the text's start) to 1 (its end), evenly spaced; a single one is the middle."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def needle_part(job: EvaluateJob, name: str, context: int) -> dict[str, Any]:
    """Ask the last stage's model at one context: a list over depths of each figure, means over the rounds."""
    settings = job.recipe.evaluate.needle
    assert settings is not None
    tokenizer, model = job.tokenizer(), job.model(job.stages[-1])
    text = haystack(job, tokenizer, context * settings.rounds)
    depths = depths_of(settings.depths)
    answers: list[dict[str, Any]] = []
    for number in range(settings.rounds):
        generator = np.random.default_rng([job.recipe.seed, context, number])
        (needle,) = draw_needles(1, generator)
        own = np.roll(text, -number * context)
        truth = follow(tokenizer, "is:", needle.number)
        for depth in [*depths, None]:
            prompt = build_prompt(own, [] if depth is None else [(needle, depth)], [needle], context, tokenizer)
            answer, nats = ask(
                model, prompt.tokens, truth, tokenizer, job.vocabulary, min(ANSWER_TOKENS, answer_buffer(context))
            )
            digits = digits_of(truth, tokenizer)
            answers.append(
                {
                    "round": number,
                    "depth": depth,
                    "tokens": len(prompt.tokens),
                    "needle": needle.number,
                    "answer": answer,
                    "found": found(answer, [needle]),
                    "digit_nats": float(np.mean(nats[digits])),
                }
            )

    def mean(depth: float | None, figure: str) -> float:
        return float(np.mean([one[figure] for one in answers if one["depth"] == depth]))

    return {
        "context": context,
        "depths": depths,
        "rounds": settings.rounds,
        "haystack_tokens": len(text),
        "accuracy": [mean(depth, "found") for depth in depths],
        "digit_nats": [mean(depth, "digit_nats") for depth in depths],
        "digit_nats_without": mean(None, "digit_nats"),
        "accuracy_without": mean(None, "found"),
        "answers": answers,
    }


def ask(
    model: LlamaForCausalLM,
    prompt: np.ndarray,
    truth: np.ndarray,
    tokenizer: TextTokenizer,
    vocabulary: JointVocabulary,
    answer_tokens: int,
) -> tuple[str, np.ndarray]:
    """The greedy answer as text, and the nats of each token of the true one, float64; one pass over the prompt."""
    with inference(model):
        decoder = Decoder(model, [prompt])
        after_prompt = decoder.hidden, decoder.mask, decoder.next_position
        nats = []
        for token in torch.from_numpy(truth.astype(np.int64)).to(decoder.device):
            nats.append(float(F.cross_entropy(decoder.logits(0, vocabulary.text_size), token[None])))
            decoder.append(token[None])
        decoder.cache.crop(-len(truth))
        decoder.hidden, decoder.mask, decoder.next_position = after_prompt
        answer: list[int] = []
        while len(answer) < answer_tokens:
            token = choose(decoder.logits(0, vocabulary.text_size), None, 0.0, None)
            if int(token) == vocabulary.eos_id:
                break
            answer.append(int(token))
            decoder.append(token)
    return tokenizer.decode([token for token in answer if token < tokenizer.size]), np.array(nats)


def haystack(job: EvaluateJob, tokenizer: TextTokenizer, tokens: int) -> np.ndarray:
    """Ids int32 of held-out text, one record after the other, as many as there are up to `tokens`."""
    pieces: list[np.ndarray] = []
    for text in _texts(job):
        pieces.append(tokenizer.encode(text))
        if sum(map(len, pieces)) >= tokens:
            break
    return np.concatenate([np.zeros(0, np.int32), *pieces])[:tokens]


def _texts(job: EvaluateJob) -> Iterator[str]:
    for found_object in job.objects(("text",), heldout=True):
        spec = FieldSpec.parse(job.recipe.sources[found_object.source].fields[0])
        try:
            with open_url(found_object.url, job.recipe.storage.options) as file:
                for record in read_records(file, found_object.url):
                    if not isinstance(record, BadRecord):
                        yield "\n\n".join(str(record[1][name]) for name in spec.names if record[1].get(name))
        except BadData:  # the tokenize stage has it in quarantine
            continue
