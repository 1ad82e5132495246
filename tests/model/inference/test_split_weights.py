"""Matrices split over the ranks that share the cache: transformers' numbers, by a share of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.inference.kv_decoder import Decoder
from model.inference.split_weights import split_llama
from model.llama.hf_weights import StoredWeights, stored_config
from model.llama.initial_weights import RandomWeights
from model.llama.llama import inference
from storage.errors import UserError
from testing.thread_ranks import run_in_threads
from tests.model.attention_groups import run_in_processes
from tests.model.inference.stock import VOCABULARY, decoded_alone, small_llama, stock
from tests.model.inference.test_sharded import LOGITS, PROMPTS, TOKENS, assert_as_alone


def split_greedy(group: Any, folder: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits [n, B, V] and ids [n, B] of greedy tokens after each prompt, and the parameters that this rank holds."""
    model = split_llama(StoredWeights(stored_config(folder), lambda: folder), group, torch.float32)
    logits, chosen = [], []
    with inference(model):
        decoder = Decoder(model, PROMPTS, prefill_chunk=40)
        for _ in range(TOKENS):
            logits.append(decoder.logits(0, VOCABULARY))
            chosen.append(decoder.agreed(logits[-1].argmax(-1)))
            decoder.append(chosen[-1])
    return torch.stack(logits), torch.stack(chosen), sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small_llama().save_pretrained(path)
    return path


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_split_weights_give_what_transformers_gives(ranks, folder):
    results, _ = run_in_threads(lambda exchange: split_greedy(exchange, folder), ranks)
    whole = sum(p.numel() for p in small_llama().parameters())
    norms = sum(p.numel() for p in small_llama().parameters() if p.dim() == 1)
    assert sum(held - norms for _, _, held in results) == whole - norms
    for logits, chosen, held in results:
        assert_as_alone(logits, chosen, PROMPTS)
        torch.testing.assert_close(logits, results[0][0], rtol=0, atol=0)  # every rank has the same bits
        assert held - norms < 1.05 * (whole - norms) / ranks


@pytest.mark.slow
def test_processes_give_what_transformers_gives(folder):
    for logits, chosen, _ in run_in_processes(split_greedy, 2, folder):
        assert_as_alone(logits, chosen, PROMPTS)


def test_a_prompt_has_the_same_bits_as_with_whole_weights(folder):
    def prefilled(exchange: Any, split: bool) -> torch.Tensor:
        model = small_llama()
        if split:
            model = split_llama(RandomWeights(model.config, 1), exchange, torch.float32)
        with inference(model):
            return Decoder(model, PROMPTS, prefill_chunk=40, group=exchange).hidden

    whole, split = (run_in_threads(lambda e, split=split: prefilled(e, split), 2)[0][0] for split in (False, True))
    torch.testing.assert_close(split, whole, rtol=0, atol=0)


def test_rows_fork_extend_and_are_dropped(folder):
    def ask(exchange: Any) -> torch.Tensor:
        model = split_llama(StoredWeights(stored_config(folder), lambda: folder), exchange, torch.float32)
        with inference(model):
            asked = Decoder(model, [PROMPTS[4]]).fork([0, 0])
            asked.extend([PROMPTS[0], PROMPTS[3]])
            asked.keep([1])
            asked.append(torch.tensor([5]))
            return asked.logits(20, 70)[0]

    expected, _ = decoded_alone(stock(small_llama()), np.concatenate((PROMPTS[4], PROMPTS[3])), 2, given=[5])
    for logits in run_in_threads(ask, 3)[0]:
        torch.testing.assert_close(logits, expected[-1, 20:70], rtol=0, atol=LOGITS)


class CountedWeights(StoredWeights):
    """Stored weights that know how many numbers have been read."""

    n_read = 0

    def read(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        return self._counted(super().read(name))

    def read_part(self, name: str, dim: int, part: range) -> torch.Tensor:
        """See `Weights`."""
        return self._counted(super().read_part(name, dim, part))

    def _counted(self, read: torch.Tensor) -> torch.Tensor:
        self.n_read += read.numel()
        return read


def test_a_rank_reads_its_share_of_the_files_alone(folder):
    def read(exchange: Any) -> tuple[int, int]:
        weights = CountedWeights(stored_config(folder), lambda: folder)
        model = split_llama(weights, exchange, torch.float32)
        return weights.n_read, sum(p.numel() for p in model.parameters())

    for n_read, held in run_in_threads(read, 3)[0]:
        assert n_read == held


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_a_stored_weight_is_that_part(folder, dim):
    weights, name = StoredWeights(stored_config(folder), lambda: folder), "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(
        weights.read_part(name, dim, range(5, 17)), weights.read(name).narrow(dim, 5, 12), rtol=0, atol=0
    )


def test_a_split_model_says_that_it_runs_in_a_decoder_alone():
    model = split_llama(RandomWeights(small_llama().config, 1), None, torch.float32)
    with pytest.raises(TypeError, match="in a Decoder"):
        model(torch.zeros(1, 3, dtype=torch.long))
    biased = small_llama().config
    biased.mlp_bias = True
    with pytest.raises(UserError, match="biases cannot be split"):
        split_llama(RandomWeights(biased, 1), None, torch.float32)
