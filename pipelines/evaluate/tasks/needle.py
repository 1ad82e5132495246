"""Needle in a haystack of held-out text, for one context: accuracy of the greedy answer, and nats of the true digits.

A small model finds no needle at all. What a digit of the true answer costs, among all text ids (`digit_nats`) and among
the ten digits alone (`choice_nats`, 2.30 by chance, however rare digits are), beside what it costs when the needle is
not there, still shows whether it looks back, and how far. In each round one needle goes through all depths and is then
taken out, so that depths, and presence and absence, differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from model.inference.kv_decoder import Decoder, choose
from model.llama.llama import inference
from pipelines.decoder.client import parsed_records
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.models import trained_model
from pipelines.evaluate.tasks.needle_prompts import answer_buffer, build_prompt, digits_of, draw_needles, follow, found
from pipelines.sources.listing import content_of
from storage.errors import BadData
from tokenization.field_spec import FieldSpec
from tokenization.readers.record import BadRecord
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary

ANSWER_TOKENS = 24


def needle_part(job: EvaluateJob, name: str, context: int) -> dict[str, Any]:
    """Ask the last stage's model at one context: a list over depths of each figure, means over the rounds."""
    settings = job.recipe.evaluate.needle
    assert settings is not None
    tokenizer, model = job.tokenizer(), trained_model(job, job.last)
    text = haystack(job, tokenizer, context * settings.rounds)
    last = settings.depths - 1
    depths = [number / last for number in range(settings.depths)] if last else [0.5]  # 0: the text's start, 1: its end
    answers: list[dict[str, Any]] = []
    for number in range(settings.rounds):
        generator = np.random.default_rng([job.recipe.seed, context, number])
        (needle,) = draw_needles(1, generator)
        own = np.roll(text, -number * context)
        truth = follow(tokenizer, "is:", needle.number)
        digits = digits_of(truth, tokenizer)
        for depth in [*depths, None]:
            prompt = build_prompt(own, [] if depth is None else [(needle, depth)], [needle], context, tokenizer)
            most = min(ANSWER_TOKENS, answer_buffer(context))
            ids, logits = ask(model, prompt.tokens, truth, job.vocabulary, most)
            answer = tokenizer.decode([token for token in ids if token < tokenizer.size])
            answers.append(
                {
                    "round": number,
                    "depth": depth,
                    "tokens": len(prompt.tokens),
                    "needle": needle.number,
                    "answer": answer,
                    "found": found(answer, [needle]),
                    "digit_nats": nats(logits[digits], truth[digits]),
                    "choice_nats": choice_nats(logits[digits], truth[digits], tokenizer),
                }
            )

    def mean(depth: float | None, figure: str) -> float | None:
        values = [one[figure] for one in answers if one["depth"] == depth]
        return None if None in values else float(np.mean(values))

    return {
        "context": context,
        "depths": depths,
        "rounds": settings.rounds,
        "haystack_tokens": len(text),
        "accuracy": [mean(depth, "found") for depth in depths],
        "digit_nats": [mean(depth, "digit_nats") for depth in depths],
        "digit_nats_without": mean(None, "digit_nats"),
        "choice_nats": [mean(depth, "choice_nats") for depth in depths],
        "choice_nats_without": mean(None, "choice_nats"),
        "accuracy_without": mean(None, "found"),
        "answers": answers,
    }


def ask(
    model: LlamaForCausalLM, prompt: np.ndarray, truth: np.ndarray, vocabulary: JointVocabulary, answer_tokens: int
) -> tuple[list[int], np.ndarray]:
    """The greedy answer's ids, and the logits float32 [len(truth), text ids] of each token of the true one.

    The prompt passes through the model once.
    """
    with inference(model):
        decoder = Decoder(model, [prompt], room=answer_tokens)
        scored = decoder.fork([0])
        logits = []
        for token in torch.from_numpy(truth.astype(np.int64)).to(decoder.device):
            logits.append(scored.logits(0, vocabulary.text_size)[0])
            scored.append(token[None])
        answer: list[int] = []
        while len(answer) < answer_tokens:
            token = choose(decoder.logits(0, vocabulary.text_size), None, 0.0, None)
            if int(token) == vocabulary.eos_id:
                break
            answer.append(int(token))
            decoder.append(token)
    return answer, torch.stack(logits).cpu().numpy()


def nats(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean nats of ids [n] under softmaxes of logits [n, V]."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(len(ids)), ids]))


def choice_nats(logits: np.ndarray, ids: np.ndarray, tokenizer: TextTokenizer) -> float | None:
    """The same among the ten digits alone; None for a tokenizer that writes several digits as one id."""
    ten = np.array([follow(tokenizer, "is:", str(digit))[-1] for digit in range(10)])
    if not np.isin(ids, ten).all():
        return None
    return nats(logits[:, ten], np.array([int(np.flatnonzero(ten == one)[0]) for one in ids]))


def haystack(job: EvaluateJob, tokenizer: TextTokenizer, tokens: int) -> np.ndarray:
    """Ids int32 of held-out text, one record after the other, as many as there are up to `tokens`."""
    pieces: list[np.ndarray] = []
    for text in _texts(job):
        pieces.append(tokenizer.encode(text))
        if sum(map(len, pieces)) >= tokens:
            break
    return np.concatenate([np.zeros(0, np.int32), *pieces])[:tokens]


def _texts(job: EvaluateJob) -> Iterator[str]:
    options = job.recipe.storage.options
    for found_object in job.objects(("text",), heldout=True):
        spec = FieldSpec.parse(job.recipe.sources[found_object.source].fields[0])
        try:
            content, limits = content_of(found_object, options), job.recipe.tokenize.decoder_limits
            for record in parsed_records(content, found_object.url, spec.names, limits):
                if not isinstance(record, BadRecord):
                    values = [record[1].get(name) for name in spec.names]
                    yield "\n\n".join(value for value in values if isinstance(value, str) and value)
        except BadData:  # the tokenize stage has it in quarantine
            continue
