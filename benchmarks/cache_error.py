"""`ringworld bench cache MODEL`: what a cache in 8 bits changes of a model's attention and of its next tokens.

In: the folder of a trained model, a context. Out: by format the errors against a cache in the model's dtype. The tokens
are the model's own text, drawn at temperature 1, so that queries and keys are those that it was trained for;
each format then prefills the same context in four chunks and is given the same tokens after it.

    attention  the largest relative error of a layer's output, the queries being the exact model's
    logits     their relative error; the KL divergence from the exact next-token distribution, in nats; how often the
               likeliest token is the same
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.machine import machine
from benchmarks.tables import print_tables
from model.inference.cached_attention import attend_stored
from model.inference.forward import WholeWeights, final_hidden
from model.inference.kv_cache import KVCache, Row, store
from model.inference.kv_decoder import Decoder
from model.inference.scaled_numbers import DTYPES, CacheFormat
from model.llama.config import modality_ranges
from model.llama.llama import inference, load_llama


@dataclass(frozen=True)
class Settings:
    """One run. model: a Hugging Face folder. context, tokens: of the prompt, and after it."""

    model: Path
    context: int = 2048
    tokens: int = 64
    seed: int = 0


def cache_report(settings: Settings) -> dict:
    """Every format beside the exact cache. Raises UserError where there is no such model."""
    model = load_llama(settings.model)
    with inference(model):
        ids = _drawn(model, settings)
        exact, cpu = _given(model, ids, settings, None)
        rows: dict[str, dict] = {"exact": {"cpu_ms_per_token": cpu, "bytes_per_token": _bytes_per_token(model, None)}}
        for form in DTYPES:
            logits, cpu = _given(model, ids, settings, form)
            rows[form] = {
                "attention_relative_error": round(_attention_error(model, ids, settings, form), 6),
                "logits_relative_error": round(float((logits - exact).norm() / exact.norm()), 6),
                "kl_nats": round(_divergence(exact, logits), 8),
                "same_likeliest": round(float((logits.argmax(-1) == exact.argmax(-1)).double().mean()), 4),
                "bytes_per_token": _bytes_per_token(model, form),
                "cpu_ms_per_token": cpu,
            }
    settings_row = asdict(settings) | {"model": str(settings.model)}
    return {"benchmark": "cache", "settings": settings_row, "machine": machine(), "formats": rows}


def print_cache(report: dict) -> None:
    """A table by format."""
    names = list(report["formats"]["int8"])
    table = Table(title=f"A cache in 8 bits, after {report['settings']['context']} tokens")
    for name in ("format", *names):
        table.add_column(name.replace("_", " "), justify="right")
    for form, row in report["formats"].items():
        table.add_row(form, *(f"{row[name]:g}" if name in row else "" for name in names))
    print_tables(table)


def _text(model: LlamaForCausalLM) -> range:
    return next(iter(modality_ranges(model.config).values()))


def _drawn(model: LlamaForCausalLM, settings: Settings) -> Tensor:
    """int64 [context + tokens] of the model's own text."""
    generator, text = torch.Generator().manual_seed(settings.seed), _text(model)
    ids = [torch.tensor([model.config.bos_token_id])]
    decoder = Decoder(model, [ids[0].numpy()], room=settings.context + settings.tokens)
    while len(ids) < settings.context + settings.tokens:
        ids.append(torch.multinomial(decoder.logits(text.start, text.stop).softmax(-1), 1, generator=generator)[0])
        decoder.append(ids[-1])
    return torch.cat(ids)


def _given(model: LlamaForCausalLM, ids: Tensor, settings: Settings, form: CacheFormat | None) -> tuple[Tensor, float]:
    """Logits [tokens, n] of what follows the context, and ms of the processor for each of these tokens."""
    text = _text(model)
    decoder = _prefilled(model, ids, settings, form, chunk=-(-settings.context // 4))
    logits = []
    start = time.process_time()
    for token in ids[settings.context :]:
        logits.append(decoder.logits(text.start, text.stop)[0])
        decoder.append(token[None])
    return torch.stack(logits), round((time.process_time() - start) / settings.tokens * 1e3, 3)


def _prefilled(
    model: LlamaForCausalLM, ids: Tensor, settings: Settings, form: CacheFormat | None, chunk: int
) -> Decoder:
    prompt = ids[: settings.context].numpy()
    return Decoder(model, [prompt], prefill_chunk=chunk, room=settings.tokens, cache=form)


def _attention_error(model: LlamaForCausalLM, ids: Tensor, settings: Settings, form: CacheFormat) -> float:
    """The largest relative error of a layer's output over exact queries, of one token after the context."""
    exact = _prefilled(model, ids, settings, None, chunk=settings.context).cache
    coarse = KVCache(exact.shape, DTYPES[form], exact.device, [Row()])
    coarse.reserve([settings.context])
    before = coarse.claim([(0, 0, settings.context)])
    heads_per_kv = model.config.num_attention_heads // exact.shape.kv_heads
    slab, errors = exact.rows[0].extents[0].slab, []
    for layer in range(exact.shape.layers):
        store(before, layer, *slab.read(layer, range(settings.context), model.dtype))
    reads = [cache.reads([(0, 1)], heads_per_kv) for cache in (exact, coarse)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = model.model.layers[layer].self_attn.scaling
        out, other = (attend_stored(q, read, layer, exact.shape.kv_heads, scale)[0] for read in reads)
        errors.append(float((other - out).norm() / out.norm()))
        return out.to(q.dtype)

    token = ids[settings.context : settings.context + 1]
    final_hidden(model, token, torch.tensor([settings.context]), attend, WholeWeights(model))
    return max(errors)


def _divergence(exact: Tensor, logits: Tensor) -> float:
    """The mean KL divergence of the coarse distributions from the exact ones, nats."""
    p, q = exact.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _bytes_per_token(model: LlamaForCausalLM, form: CacheFormat | None) -> int:
    decoder = Decoder(model, [torch.zeros(1, dtype=torch.long).numpy()], room=99, cache=form)
    return decoder.cache.nbytes // 100
