"""A cache in 8 bits: within its formats' error of the exact one, half of bf16's memory, never converted as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.allocations import peak_bytes
from model.inference import kv_cache
from model.inference.cached_attention import attend_stored
from model.inference.kv_cache import KVCache, KVShape, Row, store
from model.inference.kv_decoder import Decoder
from model.inference.scaled_numbers import DTYPES, CacheFormat, scaled, unscaled
from model.llama.llama import inference
from testing.thread_ranks import run_in_threads
from tests.model.inference.stock import VOCABULARY, small_llama
from tests.model.inference.test_sharded import PROMPTS

FORMATS: list[CacheFormat] = ["int8", "fp8"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_errs_by_no_more_than_its_format(form, dtype):
    x = torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:5] *= 1e4
    x[5:10] *= 1e-6
    x[10:12] = 0
    numbers, scales = scaled(x, DTYPES[form])
    assert numbers.element_size() == 1
    error = (unscaled(numbers, scales, torch.float32) - x.float()).abs()
    largest = x.float().abs().amax(-1, keepdim=True)
    step = largest / 254 if form == "int8" else x.float().abs() / 16 + largest / 448 * 2**-10
    assert (error <= step * (1 + 1e-5)).all()
    if form == "int8":
        assert error.max() > 0.9 * step.max()  # it has no more bits than it says


def test_queries_meet_what_is_stored_tile_after_tile(monkeypatch):
    monkeypatch.setattr(kv_cache, "MAX_CONVERTED", 7)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 30, 2, 8, generator=generator)
    q = torch.randn(3, 4, 8, generator=generator)
    for form in FORMATS:
        cache = KVCache(KVShape(1, 2, 8), DTYPES[form], torch.device("cpu"), [Row(), Row()])
        cache.reserve([20, 10])
        store(cache.claim([(0, 0, 20), (1, 20, 30)]), 0, k, v)
        out, _ = attend_stored(q, cache.reads([(0, 2), (1, 1)], 2), 0, 2, 0.3)
        keys, values = (unscaled(*scaled(x, DTYPES[form]), torch.float32) for x in (k, v))
        for rows, slots in ((slice(0, 2), slice(0, 20)), (slice(2, 3), slice(20, 30))):
            ours, theirs = q[rows], (x[slots].repeat_interleave(2, dim=1) for x in (keys, values))
            expected = dense(ours, *theirs, scale=0.3)
            torch.testing.assert_close(out[rows], expected, rtol=0, atol=1e-6)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    weights = torch.einsum("thd,nhd->htn", q * scale, k).softmax(-1)
    return torch.einsum("htn,nhd->thd", weights, v)


def answered(exchange: Any, form: CacheFormat | None) -> tuple[torch.Tensor, int]:
    """Logits of given tokens after a shared prefix, two questions and a dropped row; the bytes of the cache."""
    model = small_llama()
    with inference(model):
        decoder = Decoder(model, [PROMPTS[2]], prefill_chunk=16, room=8, group=exchange, cache=form).fork([0, 0])
        decoder.extend([PROMPTS[0], PROMPTS[4]])
        logits = [decoder.logits(0, VOCABULARY)]
        for step in range(5):
            if step == 2:
                decoder.keep([1])
            decoder.append(torch.full((len(decoder),), 7))
            logits.append(decoder.logits(0, VOCABULARY))
        return torch.cat(logits), decoder.cache.nbytes


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.02), ("fp8", 0.1)])
def test_logits_are_near_the_exact_ones_on_any_number_of_ranks(form, bound):
    exact, n_exact = answered(None, None)
    for ranks in (1, 3):
        results = run_in_threads(lambda exchange: answered(exchange, form), ranks)[0]
        for logits, _ in results:
            torch.testing.assert_close(logits, results[0][0], rtol=0, atol=0)
            error = (logits - exact).norm() / exact.norm()
            assert 1e-4 < error < bound
    _, n_scaled = answered(None, form)
    assert n_scaled * 4 * 8 == n_exact * (8 + 4)  # a head's 8 fp32 numbers became 8 of a byte and a scale


@pytest.mark.parametrize("form", FORMATS)
def test_a_token_converts_a_tile_and_not_the_cache(form, monkeypatch):
    monkeypatch.setattr(kv_cache, "MAX_CONVERTED", 256)
    model = small_llama()
    allocated = []
    for context in (1024, 4096):
        with inference(model):
            decoder = Decoder(model, [np.arange(context) % 90], prefill_chunk=512, room=8, cache=form)
            ids = torch.zeros(1, dtype=torch.long)
            decoder.append(ids)
            allocated.append(peak_bytes(lambda decoder=decoder, ids=ids: decoder.append(ids)))
    assert allocated[1] < 1.1 * allocated[0]
