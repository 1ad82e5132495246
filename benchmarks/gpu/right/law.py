"""The law on one card: however a step is run, its gradient and its updates are those of plain transformers, padded.

The reference is transformers' own model on one padded row a document, in fp64 (its norms and angles in fp32, as it has
them in any model), from weights that bf16 holds exactly; so one reference serves engines of both precisions. Three
things are held against it or to each other, since no single one would do:

- In fp32, without TF32, to the law's 1e-5: gradient, weights and losses, for every ZeRO stage, accumulation, way to
  save memory and choice of kernels. FlashAttention takes half precision alone, so its two operators are replaced by
  their definition (`exact_attention`); everything else is what a card runs.
- In bf16, as a card trains, with FlashAttention. There 1e-5 is out of reach: each rounding costs 2e-3. The yardstick is
  plain transformers in bf16 at the same weights: our gradient may be 1.2 times as far from the reference as theirs.
- In bf16 and deterministic, among ourselves: the ways that do the same arithmetic in the same order (ZeRO stages,
  recomputation, offloading) have to give the same gradient to the bit, and with it the same update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.part import Bench
from benchmarks.gpu.right.exact_attention import exact_attention
from benchmarks.gpu.right.kernels import deterministic
from model.layers.kernels.interface import Kernels, missing_for
from model.layers.memory_settings import MemorySettings
from model.llama.initial_weights import Weights
from model.training.mesh import Mesh, build_mesh
from testing.engine_state import differing, whole_gradient, whole_weights
from testing.law_batch import (
    SEED,
    TINY,
    RoundedWeights,
    rank_batches,
    relative_difference,
    relative_norm,
    tiny_config,
    tiny_engine,
)
from testing.padded_reference import PaddedReference

LAW = 1e-5
"""Largest relative difference of any gradient, weight or loss in fp32, as on the CPU."""
YARDSTICK = 1.2
"""Our largest error in bf16, in those of plain transformers."""
SAME_UPDATE = 1e-6
"""Largest relative difference of weights after the same update of the same gradient, on the host or on the card."""
SOUND = 0.1
"""Largest error of plain transformers in bf16: were it larger, it would be no yardstick."""
STEPS = 2
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}
"""On a card: heads of 64, as its kernels are made for."""
TILE = 50  # no length is a multiple of it
FUSED_SECONDS: dict[Kernels, float] = {"liger": 10.0, "compile": 30.0}
"""What fused kernels may take, their compilation included."""


class Way(NamedTuple):
    """One way to run a step."""

    zero: int = 2
    grad_accum: int = 1
    memory: MemorySettings = MemorySettings()
    kernels: Kernels = "torch"

    def __str__(self) -> str:
        memory = [f"{key} {value}" for key, value in vars(self.memory).items() if value not in (False, None, "keep")]
        accumulated = [f"{self.grad_accum} micro-batches"] * (self.grad_accum > 1)
        kernels = [self.kernels] * (self.kernels != "torch")
        return ", ".join([f"ZeRO {self.zero}", *accumulated, *memory, *kernels]).replace("_", " ").replace(" True", "")

    @property
    def keeps_arithmetic(self) -> bool:
        """Whether each sum is the same, in the same order, as in the default way."""
        return self.zero > 0 and self.grad_accum == 1 and self.memory.mlp_tile is None and self.kernels == "torch"


ON_HOST = MemorySettings(offload_optimizer=True)
EVERYTHING = MemorySettings("all-but-attention", True, TILE, True, True)
WAYS = (
    *(Way(zero) for zero in (2, 0, 1, 3)),
    *(Way(zero, 2) for zero in (1, 2, 3)),
    Way(3, 2, EVERYTHING),
    Way(memory=MemorySettings("mlp")),
    Way(memory=MemorySettings("all-but-attention")),
    Way(3, memory=MemorySettings("full")),
    Way(memory=MemorySettings("all-but-attention", True)),
    Way(3, memory=MemorySettings("full", True)),
    Way(memory=MemorySettings(mlp_tile=TILE)),
    Way(1, memory=ON_HOST),
    Way(2, memory=ON_HOST),
    Way(3, memory=MemorySettings(offload_optimizer=True, offload_parameters=True)),
)
"""The first is what the others are held to."""
TINY_WAYS = (Way(), Way(0), Way(1, 2), Way(3, 2, EVERYTHING), Way(3, memory=MemorySettings("full", True)))
"""In a rehearsal: each setting once."""
FUSED = (Way(), Way(3, 2, EVERYTHING))
"""With each choice of fused kernels."""


def run(bench: Bench) -> None:
    """fp32, bf16, bf16 to the bit; then both precisions with fused kernels, whose compilation takes longest."""
    law = _Law(bench)
    ways = bench.size(WAYS, TINY_WAYS)
    for way in ways:
        law.hold_fp32(way)
    law.hold_bf16(Way(3, 2, EVERYTHING))
    with deterministic():
        first = law.hold_bf16(ways[0])
        for way in ways[1:]:
            if way.zero:  # stage 0 trains in fp32 alone
                law.hold_same(way, law.hold_bf16(way), first)
    for kernels in ("liger", "compile"):
        with _fused(bench, kernels) as can_run:
            for way in FUSED if can_run else ():
                law.hold_fp32(way._replace(kernels=kernels))
                law.hold_bf16(way._replace(kernels=kernels))


class _Trained(NamedTuple):
    """gradient: of the first step. weights: fp32, after each step. losses: of the steps after the first."""

    gradient: dict[str, Tensor]
    weights: list[dict[str, Tensor]]
    losses: list[float]


class _Law:
    def __init__(self, bench: Bench) -> None:
        self.bench, self.mesh = bench, build_mesh()
        self.weights = RoundedWeights(tiny_config(bench.size(SIZES, TINY)), SEED)
        gradient, weights, losses = self._padded(torch.float64).train(STEPS)
        self.exact = _Trained(gradient, weights[1:], losses[1:])
        self.theirs = rms_error(self._padded(torch.bfloat16).gradient(), gradient)
        bench.check("bf16, plain transformers: error of the gradient", self.theirs, at_most=SOUND)

    def _padded(self, dtype: torch.dtype) -> PaddedReference:
        return PaddedReference("vision-text", self.weights, dtype, self.bench.device)

    def hold_fp32(self, way: Way) -> None:
        """To the law, against the reference."""
        with exact_attention(), _no_tf32():
            ours = _train(self.mesh, self.weights, way, "fp32")
        self.bench.check(f"fp32, {way}: gradient", relative_difference(ours.gradient, self.exact.gradient), at_most=LAW)
        weights = max(map(relative_difference, ours.weights, self.exact.weights), key=_worst)
        losses = max((abs(x / exact - 1) for x, exact in zip(ours.losses, self.exact.losses)), key=_worst)
        self.bench.check(f"fp32, {way}: weights after {STEPS} steps, losses", max(weights, losses, key=_worst), LAW)

    def hold_bf16(self, way: Way) -> _Trained:
        """To the yardstick."""
        ours = _train(self.mesh, self.weights, way, "bf16")
        what = f"bf16, {way}: error of the gradient, in those of plain transformers"
        self.bench.check(what, rms_error(ours.gradient, self.exact.gradient) / self.theirs, at_most=YARDSTICK)
        return ours

    def hold_same(self, way: Way, ours: _Trained, first: _Trained) -> None:
        """To the bit, where the arithmetic is the same."""
        if not way.keeps_arithmetic:
            return
        n_differing = len(differing(ours.gradient, first.gradient))
        self.bench.check(f"bf16, {way}: gradients that differ in any bit", n_differing, at_most=0)
        update = relative_difference(ours.weights[0], first.weights[0])
        self.bench.check(f"bf16, {way}: weights after the same update", update, at_most=SAME_UPDATE)


def _train(mesh: Mesh, weights: Weights, way: Way, precision: str) -> _Trained:
    batch, n_examples = rank_batches(mesh, way.grad_accum)
    settings: dict[str, Any] = {**way._asdict(), "precision": precision}
    engine = tiny_engine(mesh, None, settings.pop("zero"), weights, **settings)
    engine.accumulate(batch, n_examples)
    gradient = whole_gradient(engine)
    engine.update()
    states, losses = [whole_weights(engine) or {}], []
    for _ in range(STEPS - 1):
        losses.append(engine.train_step(batch, n_examples).loss)
        states.append(whole_weights(engine) or {})
    engine.close()
    return _Trained(gradient, states, losses)


def rms_error(gradient: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Root of the mean square, over the parameters, of each one's relative error: no single small one decides it."""
    errors = torch.stack([relative_norm(gradient[name], exact[name]) for name in exact])
    return float(errors.square().mean().sqrt())


def _worst(x: float) -> float:
    """A key by which NaN is the largest."""
    return x if x == x else torch.inf


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _fused(bench: Bench, kernels: Kernels) -> Iterator[bool]:
    """Whether these kernels can be run, within. A rehearsal runs those to be compiled without compiling them."""
    why = missing_for(kernels) if bench.on_cuda or kernels == "compile" else "its kernels need a GPU"
    if why is None and bench.left < FUSED_SECONDS[kernels]:
        why = "no time was left for it"
    if why is not None:
        bench.skip(kernels, why)
        yield False
        return
    with contextlib.nullcontext() if bench.on_cuda else torch.compiler.set_stance("force_eager"):
        yield True
