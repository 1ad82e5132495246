"""A step of training on a card that is not there: what it would allocate, by torch's own shapes and operators.

Tensors are fake: they have shapes, dtypes and storages, and no memory. Attention takes the CUDA kernels' operators, of
whose workspace, which only the kernels know, FlashAttention-2's is allocated as torch's source has it (flash_api.cpp,
mha_varlen_bwd). Not here are DeepSpeed's own buffers: a weight's gradient is gone as soon as it is there.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from model.attention import flash_kernels
from model.layers.activation_checkpointing import apply_memory_settings
from model.layers.memory_settings import MemorySettings
from model.llama import loss
from model.llama.llama import empty_llama, fill
from model.training import micro_batch_loss
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from tokenization.loader.batch import MicroBatch

BLOCK = 512
"""Bytes to a multiple of which torch's CUDA allocator rounds."""


class Allocations(TorchDispatchMode):
    """Counts the storages that operators make within it: `held` now, `peak` at most, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it has made."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.count(x)
        return result

    def count(self, x: Tensor, free: bool = False) -> None:
        """Count a tensor's storage, once, until it is gone; free: as nothing."""
        storage = x.untyped_storage()
        if (key := storage._cdata) in self._sizes:
            return
        self._sizes[key] = 0 if free else -(-storage.nbytes() // BLOCK) * BLOCK
        self.held += self._sizes[key]
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


def step_peak(config: LlamaConfig, batch: MicroBatch, memory: MemorySettings, chunk: int = 1024) -> int:
    """Bytes at the peak of a micro-batch's forward and backward in bf16 on one rank, without weights and gradients."""
    shares = Dispatcher(shape=attention_shape(config, "bf16"))(batch)
    with FakeTensorMode(), _as_on_a_card():
        model = empty_llama(config, dtype=torch.bfloat16)
        apply_memory_settings(model, memory)
        fill(model, lambda _, empty: torch.empty(empty.shape, dtype=empty.dtype))
        allocations = Allocations()
        for parameter in model.parameters():
            allocations.count(parameter, free=True)
            parameter.register_post_accumulate_grad_hook(_drop)
        with allocations:
            total, _ = micro_batch_loss.micro_batch_loss(model, _fake(shares), chunk=chunk)
            total.backward()
    return allocations.peak


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _fake(batch: RankBatch) -> RankBatch:
    """The batch with tensors made here, so that they are counted."""
    names = ("tokens", "positions", "labels", "loss_weight", "source")
    made: dict[str, Any] = {name: torch.zeros(len(batch.tokens), dtype=getattr(batch, name).dtype) for name in names}
    return replace(batch, **made)


@contextlib.contextmanager
def _as_on_a_card() -> Iterator[None]:
    """Attention by the CUDA kernels' operators; a loss whose rows are known without looking at labels."""
    with (
        patch.object(flash_kernels, "_on_cpu", lambda q: False),
        patch.object(flash_kernels, "_cuda_backward", _backward_with_workspace),
        patch.object(loss, "_chunks", _chunks),
        patch.object(micro_batch_loss, "_sums", lambda *_: {}),
    ):
        yield


_backward = flash_kernels._cuda_backward


def _backward_with_workspace(*inputs: Any, scale: float) -> Any:
    q, k, cu_seqlens = inputs[1], inputs[2], inputs[6]
    (n_queries, heads, head), sequences = q.shape, len(cu_seqlens) - 1
    padded = n_queries + 128 * sequences
    workspace = [q.new_empty(padded, heads, -(-head // 32) * 32, dtype=torch.float32)]
    workspace.append(q.new_empty(heads, padded, dtype=torch.float32))
    if k.shape[1] < heads:
        workspace += [k.new_empty(len(k), heads, head) for _ in range(2)]
    gradients = _backward(*inputs, scale=scale)
    del workspace
    return gradients


def _chunks(labels: Tensor, ranges: Any, chunk: int) -> list[tuple[Tensor, range]]:
    """Every token has a label of the first modality."""
    return [(rows, ranges[0]) for rows in torch.arange(len(labels)).split(chunk)]


def documents(context: int, count: int) -> MicroBatch:
    """A sequence of so many tokens in so many documents of a length, all of them targets."""
    tokens = np.zeros(context, np.int32)
    bounds = np.linspace(0, context, count + 1).astype(np.int32)
    return MicroBatch(tokens, tokens, np.ones(context, np.float32), bounds, ())
