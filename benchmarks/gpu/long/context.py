"""The longest training context of one card: what `ringworld plan --memory` predicts, held against real steps.

A step of the 7B over 700K tokens computes for an hour; its memory does not take the hour to be known. It is a sum of
bytes by shape: linear in the tokens, and in the layers. So the engine is run as it trains (real widths, bf16, exact
attention, forward, backward and the optimizer's step, all that can be offloaded on the host) with few layers, at
several contexts. Each peak is held against the prediction for that very model, within WITHIN. The last context fills
most of the card: there the layer at work takes what it would in a model of 32, whose other layers wait on the host.

The longest context of 32 layers is then reckoned twice, by the plan, and by a plane through the peaks measured at two
depths and two contexts; both have to agree. It is an extrapolation and named one. What it asks of the host, where 20
bytes a parameter and each layer's input wait, is said beside it, and what smaller hosts would allow, for some of which
the optimizer stays on the card.

A context is one document up to ONE_DOCUMENT tokens and documents of that length beyond: a peak does not depend on the
documents (`tests/model/memory_estimate/test_activations.py`), a step's time does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.allocations import peak_bytes
from benchmarks.gpu.part import Bench
from model.attention.plan.planner import plan_sequence
from model.layers.memory_settings import MemorySettings
from model.llama.config import llama_config
from model.llama.flops import step_flops
from model.llama.initial_weights import Weights, weight_shapes
from model.llama.sizes import PRESETS
from model.memory_estimate.plan import MemoryPlan, plan_memory
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import build_mesh
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from model.training.settings import EngineSettings
from tokenization.loader.batch import MicroBatch

GIB = 2**30
WITHIN = 0.05
REHEARSED = 0.15
"""The same on a CPU, whose kernels take other copies and whose device is the host."""
HOST_WITHIN = 0.1
LAYERS = 32
IDS = {"text": 32_000, "vision": 8_448}
MODELS: dict[str, dict[str, int]] = {
    "LWM-7B, 32 heads of keys": PRESETS["7B"],
    "8B, 8 heads of keys": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
TINY_IDS = {"text": 80, "vision": 40}
UNFILLED = "8B, 8 heads of keys"
"""Whose last context is left out, for its time."""
OFFLOADED = MemorySettings("full", offload_activations=True, mlp_tile=4096, offload_optimizer=True)
"""All that waits is on the host: the longest context where the host is large enough."""
ON_CARD = MemorySettings("full", offload_activations=True, mlp_tile=4096)
"""The optimizer on the card: the longest where the host has room for activations alone."""
KEPT = MemorySettings("full", mlp_tile=4096, offload_optimizer=True)
"""Activations on the card, the optimizer on the host."""
ROOM = 2 * GIB
"""Of the card, left to the CUDA runtime and the allocator's fragments."""
HOSTS = (128, 256, 512)
"""GiB of memory beside a card, with which a longest context is predicted."""
STEP = 4096
"""Contexts are multiples of it."""
ONE_DOCUMENT = 65_536
FILLED = 0.7
"""Share of the card that the last context takes."""


def run(bench: Bench) -> None:
    """Of each model: the longest contexts predicted, peaks measured at two depths, and the longest extrapolated."""
    if bench.on_cuda:  # libraries and NCCL are loaded before the host's memory is looked at
        warm = Steps(Study(bench, "warm-up", TINY, _settings(OFFLOADED)), 1)
        warm.start()
        warm.end()
    for name, sizes in bench.size(MODELS, {"tiny": TINY}).items():
        _of_model(Study(bench, name, sizes, _settings(OFFLOADED)), filling=name != UNFILLED)


def _of_model(study: Study, filling: bool) -> None:
    """filling: also a context that takes most of the card."""
    bench = study.bench
    contexts, (few, more) = bench.size((65_536, 196_608), (2048, 5120)), bench.size((2, 4), (2, 10))
    _predict(study)
    full = longest(
        lambda tokens: study.peak(tokens, few) <= bench.size(FILLED, 0.35) * card(bench), bench.size(STEP, 64)
    )
    first = _measure(study, few, (*contexts, full) if filling else contexts, host=filling)
    second = _measure(study, more, contexts)
    peaks = {few: {tokens: peak for tokens, peak in first.items() if tokens in contexts}, more: second}
    if all(len(found) == len(contexts) for found in peaks.values()):
        _extrapolate(study, peaks)


@dataclass(frozen=True)
class Study:
    """A model of which contexts are measured. sizes: of all its layers."""

    bench: Bench
    name: str
    sizes: dict[str, int]
    settings: EngineSettings

    def config(self, layers: int = LAYERS) -> LlamaConfig:
        """Of so many of its layers."""
        ids = self.bench.size(IDS, TINY_IDS)
        return llama_config({**self.sizes, "num_hidden_layers": layers}, ids, 2**20, 5e7)

    def plan(self, tokens: int, layers: int = LAYERS) -> MemoryPlan:
        """What a step is predicted to take."""
        sequence = plan_sequence(_bounds(tokens, self.bench), 1)
        return plan_memory(self.config(layers), self.settings, sequence, 1, on_cuda=self.bench.on_cuda)

    def peak(self, tokens: int, layers: int = LAYERS) -> int:
        """Bytes of the device at its peak; of a CPU, which is its own host, with what waits there."""
        plan = self.plan(tokens, layers)
        if self.bench.on_cuda:
            return plan.peak
        step = plan.on_host.get("update", {}).get("the optimizer's step", 0)
        return max(total + waiting(plan) + (step if at == "update" else 0) for at, total in plan.moments.items())

    def longest(self, host: int | None = None) -> int:
        """Tokens of the longest context of all layers; host: its bytes, None for as many as it takes."""

        def fits(tokens: int) -> bool:
            on_host = host is None or waiting(self.plan(tokens)) <= host
            return on_host and self.peak(tokens) <= card(self.bench)

        return longest(fits, self.bench.size(STEP, 64))


def waiting(plan: MemoryPlan) -> int:
    """Bytes on the host throughout training, without checkpoints."""
    return sum(size for part, size in plan.on_host["training"].items() if part != "a checkpoint being written")


def longest(fits: Callable[[int], bool], step: int) -> int:
    """The most tokens, a multiple of `step`, that fit; 0 where none do."""
    low, high = 0, 2**12
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _settings(memory: MemorySettings) -> EngineSettings:
    return EngineSettings(zero=3, precision="bf16", memory=memory)


def card(bench: Bench) -> int:
    """Bytes of the card that training may take; in a rehearsal a number."""
    return torch.cuda.get_device_properties(bench.device).total_memory - ROOM if bench.on_cuda else 80 * 2**20


def _bounds(tokens: int, bench: Bench) -> np.ndarray:
    """cu_seqlens of so many tokens."""
    return np.unique(np.r_[np.arange(0, tokens, bench.size(ONE_DOCUMENT, 1024)), tokens]).astype(np.int32)


# --- Predicted ---


def _predict(study: Study) -> None:
    """The longest contexts of all layers: by the card alone, and by the card and hosts of some sizes."""
    by_card = study.longest()
    ways = [replace(study, settings=_settings(memory)) for memory in (OFFLOADED, KEPT, ON_CARD)]
    by_host = {str(gib): max(way.longest(gib * GIB) for way in ways) for gib in HOSTS}
    study.bench.figures(
        f"{study.name}: longest context of {LAYERS} layers, predicted",
        tokens=by_card,
        host_gib_needed=round(waiting(study.plan(by_card)) / GIB, 1),
        tokens_by_host_gib=by_host,
        card_gib=round(card(study.bench) / GIB, 1),
        host_gib=round(psutil.virtual_memory().total / GIB, 1),
    )


def _extrapolate(study: Study, peaks: dict[int, dict[int, int]]) -> None:
    """The longest context by a plane through what was measured, against the plan's. peaks: by layers and tokens."""
    bench = study.bench
    by_plane = longest(lambda tokens: plane(peaks, LAYERS, tokens) <= card(bench), bench.size(STEP, 64))
    within = WITHIN if bench.on_cuda else 2 * REHEARSED
    what = f"{study.name}: longest context extrapolated from measured peaks to {LAYERS} layers, over the predicted"
    bench.check(what, by_plane / study.longest(), at_least=1 - within, at_most=1 + within)
    bench.figures(f"{study.name}: longest context of {LAYERS} layers, extrapolated", tokens=by_plane)


def plane(peaks: dict[int, dict[int, int]], layers: int, tokens: int) -> float:
    """A peak by those of two depths at two contexts: linear in the layers, and at each depth in the tokens."""

    def line(points: dict[int, float], at: int) -> float:
        (first, low), (second, high) = sorted(points.items())
        return low + (high - low) / (second - first) * (at - first)

    by_depth = {depth: line({at: float(peak) for at, peak in found.items()}, tokens) for depth, found in peaks.items()}
    return line(by_depth, layers)


# --- Measured ---


def _measure(study: Study, layers: int, contexts: Sequence[int], host: bool = False) -> dict[int, int]:
    """Peaks by context, each held against what is predicted.

    host: hold the host's memory too, which it can be once: what a process gives back is not at once free again.
    """
    bench = study.bench
    if bench.left < bench.size(20, 1):
        bench.skip("depths", f"no time was left for {layers} layers of {study.name}")
        return {}
    steps = Steps(study, layers, contexts[0] if host else None)
    peaks = steps.on_card(contexts) if bench.on_cuda else steps.on_host(contexts)
    within = WITHIN if bench.on_cuda else REHEARSED
    for tokens, peak in peaks.items():
        what = f"{study.name}, {layers} layers, {tokens} tokens: predicted peak over measured"
        bench.check(what, study.peak(tokens, layers) / peak, at_least=1 - within, at_most=1 + within)
    return peaks


class BlockWeights(Weights):
    """One block of drawn numbers, over and over: drawing billions would take a minute."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self._shapes = weight_shapes(config)
        self._block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * config.initializer_range

    def read(self, name: str) -> Tensor:
        """See `Weights`."""
        shape = self._shapes[name]
        return self._block.repeat(-(-shape.numel() // len(self._block)))[: shape.numel()].view(shape)


class Steps:
    """Steps of an engine of few layers, and their peaks. host_at: the context at which the host's memory is held."""

    def __init__(self, study: Study, layers: int, host_at: int | None = None) -> None:
        self.study, self.bench, self.layers, self.host_at = study, study.bench, layers, host_at
        self.config = study.config(layers)
        self.engine: TrainingEngine | None = None

    def start(self) -> None:
        """An engine, and a first short step, which makes the optimizer's moments."""
        self.engine = TrainingEngine(BlockWeights(self.config), build_mesh(), self.study.settings, Schedule(peak=1e-4))
        self.step(self.batch(self.bench.size(4096, 64)))
        gc.collect()

    def step(self, batch: RankBatch) -> None:
        """One optimizer step; nothing predicts drawn tokens, so its loss is about the logarithm of their number."""
        assert self.engine is not None
        loss = self.engine.train_step([batch], len(batch.tokens)).loss
        if not 0 < loss < 2 * np.log(self.config.vocab_size):
            raise ValueError(f"a step's loss is {loss}")

    def end(self) -> None:
        """Give back what the engine took."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None
        gc.collect()

    def batch(self, tokens: int) -> RankBatch:
        """Drawn tokens, all of them targets."""
        drawn = np.random.default_rng(0).integers(0, self.config.vocab_size, tokens, dtype=np.int32)
        bounds = _bounds(tokens, self.bench)
        micro = MicroBatch(drawn, np.roll(drawn, -1), np.ones(tokens, np.float32), bounds, ())
        return Dispatcher(shape=attention_shape(self.config, "bf16"))(micro)

    def on_card(self, contexts: Sequence[int]) -> dict[int, int]:
        """The allocator's peaks, of one engine."""
        _empty_caches()
        before, used = torch.cuda.memory_allocated(self.bench.device), _used()
        self.start()
        peaks = {}
        for tokens in contexts:
            if self.bench.left < 3 + 1.5 * self._seconds(tokens):
                self.bench.skip("contexts", f"no time was left for {tokens} tokens in {self.layers} layers")
                continue
            _empty_caches()
            batch = self.batch(tokens)
            torch.cuda.reset_peak_memory_stats(self.bench.device)
            started = time.monotonic()
            self.step(batch)
            torch.cuda.synchronize(self.bench.device)
            peaks[tokens] = torch.cuda.max_memory_allocated(self.bench.device) - before
            self._say(tokens, peaks[tokens], time.monotonic() - started, used)
        self.end()
        return peaks

    def _seconds(self, tokens: int) -> float:
        """What a step may take: its layers computed again, at a third of the card's peak, and Adam on the host."""
        pairs = int(sum(length * (length + 1) // 2 for length in np.diff(_bounds(tokens, self.bench)).tolist()))
        flops = step_flops(self.config, tokens, pairs, {"text": tokens})
        return 4 / 3 * flops / 330e12 + 2

    def on_host(self, contexts: Sequence[int]) -> dict[int, int]:
        """What torch's profiler counts, of an engine for each."""
        peaks = {}
        for tokens in contexts:
            batch = self.batch(tokens)
            peaks[tokens] = peak_bytes(lambda: self.step(batch), self.start)  # noqa: B023
            self.end()
        return peaks

    def _say(self, tokens: int, peak: int, seconds: float, used: int) -> None:
        """Figures of a step, and what the host holds by now held against what is to wait there."""
        plan, host = self.study.plan(tokens, self.layers), _used() - used
        name = f"{self.study.name}, {self.layers} layers, {tokens} tokens"
        self.bench.figures(
            name,
            peak_gib=round(peak / GIB, 3),
            predicted_gib=round(plan.peak / GIB, 3),
            moment=plan.moment,
            parts_gib={part: round(size / GIB, 3) for part, size in plan.device.items()},
            reserved_gib=round(torch.cuda.max_memory_reserved(self.bench.device) / GIB, 3),
            host_gib=round(host / GIB, 2),
            host_predicted_gib=round(waiting(plan) / GIB, 2),
            pinned_gib=round(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / GIB, 2),
            seconds=round(seconds, 2),
        )
        if tokens == self.host_at:
            limits = {"at_least": 1 - HOST_WITHIN, "at_most": 1 + HOST_WITHIN}
            self.bench.check(f"{name}: host memory predicted over in use", waiting(plan) / max(host, 1), **limits)


def _used() -> int:
    """Bytes of the machine's memory in use, pinned ones among them, which a process's own count leaves out."""
    memory = psutil.virtual_memory()
    return memory.total - memory.available


def _empty_caches() -> None:
    """Give back what torch's allocators keep for later, of the card and of pinned host memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
