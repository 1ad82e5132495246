"""Prefill through the ring and decoding over sharded keys: the numbers of plain transformers on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.inference.generate import generate_text, stream_frames
from model.inference.kv_decoder import Decoder
from model.inference.sampling import Sampling
from model.llama.llama import inference
from testing.thread_ranks import run_in_threads
from tests.model.attention_groups import run_in_processes
from tests.model.inference.stock import VOCABULARY, decoded_alone, small_llama, stock
from tokenization.vocabulary import JointVocabulary

LOGITS = 1e-5
TOKENS = 12


def random_prompts(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(len(lengths))
    return [generator.integers(3, VOCABULARY, length) for length in lengths]


PROMPTS = random_prompts(37, 1, 150, 18, 64)


def greedy(group: Any, prompts: list[np.ndarray], chunk: int, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, B, V] and ids [n, B] of TOKENS greedy tokens after each prompt."""
    model = small_llama()
    logits, chosen = [], []
    with inference(model):
        decoder = Decoder(model, prompts, prefill_chunk=chunk, room=room, group=group)
        for _ in range(TOKENS):
            logits.append(decoder.logits(0, VOCABULARY))
            chosen.append(decoder.agreed(logits[-1].argmax(-1)))
            decoder.append(chosen[-1])
    return torch.stack(logits), torch.stack(chosen)


def assert_as_alone(logits: torch.Tensor, chosen: torch.Tensor, prompts: list[np.ndarray]) -> None:
    plain = stock(small_llama())
    for row, prompt in enumerate(prompts):
        expected, ids = decoded_alone(plain, prompt, TOKENS)
        torch.testing.assert_close(logits[:, row], expected, rtol=0, atol=LOGITS)
        assert chosen[:, row].tolist() == ids


@pytest.mark.parametrize("chunk", [5, 40, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_packed_prompts_of_all_lengths_give_what_transformers_gives_for_each_alone(ranks, chunk):
    results, _ = run_in_threads(lambda exchange: greedy(exchange, PROMPTS, chunk), ranks)
    for logits, chosen in results:
        assert_as_alone(logits, chosen, PROMPTS)
        torch.testing.assert_close(logits, results[0][0], rtol=0, atol=0)  # every rank has the same bits


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_give_what_transformers_gives(ranks):
    for logits, chosen in run_in_processes(greedy, ranks, PROMPTS, 40, TOKENS):
        assert_as_alone(logits, chosen, PROMPTS)


@pytest.mark.parametrize("ranks", [1, 3])
def test_questions_about_a_shared_prefix_give_what_whole_prompts_give(ranks):
    prefix, *questions = random_prompts(90, 7, 1, 30)

    def ask(exchange: Any) -> tuple[torch.Tensor, int, int]:
        model = small_llama()
        with inference(model):
            prompt = Decoder(model, [prefix], prefill_chunk=16, group=exchange)
            alone = prompt.cache.nbytes
            asked = prompt.fork([0, 0, 0])
            asked.extend(questions)
            logits = []
            for _ in range(TOKENS):
                logits.append(asked.logits(0, VOCABULARY))
                asked.append(asked.agreed(logits[-1].argmax(-1)))
            prompt.append(torch.tensor([5]))  # the first goes on undisturbed, and disturbs nobody
            logits.append(torch.cat((prompt.logits(0, VOCABULARY), asked.logits(0, VOCABULARY)[1:])))
            # Keys of the prefix are held once, beside room for questions and answers.
            return torch.stack(logits), alone, asked.cache.nbytes

    plain = stock(small_llama())
    results, _ = run_in_threads(ask, ranks)
    for logits, prefix_bytes, all_bytes in results:
        assert all_bytes < 3 * prefix_bytes + 3 * 64 * 2 * 2 * 2 * 8 * 4
        for row, question in enumerate(questions):
            expected, _ = decoded_alone(plain, np.concatenate((prefix, question)), TOKENS)
            torch.testing.assert_close(logits[:TOKENS, row], expected, rtol=0, atol=LOGITS)
        expected, _ = decoded_alone(plain, prefix, 2, given=[5])
        torch.testing.assert_close(logits[-1, 0], expected[-1], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_dropped_rows_leave_the_others_as_they_are(ranks):
    def drop(exchange: Any) -> torch.Tensor:
        model = small_llama()
        with inference(model):
            decoder = Decoder(model, PROMPTS, prefill_chunk=40, group=exchange)
            for step in range(TOKENS):
                if step == 3:
                    decoder.keep([4, 0])
                logits = decoder.logits(0, VOCABULARY)
                decoder.append(logits.argmax(-1))
            return decoder.logits(0, VOCABULARY)

    plain = stock(small_llama())
    for logits in run_in_threads(drop, ranks)[0]:
        for row, prompt in zip(logits, (PROMPTS[4], PROMPTS[0])):
            expected, _ = decoded_alone(plain, prompt, TOKENS + 1)
            torch.testing.assert_close(row, expected[-1], rtol=0, atol=LOGITS)


def test_text_and_guided_frames_are_drawn_alike_on_any_number_of_ranks():
    vocabulary = JointVocabulary.for_codebook(48, 40, VOCABULARY - 48)
    conditional, unconditional = np.array([1, 17, 40, 4, 9]), np.array([1, 4])

    def draw(exchange: Any) -> tuple[list, list]:
        generator = torch.Generator().manual_seed(exchange.rank)  # rank 0's draws are everybody's
        text = generate_text(
            small_llama(), vocabulary, [p % 48 for p in PROMPTS], 10, 20, 1.0, generator, group=exchange
        )
        frames = stream_frames(
            small_llama(), vocabulary, conditional, 3, 6, Sampling(5.0, 8), Sampling(1.0, 8), unconditional,
            generator, exchange,
        )  # fmt: skip
        return text, list(frames)

    alone = run_in_threads(draw, 1)[0][0]
    for text, frames in run_in_threads(draw, 3)[0]:
        for ours, expected in zip((*text, *frames), (*alone[0], *alone[1]), strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("ranks", [1, 4])
def test_no_rank_keeps_more_than_its_share(ranks):
    """Prompts are shared evenly up to one token a chunk, and new tokens up to one a row."""

    def stored(exchange: Any) -> tuple[int, list[int]]:
        model = small_llama()
        with inference(model):
            decoder = Decoder(model, PROMPTS, prefill_chunk=16, group=exchange)
            for _ in range(40):
                decoder.append(torch.zeros(len(PROMPTS), dtype=torch.long))
        return sum(row.stored for row in decoder.cache.rows), decoder.lengths

    counts = run_in_threads(stored, ranks)[0]
    total = sum(map(len, PROMPTS)) + 40 * len(PROMPTS)
    assert counts[0][1] == [len(prompt) + 40 for prompt in PROMPTS]
    assert sum(count for count, _ in counts) == total
    chunks = -(-sum(map(len, PROMPTS)) // (16 * ranks))
    assert max(count for count, _ in counts) - min(count for count, _ in counts) <= chunks + len(PROMPTS)


def test_half_precision_decodes_over_the_same_keys():
    """bf16 keys are attended to in fp32, in pieces: as close to the fp32 model as the rounding of its weights."""
    model, prompt = small_llama().to(torch.bfloat16), PROMPTS[2]
    with inference(model):
        decoder = Decoder(model, [prompt, prompt[:9]], prefill_chunk=32)
        decoder.append(torch.tensor([7, 8]))
        assert decoder.cache.rows[0].extents[0].slab.kv[0].dtype == torch.bfloat16
        ours = decoder.logits(0, VOCABULARY)
    expected, _ = decoded_alone(stock(model), prompt, 2, given=[7])
    exact, _ = decoded_alone(stock(model.float()), prompt, 2, given=[7])
    error = (ours[0] - exact[-1]).norm() / exact[-1].norm()
    assert error < 1.5 * (expected[-1].float() - exact[-1]).norm() / exact[-1].norm()
