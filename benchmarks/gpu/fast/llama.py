"""A Llama of LWM's 7B widths as the recipes train it, its weights made on the device, of any depth up to its own.

In: kv heads, layers, how memory is saved, kernels. Out: batches, steps of forward and backward, their operations; and
how far loss and gradient lie from those of stock transformers in fp32.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from benchmarks.gpu.fast.stand_in import relative_difference
from benchmarks.gpu.part import Bench
from model.layers.activation_checkpointing import apply_memory_settings
from model.layers.fused_layers import fuse
from model.layers.kernels.interface import Kernels
from model.layers.memory_settings import MemorySettings
from model.llama.config import attention_sizes, llama_config
from model.llama.flops import step_flops
from model.llama.llama import empty_llama, fill
from model.llama.sizes import PRESETS
from model.training.micro_batch_loss import micro_batch_loss
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from tokenization.loader.batch import MicroBatch

RECIPE = MemorySettings(activations="all-but-attention", mlp_tile=4096)
"""What the recipes of the 7B choose."""
VOCABULARY = 32000
THETA = 5e7
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


class Llama:
    """The model on the bench's device: bf16 on a card, fp32 in a rehearsal."""

    def __init__(
        self, bench: Bench, kv_heads: int, layers: int, memory: MemorySettings = RECIPE, kernels: Kernels = "torch"
    ) -> None:
        self.device, self.layers = bench.device, layers
        self.memory = replace(memory, mlp_tile=24) if bench.tiny and memory.mlp_tile else memory
        sizes = {**bench.size(PRESETS["7B"], TINY), "num_hidden_layers": layers, "num_key_value_heads": kv_heads}
        config = llama_config(sizes, bench.size(VOCABULARY, 256), 2**20, THETA)
        self.model = empty_llama(config, dtype=torch.bfloat16 if bench.on_cuda else torch.float32)
        apply_memory_settings(self.model, self.memory)
        fuse(self.model, kernels)
        generator = torch.Generator(bench.device).manual_seed(0)

        def weight(name: str, empty: nn.Parameter) -> Tensor:
            made = torch.ones(empty.shape, dtype=empty.dtype, device=bench.device)
            return made if made.dim() == 1 else made.normal_(std=config.initializer_range, generator=generator)

        fill(self.model, weight)
        self.config = self.model.config
        self.heads, self.kv_heads, self.head_size = attention_sizes(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.model.lm_head.weight.dtype

    @property
    def depth(self) -> int:
        """Layers that run: the first ones. Transformers takes their number from the configuration at each call."""
        return int(self.config.num_hidden_layers)

    @depth.setter
    def depth(self, layers: int) -> None:
        self.config.num_hidden_layers = layers

    def batch(self, tokens: int, documents: int = 1) -> RankBatch:
        """Random tokens, all of them targets, in documents of one length; on the device."""
        drawn = np.random.default_rng(tokens).integers(0, self.config.vocab_size, tokens, dtype=np.int32)
        cu_seqlens = np.linspace(0, tokens, documents + 1).astype(np.int32)
        made = MicroBatch(drawn, np.roll(drawn, -1), np.ones(tokens, np.float32), cu_seqlens, ())
        shape = attention_shape(self.config, "fp32" if self.dtype == torch.float32 else "bf16")
        return Dispatcher(shape=shape)(made).to(self.device)

    def step(self, batch: RankBatch) -> Tensor:
        """Forward and backward as the engine's, of a mean over tokens, which is returned; gradients are new."""
        self.model.zero_grad(set_to_none=True)
        local_sum, _ = micro_batch_loss(self.model, batch)
        loss = local_sum / len(batch.tokens)
        loss.backward()
        return loss.detach()

    def flops(self, tokens: int, pairs: int | None = None) -> float:
        """Operations of a step over one document, or over so many pairs, by the depth."""
        whole = tokens * (tokens + 1) // 2 if pairs is None else pairs
        return step_flops(self.config, tokens, whole, {"text": tokens})

    def weight_bytes(self) -> int:
        """Of the weights that run: their gradients have as many."""
        tables = 2 * self.config.vocab_size * self.config.hidden_size
        layer = sum(p.numel() for p in self.model.model.layers[0].parameters())
        return (tables + self.depth * layer) * self.dtype.itemsize


def difference_to_stock(ours: Llama, tokens: int) -> tuple[float, float]:
    """Relative differences to stock transformers' in fp32: of the loss, and the largest of a parameter's gradient.

    Of two layers and two packed documents of equal length, which the stock model takes as two rows.
    """
    ours.depth = 2
    batch = ours.batch(tokens, documents=2)
    loss = ours.step(batch)
    with torch.device(ours.device):
        stock = LlamaForCausalLM._from_config(
            copy.deepcopy(ours.config), attn_implementation="sdpa", dtype=torch.float32
        )
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.copy_(ours.model.get_parameter(name))
    logits = stock(input_ids=batch.tokens.view(2, -1), use_cache=False).logits
    exact = F.cross_entropy(logits.flatten(0, 1), batch.labels)
    exact.backward()
    gradients = []
    for name, parameter in stock.named_parameters():
        mine = ours.model.get_parameter(name).grad
        assert mine is not None
        assert parameter.grad is not None
        gradients.append(relative_difference(mine, parameter.grad))
    return abs(float(loss / exact.detach()) - 1), max(gradients)
