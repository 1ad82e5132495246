"""Held-out loss and the unigram models beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.config import llama_config
from model.llama import build_llama
from pipelines.evaluate.heldout import cross_entropy, entropy, score_sequences, target_counts
from tokenization.document import Document
from tokenization.packing import pack
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary(50, 20, 22)
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def documents() -> list[Document]:
    generator = np.random.default_rng(0)
    made = []
    for number, length in enumerate((30, 21, 9)):
        tokens = generator.integers(3, 50, length).astype(np.int32)
        tokens[length // 2 :] = VOCABULARY.codes_to_ids(generator.integers(0, 20, length - length // 2))
        made.append(Document(f"d{number}", "s", tokens, ((2, length),)))
    return made


def test_scores_of_packed_documents_are_those_of_each_document_alone_within_its_modality() -> None:
    model = build_llama(llama_config(LLAMA, VOCABULARY.size, 40, 1e4, text_size=50), seed=1).eval()
    sums = score_sequences(model, pack(documents(), 40, VOCABULARY, "vision-text"))
    nats, targets = {"text": 0.0, "vision": 0.0}, {"text": 0, "vision": 0}
    stock = build_llama(llama_config(LLAMA, VOCABULARY.size, 40, 1e4, text_size=50), seed=1, attention="eager").eval()
    for document in documents():
        with torch.no_grad():
            logits = stock(torch.from_numpy(document.tokens).long()[None]).logits[0].double()
        for place in range(2, len(document)):
            label = int(document.tokens[place])
            modality, ids = ("vision", slice(50, None)) if label >= 50 else ("text", slice(0, 50))
            nats[modality] += float(logits[place - 1, ids].logsumexp(0) - logits[place - 1, label])
            targets[modality] += 1
    for modality in nats:
        assert sums[f"{modality}_targets"] == targets[modality]
        assert sums[f"{modality}_nll"] == pytest.approx(nats[modality], rel=1e-5)


def test_targets_are_counted_by_id_only_where_they_carry_loss() -> None:
    counts = target_counts(pack(documents(), 40, VOCABULARY, "vision-text"), VOCABULARY)
    expected = np.bincount(np.concatenate([d.tokens[2:] for d in documents()]), minlength=VOCABULARY.size)
    np.testing.assert_array_equal(counts, expected)


def test_entropy_is_the_best_that_any_unigram_model_reaches() -> None:
    generator = np.random.default_rng(1)
    counts = generator.integers(0, 9, 40)
    tokens = np.repeat(np.arange(40), counts)
    frequencies = counts / counts.sum()
    assert entropy(counts) == pytest.approx(-np.log(frequencies[tokens]).mean())
    assert entropy(counts) < cross_entropy(counts, counts) < cross_entropy(counts, counts[::-1])
    assert cross_entropy(counts, counts * 10**9) == pytest.approx(entropy(counts), abs=1e-6)


def test_a_unigram_model_that_has_seen_nothing_is_uniform_over_the_modality() -> None:
    assert cross_entropy(np.array([0, 3, 1]), np.zeros(3)) == pytest.approx(np.log(3))
