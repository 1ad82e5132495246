"""Layers of LWM's 7B on one card, forward and backward: tokens a second, MFU and memory from 8K to 1M tokens.

In: the model as the recipes train it (ring attention on one rank, activations recomputed, the MLP in tiles), in bf16,
with 32 kv heads as LWM has them and with 8. Out: at each context its seconds at two depths, the deeper as deep as time
and memory let it be, and what follows for all 32 layers. Nothing of an optimizer runs: see the training parts.

A context at which two layers outlast their time is extrapolated, and its rows say so. A layer's seconds are those of
its attention, measured alone for some of its heads, times the heads over them, and the rest, which grows with the
tokens: what a layer takes beside its attention at the longest context that was measured at two depths.
"""

from __future__ import annotations

import functools
import gc
import resource
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.explain import check_share, explained, floor, matrix_peak
from benchmarks.gpu.fast.attention import operations, seconds_alone
from benchmarks.gpu.fast.llama import Llama, difference_to_stock
from benchmarks.gpu.fast.products import counted_products
from benchmarks.gpu.fast.stand_in import RankAlone
from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.timing import seconds_of
from model.attention.plan.planner import plan_sequence
from model.llama.flops import peak_flops
from model.memory_estimate.activations import activation_bytes
from model.training.rank_batch import RankBatch
from model.training.settings import EngineSettings

MFU = 0.55
"""To reach at `FROM` tokens and more."""
FROM = 32768
CONTEXTS = (8192, 32768, 131072, 262144, 524288, 1048576)
LAYERS = 32
DEPTHS = (32, 16, 8, 4, 2)
SAME = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
"""Largest relative difference of a gradient to stock transformers'; of the loss a fiftieth."""
STEP = 5.0
"""Seconds that a step of the deeper of two depths may take; a single layer may take twice as many."""
ALL_HEADS = 65536
"""Tokens up to which all heads of the attention are measured."""
AGREE = 1.1
"""How far the extrapolation may lie from what is measured."""


@dataclass(frozen=True)
class Measured:
    """A context at one or two depths. layer: seconds of one more layer, None of one depth."""

    context: int
    depth: int
    seconds: float
    layer: float | None


class Attention:
    """Seconds of one layer's attention over one document, forward and backward, by a share of its heads."""

    def __init__(self, model: Llama, all_heads: int) -> None:
        self.heads, self.kv_heads, self.head_size = model.heads, model.kv_heads, model.head_size
        self._device, self._all_heads = model.device, all_heads
        self._known: dict[int, float] = {}

    def alone(self, context: int) -> RankAlone:
        """The share: fewer heads the longer the document, so that it takes no longer."""
        heads = max(1, int(self.heads * min(1.0, self._all_heads / context) ** 2))
        kv_heads = max(1, heads * self.kv_heads // self.heads)
        plan = plan_sequence(np.array([0, context]), 1)
        return RankAlone(plan, 0, heads, kv_heads, self.head_size, self._device)

    def seconds(self, context: int) -> float:
        """Of all heads, measured once."""
        if context not in self._known:
            alone = self.alone(context)
            share = alone.inputs[0].shape[1] / self.heads
            warm_up = int(context <= self._all_heads)
            self._known[context] = seconds_alone(alone, self._device, rounds=1, warm_up=warm_up).both / share
        return self._known[context]

    def reckoned(self, context: int) -> float:
        """Seconds of all heads, by those of a document that is quickly measured."""
        short = self._all_heads // 4
        return self.seconds(short) * (context / short) ** 2


def run(bench: Bench) -> None:
    """A model at a time, its contexts from the shortest."""
    for kv_heads in bench.size((32, 8), (4, 2)):
        model = Llama(bench, kv_heads, bench.size(LAYERS, 4))
        _Stack(bench, f"{kv_heads} kv heads", model).run(bench.size(CONTEXTS, (32, 64, 128, 1024)))
        del model
        _empty(bench)


class _Stack:
    def __init__(self, bench: Bench, name: str, model: Llama) -> None:
        self.bench, self.name, self.model = bench, name, model
        self.attention = Attention(model, bench.size(ALL_HEADS, 64))
        self.matrix_peak = matrix_peak(bench.device)
        on_paper = peak_flops(torch.cuda.get_device_name(bench.device)) if bench.on_cuda else None
        self.peak = on_paper or self.matrix_peak

    def run(self, contexts: Sequence[int]) -> None:
        self._check()
        measured: list[Measured] = []
        for context in contexts:
            if not self._is_late(context, 3 * STEP) and (one := self._measure(context)) is not None:
                measured.append(one)
        twice = [one for one in measured if one.layer is not None]
        self.bench.check(f"{self.name}: contexts measured at two depths", len(twice), at_least=1)
        self._whole_model(twice)
        for context in contexts:
            if twice and context > twice[-1].context and not self._is_late(context, STEP):
                self._extrapolate(twice[-1], context)

    def _is_late(self, context: int, needed: float) -> bool:
        if late := self.bench.left < needed and not self.bench.tiny:
            self.bench.skip("out of time", f"{self.name}, {context} tokens")
        return late

    def _check(self) -> None:
        """What is timed is right, and what is reckoned is done."""
        bench, model = self.bench, self.model
        tokens = bench.size(6144, 64)
        loss, gradient = difference_to_stock(model, tokens)
        bench.check(f"{self.name}: loss beside stock transformers'", loss, at_most=SAME[model.dtype] / 50)
        bench.check(f"{self.name}: gradient beside stock transformers'", gradient, at_most=SAME[model.dtype])
        batch = model.batch(tokens)
        counted = counted_products(lambda: model.step(batch))
        # Of a layer's products the backward runs all but the MLP's last again, and the head's.
        what = f"{self.name}: matrix products counted over those reckoned"
        bench.check(what, counted / model.flops(tokens, pairs=0), at_least=1, at_most=4 / 3)

    def _measure(self, context: int) -> Measured | None:
        """At two depths, of one layer, or None where that takes too long or too much memory."""
        self.model.model.zero_grad(set_to_none=True)
        _empty(self.bench)
        batch = self.model.batch(context)
        depths = (d for d in DEPTHS if d <= self.model.layers and self._fits(batch, d))
        deep = next((d for d in depths if self._reckoned(context, d) <= STEP), 1)
        layer: float | None = None
        if deep > 1:
            shallow = self._seconds(batch, deep // 2, warm_up=1)
            seconds = self._seconds(batch, deep)
            layer = (seconds - shallow) / (deep - deep // 2)
        elif self._fits(batch, 1) and self._reckoned(context, 1) <= min(2 * STEP, self.bench.left / 4):
            seconds = self._seconds(batch, 1)
        else:
            return None
        self._say(batch, context, deep, seconds)
        return Measured(context, deep, seconds, layer)

    def _fits(self, batch: RankBatch, depth: int) -> bool:
        if not self.bench.on_cuda:
            return batch.plan.n_tokens < 1024  # so that a rehearsal extrapolates too
        self.model.depth = depth
        settings = EngineSettings(precision="bf16", memory=self.model.memory)
        acts = activation_bytes(self.model.config, self.model.dtype.itemsize, batch.plan, settings, on_cuda=True)
        work = max(acts.loss + acts.final, acts.mlp, acts.attention) + acts.batch
        held = torch.cuda.memory_allocated() + self.model.weight_bytes() + depth * acts.kept_layer
        return held + work < 0.92 * torch.cuda.mem_get_info()[1]

    def _reckoned(self, context: int, depth: int) -> float:
        """Seconds of a step, near enough to choose a depth by: products at 0.7 of the peak, a third of them twice."""
        self.model.depth = depth
        products = self.model.flops(context, pairs=0) * 4 / 3 / (0.7 * self.matrix_peak)
        return products + depth * self.attention.reckoned(context)

    def _seconds(self, batch: RankBatch, depth: int, warm_up: int = 0) -> float:
        """Of a step; the median of three where they are short."""
        self.model.depth = depth
        if self.bench.on_cuda:
            torch.cuda.reset_peak_memory_stats()

        def seconds(rounds: int, warm_up: int) -> float:
            return seconds_of(lambda: self.model.step(batch), self.bench.device, rounds, warm_up)

        first = seconds(1, warm_up)
        return first if first > STEP / 4 else seconds(3, 0)

    def _say(self, batch: RankBatch, context: int, depth: int, seconds: float) -> None:
        name = f"{self.name}, {context} tokens, {depth} of its layers"
        flops = self.model.flops(context)
        self.bench.figures(name, **self._rates(context, seconds), **_memory(self.bench))
        check_share(self.bench, name, flops / seconds / self.matrix_peak)
        if context >= self.bench.size(FROM, 0):
            why = functools.partial(self._explain, batch, context)
            self.bench.goal(f"{name}: MFU", flops / seconds / self.peak, at_least=MFU, explain=why)

    def _rates(self, context: int, seconds: float) -> Row:
        """Of a step of the layers that run."""
        flops, attention = self.model.flops(context), self.model.flops(context) - self.model.flops(context, pairs=0)
        return {
            "seconds": seconds,
            "tokens_per_second": context / seconds,
            "mfu": flops / seconds / self.peak,
            "share_of_matrix_peak": flops / seconds / self.matrix_peak,
            "attention_share_of_operations": attention / flops,
        }

    def _explain(self, batch: RankBatch, context: int) -> Row:
        """Of one layer where that is quick, else of the attention's sample."""
        self.model.depth = 1
        if self._reckoned(context, 1) < STEP / 2:
            least = 3 * self.model.weight_bytes()  # read twice, and the gradients written
            explained_by = explained(
                lambda: self.model.step(batch), batch.tokens.device, self.model.flops(context), least
            )
            return {"of": "a step of one layer", **explained_by}
        alone = self.attention.alone(context)
        work = operations(alone.n_pairs, alone.inputs[0].shape[1], self.model.head_size).both
        of = f"the attention of {alone.inputs[0].shape[1]} heads"
        return {"of": of, **explained(lambda: alone.backward(alone.forward()), batch.tokens.device, work, 0)}

    def _whole_model(self, twice: Sequence[Measured]) -> None:
        """What a step of all layers takes where it was measured at two depths, by what one more layer took."""
        self.model.depth = self.model.layers
        for one in twice:
            assert one.layer is not None
            if one.depth < self.model.layers:
                seconds = one.seconds + (self.model.layers - one.depth) * one.layer
                what = f"{self.name}, {one.context} tokens, all layers, extrapolated from {one.depth}"
                self.bench.figures(what, **self._rates(one.context, seconds))
        if len(twice) > 1:
            assert twice[-2].layer is not None
            reckoned = self._layer(twice[-1], twice[-2].context) / twice[-2].layer
            what = f"{self.name}: a layer at {twice[-2].context} tokens extrapolated over measured"
            self.bench.goal(what, reckoned, at_least=1 / AGREE, at_most=AGREE)

    def _layer(self, base: Measured, context: int) -> float:
        """Seconds of a layer at another context than its base: its attention's, and the rest by the tokens."""
        assert base.layer is not None
        rest = (base.layer - self.attention.seconds(base.context)) / base.context
        return rest * context + self.attention.seconds(context)

    def _extrapolate(self, base: Measured, context: int) -> None:
        self.model.depth = self.model.layers
        assert base.layer is not None
        outside = (base.seconds - base.depth * base.layer) / base.context
        attention = self.attention.seconds(context) * self.model.layers
        seconds = outside * context + self._layer(base, context) * self.model.layers
        name = f"{self.name}, {context} tokens, all layers, extrapolated"
        rates = self._rates(context, seconds)
        self.bench.figures(name, **rates, attention_share_of_seconds=attention / seconds)
        floors = floor(self.bench.device, self.model.flops(context))
        self.bench.goal(f"{name}: MFU", rates["mfu"], at_least=MFU, explain=lambda: floors)


def _memory(bench: Bench) -> Row:
    """The peaks since the last reset on the card, and of the process on the host, in GiB."""
    host = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if not bench.on_cuda:
        return host
    peaks = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    return {**host, **{name: size / 2**30 for name, size in peaks.items()}}


def _empty(bench: Bench) -> None:
    """Give back what nothing holds, so that a longer context's blocks find room in one piece."""
    if bench.on_cuda:
        gc.collect()
        torch.cuda.empty_cache()
