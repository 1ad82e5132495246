"""The loss of packed sequences without gradients, by the ranks that share them, beside plain transformers'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.inference.scoring import Scores, document_batch, score_batch, score_batches, score_documents
from model.llama.config import llama_config
from model.llama.llama import build_llama
from model.memory_estimate.scoring import scoring_bytes, scoring_bytes_per_token
from testing.dense_loss import dense_nll
from testing.thread_ranks import run_in_threads
from tests.model.attention_groups import run_in_processes
from tests.model.inference.stock import GROUPED, small_llama, stock
from tests.model.peak_memory import Widths, peak_bytes
from tokenization.document import Document
from tokenization.loader.join import join_sequences
from tokenization.packing.pack import pack
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(50, 20, 22)
EDGES = (1, 8, 30, 100)


def two_modalities() -> Any:
    return build_llama(llama_config(GROUPED, VOCABULARY.sizes, 128, 1e4), seed=1)


def documents() -> list[Document]:
    """Of text that turns into codes, with targets from the third token on; the longest fills a sequence alone."""
    generator = np.random.default_rng(0)
    made = []
    for number, length in enumerate((128, 61, 40, 21, 9, 2)):
        tokens = generator.integers(3, 50, length).astype(np.int32)
        tokens[length // 2 :] = VOCABULARY["vision"].codes_to_ids(generator.integers(0, 20, length - length // 2))
        made.append(Document(f"{number}", "s", tokens, ((min(2, length - 1), length),)))
    return made


def sequences() -> list[Any]:
    return list(pack(documents(), 128, VOCABULARY, "vision-text"))


def expected() -> tuple[np.ndarray, np.ndarray]:
    """Nats and targets [M, n] over EDGES, of each document alone, in transformers' own model."""
    plain, ranges = stock(two_modalities()), [range(50), range(50, VOCABULARY.size)]
    nats, targets = np.zeros((2, 2, len(EDGES) - 1))
    for document in documents():
        ids = torch.from_numpy(document.tokens).long()
        with torch.inference_mode():
            hidden = plain.model(ids[None]).last_hidden_state[0]
        nll = dense_nll(hidden[:-1], plain.lm_head.weight, ids[1:], ranges).detach().numpy()
        for position in np.flatnonzero(document.loss_mask):
            place = np.searchsorted(EDGES, position, "right") - 1
            if 0 <= place < len(EDGES) - 1:
                modality = int(document.tokens[position] >= 50)
                nats[modality, place] += nll[position - 1]
                targets[modality, place] += 1
    return nats, targets


def score(exchange: Any, tile: int = 4096) -> Scores:
    # Two sequences end to end, of packed documents, and the others one by one.
    first, *others = sequences()
    total = score_batch(two_modalities(), join_sequences([first, others[0]]), exchange, EDGES, tile, chunk=7)
    return total + score_batches(two_modalities(), (join_sequences([one]) for one in others[1:]), exchange, EDGES)


def assert_expected(scores: Scores) -> None:
    nats, targets = expected()
    assert scores.modalities == ("text", "vision")
    np.testing.assert_array_equal(scores.targets, targets)
    np.testing.assert_allclose(scores.nll, nats, rtol=1e-5)


@pytest.mark.parametrize("tile", [11, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_packed_sequences_score_as_transformers_scores_each_document_alone(ranks, tile):
    results, _ = run_in_threads(lambda exchange: score(exchange, tile), ranks)
    for scores in results:
        assert_expected(scores)
        np.testing.assert_array_equal(scores.nll, results[0].nll)  # every rank has the same bits


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_score_as_transformers_does(ranks):
    for scores in run_in_processes(score, ranks):
        assert_expected(scores)


@pytest.mark.parametrize("ranks", [1, 3])
def test_documents_are_scored_by_position_whatever_their_length(ranks):
    generator = np.random.default_rng(3)
    whole = [generator.integers(0, 96, length) for length in (50, 1, 17)]
    plain, nats = stock(small_llama()), np.zeros(3)
    for ids in (torch.from_numpy(tokens)[None] for tokens in whole if len(tokens) > 1):
        with torch.inference_mode():
            log = plain(ids).logits[0, :-1].double().log_softmax(-1)
        nll = -log.gather(1, ids[0, 1:, None]).squeeze(1).numpy()
        nats += [nll[:9].sum(), nll[9:19].sum(), nll[19:39].sum()]
    for scores in run_in_threads(lambda group: score_documents(small_llama(), whole, group, (1, 10, 20, 40)), ranks)[0]:
        assert scores.targets.tolist() == [[18, 17, 20]]
        np.testing.assert_allclose(scores.nll[0], nats, rtol=1e-5)
        np.testing.assert_allclose(scores.nats_per_token, nats / [18, 17, 20], rtol=1e-5)


def test_scores_add_up_and_an_empty_bin_has_no_loss():
    one = score_documents(small_llama(), [np.arange(12)], edges=(1, 6, 500, 600))
    assert (one + one).of("text") == pytest.approx((2 * one.nll.sum(), 22))
    assert np.isnan(one.nats_per_token).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="other modalities or edges"):
        one + score_documents(small_llama(), [np.arange(12)])
    with pytest.raises(ValueError, match=r"\[1, 1\] of bins of positions do not ascend"):
        score_documents(small_llama(), [np.arange(12)], edges=(1, 1))


def test_neither_all_logits_nor_wide_rows_of_all_tokens_exist():
    model = build_llama(llama_config({**GROUPED, "intermediate_size": 56}, VOCABULARY.sizes, 128, 1e4), seed=1)
    with Widths() as widths:
        score_batch(model, join_sequences(sequences()[:1]), tile=16)
    assert VOCABULARY.size not in widths.seen
    assert 56 in widths.seen


CONTEXTS = (4096, 8192, 16384)
TILE, CHUNK = 256, 64


def peaks(group: Any, contexts: tuple[int, ...]) -> list[int]:
    """Peak bytes of scoring one document, by its length, beyond what was there before."""
    model = small_llama()
    found = []
    for context in contexts:
        batch = document_batch(np.arange(context) % 90)

        def once(batch: Any = batch) -> None:
            score_batch(model, batch, group, tile=TILE, chunk=CHUNK)

        once()
        found.append(peak_bytes(once))
    return found


@pytest.mark.slow
def test_peak_memory_is_linear_in_the_tokens_a_rank_holds():
    config = small_llama().config
    by_ranks = {1: [peaks(None, CONTEXTS)], 2: run_in_processes(peaks, 2, CONTEXTS)}
    for ranks, found in by_ranks.items():
        most = [scoring_bytes(config, 4, context // ranks, ranks, False, TILE, CHUNK) for context in CONTEXTS]
        token = scoring_bytes_per_token(config, 4, ranks, False)
        for of_rank in found:
            small, middle, large = of_rank
            assert abs((large - middle) / (2 * (middle - small)) - 1) < 0.05
            assert (large - small) / (CONTEXTS[-1] - CONTEXTS[0]) * ranks <= token
            assert all(peak <= bound for peak, bound in zip(of_rank, most))
