"""Needle in a haystack of held-out text, for one context: accuracy of the greedy answer, and nats of the true digits.

A small model finds no needle at all. What a digit of the true answer costs, among all text ids (`digit_nats`) and among
the ten digits alone (`choice_nats`, 2.30 by chance, however rare digits are), beside what it costs when the needle is
not there, still shows whether it looks back, and how far. In each round one needle goes through all depths and is then
taken out, so that depths, and presence and absence, differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluate.cell import Cell
from pipelines.evaluate.haystack import haystack, lacks_text
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import Row
from pipelines.evaluate.shared_prefill import prefilled
from pipelines.evaluate.tasks.needle_prompts import answer_buffer, build_prompt, digits_of, draw_needles, found
from pipelines.recipe.evaluate import Needle as Settings
from tokenization.text.continuation import follow
from tokenization.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from model.inference.kv_decoder import Decoder

TITLE = "Needle in a haystack"
ANSWER_TOKENS = 24
_LONG_ENOUGH = 512
"""Tokens from which a context holds a needle and the question about it, whatever the tokenizer."""


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if job.settings.needle is None:
        return "evaluate.needle is not there; set needle.contexts"
    return lacks_text(job)


def check(job: EvaluateJob) -> None:
    """The question and the needle fit the contexts that may be too short for them."""
    settings = _settings(job)
    short = [context for context in settings.contexts if context < _LONG_ENOUGH]
    if not short:
        return
    tokenizer = job.subject.tokenizer()
    for context in short:
        for number in range(settings.rounds):
            (drawn,) = draw_needles(1, np.random.default_rng([job.seed, context, number]))
            build_prompt(np.zeros(1, np.int32), [(drawn, 0.0)], [drawn], context, tokenizer)


def cells(job: EvaluateJob) -> list[Cell]:
    """A context and a round each: what stands before the first needle is the same for all depths."""
    settings = _settings(job)
    return [
        Cell(f"needle-{context}-{number}", "needle", {"context": context, "round": number})
        for context in settings.contexts
        for number in range(settings.rounds)
    ]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Ask about one needle at all depths, and where it is not there, in one context."""
    from model.llama.llama import inference

    settings, context, number = _settings(job), cell.arguments["context"], cell.arguments["round"]
    tokenizer = job.subject.tokenizer()
    text = haystack(job, context * settings.rounds)
    own = np.roll(text, -number * context)
    (needle,) = draw_needles(1, np.random.default_rng([job.seed, context, number]))
    truth = follow(tokenizer, "is:", needle.number)
    digits = digits_of(truth, tokenizer)
    depths = [*_depths(settings), None]
    hidden = [[] if depth is None else [(needle, depth)] for depth in depths]
    prompts = [build_prompt(own, one, [needle], context, tokenizer).tokens for one in hidden]
    answers: list[dict[str, Any]] = []
    model = job.subject.model(job.group)
    with inference(model):
        most = min(ANSWER_TOKENS, answer_buffer(context))
        decoders = prefilled(model, prompts, most, job.group)
        for depth, prompt in zip(depths, prompts):
            decoder = next(decoders)
            ids, logits = ask(decoder, truth, job.vocabulary.text_size, job.vocabulary.eos_id, most)
            answer = tokenizer.decode([token for token in ids if token < tokenizer.size])
            answers.append(
                {
                    "round": number,
                    "depth": depth,
                    "tokens": len(prompt),
                    "needle": needle.number,
                    "answer": answer,
                    "found": found(answer, [needle]),
                    "digit_nats": nats(logits[digits], truth[digits]),
                    "choice_nats": choice_nats(logits[digits], truth[digits], tokenizer),
                }
            )
            del decoder  # before the next one is filled
    return {"context": context, "haystack_tokens": len(text), "answers": answers}


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a context: a list over depths of each figure, means over the rounds that were measured."""
    settings = _settings(job)
    depths = _depths(settings)
    found_rows: list[Row] = []
    for context in settings.contexts:
        own = [result for result in results.values() if result["context"] == context]
        if not own:
            continue
        answers = [answer for result in own for answer in result["answers"]]

        def mean(depth: float | None, figure: str, answers: Sequence[Mapping[str, Any]] = answers) -> float | None:
            values = [one[figure] for one in answers if one["depth"] == depth]
            return None if None in values else float(np.mean(values))

        row: dict[str, Any] = {"part": f"needle-{context}", "context": context, "depths": depths, "rounds": len(own)}
        row["haystack_tokens"] = own[0]["haystack_tokens"]
        for figure, key in (("found", "accuracy"), ("digit_nats", "digit_nats"), ("choice_nats", "choice_nats")):
            row[key] = [mean(depth, figure) for depth in depths]
            row[f"{key}_without"] = mean(None, figure)
        found_rows.append({**row, "answers": answers})
    return found_rows


def _settings(job: EvaluateJob) -> Settings:
    assert job.settings.needle is not None
    return job.settings.needle


def _depths(settings: Settings) -> list[float]:
    """0: the text's start, 1: its end."""
    last = settings.depths - 1
    return [number / last for number in range(settings.depths)] if last else [0.5]


def ask(
    decoder: Decoder, truth: np.ndarray, text_size: int, eos_id: int, answer_tokens: int
) -> tuple[list[int], np.ndarray]:
    """The greedy answer's ids, and the logits float32 [len(truth), text ids] of each token of the true one.

    decoder: of one row, which has the prompt; it goes on to the answer.
    """
    import torch

    from model.inference.sampling import choose

    scored = decoder.fork([0])
    logits = []
    for token in torch.from_numpy(truth.astype(np.int64)).to(decoder.device):
        logits.append(scored.logits(0, text_size)[0])
        scored.append(token[None])
    answer: list[int] = []
    while len(answer) < answer_tokens:
        token = decoder.agreed(choose(decoder.logits(0, text_size), None, 0.0, None))
        if int(token) == eos_id:
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
