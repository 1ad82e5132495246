"""Candidate answers after shared prompts: the log-probabilities of whole sequences in plain transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.inference.answers import AnswerScores, score_answers
from model.inference.kv_decoder import Decoder
from model.llama.llama import inference
from testing.thread_ranks import run_in_threads
from tests.model.inference.stock import VOCABULARY, small_llama, stock

GENERATOR = np.random.default_rng(7)
FILM, *QUESTIONS = (GENERATOR.integers(0, VOCABULARY, length) for length in (90, 5, 1))
ANSWERS = [[GENERATOR.integers(0, VOCABULARY, length) for length in lengths] for lengths in ((4, 1, 33), (2, 7))]


def ask(exchange: Any) -> tuple[list[AnswerScores], torch.Tensor]:
    model = small_llama()
    with inference(model):
        film = Decoder(model, [FILM], prefill_chunk=16, group=exchange)
        asked = film.fork([0, 0])
        asked.extend(QUESTIONS)
        before = asked.logits(0, VOCABULARY), asked.lengths
        found = score_answers(asked, ANSWERS)
        assert asked.lengths == before[1]
        assert torch.equal(asked.logits(0, VOCABULARY), before[0])
        return found, score_answers(asked, ANSWERS)[0].log_probability


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_answers_behind_one_prefill_score_as_whole_sequences_in_transformers(ranks):
    plain = stock(small_llama())
    for found, again in run_in_threads(ask, ranks)[0]:
        np.testing.assert_array_equal(found[0].log_probability, again)
        for scores, question, answers in zip(found, QUESTIONS, ANSWERS, strict=True):
            assert scores.tokens.tolist() == [len(answer) for answer in answers]
            for ours, answer in zip(scores.log_probability, answers, strict=True):
                ids = torch.from_numpy(np.concatenate((FILM, question, answer)))
                with torch.inference_mode():
                    log = plain(ids[None]).logits[0, :-1].double().log_softmax(-1)
                expected = log.gather(1, ids[1:, None])[-len(answer) :].sum()
                assert ours == pytest.approx(float(expected), rel=1e-5)
            np.testing.assert_allclose(scores.per_token, scores.log_probability / scores.tokens)


def test_rows_without_candidates_are_refused():
    model = small_llama()
    with inference(model):
        decoder = Decoder(model, [FILM[:5]])
        for answers in ([], [[]], [[FILM[:0]]], ANSWERS):
            with pytest.raises(ValueError, match="1 rows need as many lists of answers"):
                score_answers(decoder, answers)
