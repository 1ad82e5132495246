"""A decoder layer of the 7B by each choice of kernels, forward and backward: how fast, and the same by each.

In: a layer that keeps everything, and one that saves memory as the recipes do, over one document. Out: seconds by
kernels torch, compile and liger, how many times as fast as torch's, and how far output and gradients lie from those of
stock transformers' layer in fp32. In a rehearsal compiled functions run as they are written: compiling them takes
longer than all the rest.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.gpu.explain import check_share, explained, matrix_peak
from benchmarks.gpu.fast.llama import RECIPE, Llama
from benchmarks.gpu.fast.stand_in import relative_difference
from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.timing import seconds_of
from model.attention.plan.planner import plan_sequence
from model.layers.kernels.interface import Kernels, missing_for
from model.layers.memory_settings import MemorySettings
from model.llama.flops import step_flops

KERNELS: tuple[Kernels, ...] = ("torch", "compile", "liger")
SAVED = {"everything kept": MemorySettings(), "as the recipes": RECIPE}
SAME = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Largest relative difference of the output or a gradient to stock transformers' layer in fp32."""
FASTER = {"compile": 1.05, "liger": 1.05}
"""How many times as fast as torch's they are to be."""


def run(bench: Bench) -> None:
    """Contexts from the shortest, kernels side by side."""
    contexts = bench.size((8192, 32768), (32, 64))
    names = [name for name in KERNELS if _is_there(bench, name)]
    with torch.compiler.set_stance("force_eager") if bench.tiny else nullcontext():
        for saving, memory in SAVED.items():
            layers = {name: _Layer(Llama(bench, bench.size(32, 4), 1, memory, name)) for name in names}
            _check(bench, saving, layers, contexts[0])
            for context in contexts:
                _side_by_side(bench, f"{saving}, {context} tokens", layers, context)


def _is_there(bench: Bench, name: Kernels) -> bool:
    if bench.tiny and name == "compile":  # nothing is compiled
        return True
    why = missing_for(name) or ("it needs a GPU" if name == "liger" and not bench.on_cuda else None)
    if why is not None:
        bench.skip(name, why)
    return why is None


class _Layer:
    """The first decoder layer of a model, called as the model does."""

    def __init__(self, llama: Llama) -> None:
        self.llama = llama
        self.layer: nn.Module = llama.model.model.layers[0]

    def prepare(self, tokens: int) -> None:
        """Random inputs of so many tokens, the same for every layer."""
        generator = torch.Generator(self.llama.device).manual_seed(tokens)
        shape = (1, tokens, self.llama.config.hidden_size)
        drawn = (torch.randn(shape, generator=generator, device=self.llama.device) for _ in range(2))
        hidden, self.grad = (x.to(self.llama.dtype) for x in drawn)
        self.hidden = hidden.requires_grad_()
        self.plan = plan_sequence(np.array([0, tokens]), 1)
        positions = torch.arange(tokens, device=self.llama.device)[None]
        self.tables: tuple[Tensor, Tensor] = self.llama.model.model.rotary_emb(hidden, positions)

    def step(self) -> Tensor:
        """Forward and backward; gradients are new."""
        self.hidden.grad = None
        self.layer.zero_grad(set_to_none=True)
        out = self.layer(self.hidden, position_embeddings=self.tables, plan=self.plan)
        out.backward(self.grad)
        return out.detach()

    def stock(self) -> list[Tensor]:
        """What stock transformers' layer of the same weights and inputs gives in fp32: output and all gradients."""
        config = copy.deepcopy(self.llama.config)
        config._attn_implementation = "sdpa"
        with torch.device(self.llama.device):
            layer = LlamaDecoderLayer(config, 0).float()
        layer.load_state_dict(self.layer.state_dict())
        hidden = self.hidden.detach().float().requires_grad_()
        out = layer(hidden, position_embeddings=self.tables)
        out.backward(self.grad.float())
        return [out.detach(), *_gradients(hidden, layer)]

    def results(self) -> list[Tensor]:
        """The same by ours."""
        return [self.step(), *_gradients(self.hidden, self.layer)]

    def flops(self) -> float:
        """Of a step."""
        tokens = self.hidden.shape[1]
        return step_flops(self.llama.config, tokens, tokens * (tokens + 1) // 2, {})


def _gradients(hidden: Tensor, layer: nn.Module) -> Iterator[Tensor]:
    for x in (hidden, *(parameter for _, parameter in sorted(layer.named_parameters()))):
        assert x.grad is not None
        yield x.grad


def _check(bench: Bench, saving: str, layers: Mapping[Kernels, _Layer], tokens: int) -> None:
    exact: list[Tensor] | None = None
    for name, layer in layers.items():
        layer.prepare(tokens)
        exact = exact or layer.stock()
        worst = max(map(relative_difference, layer.results(), exact))
        what = f"{name}, {saving}: output and gradients beside stock transformers'"
        bench.check(what, worst, at_most=SAME[layer.llama.dtype])


def _side_by_side(bench: Bench, what: str, layers: Mapping[Kernels, _Layer], tokens: int) -> None:
    seconds: dict[str, float] = {}
    for name, layer in layers.items():
        layer.prepare(tokens)
        seconds[name] = seconds_of(layer.step, bench.device, rounds=5)
        check_share(bench, f"{name}, {what}", layer.flops() / seconds[name] / matrix_peak(bench.device))
    bench.figures(what, milliseconds={name: 1e3 * took for name, took in seconds.items()})
    for name, layer in layers.items():
        if name in FASTER:
            faster = seconds["torch"] / seconds[name]
            why = functools.partial(_explain, layer, bench.device)
            bench.goal(f"{name}, {what}: times as fast as torch's", faster, at_least=FASTER[name], explain=why)


def _explain(layer: _Layer, device: torch.device) -> Row:
    weights = sum(x.numel() * x.element_size() for x in layer.layer.parameters())
    return explained(layer.step, device, layer.flops(), 3 * weights)  # read twice, and their gradients written
