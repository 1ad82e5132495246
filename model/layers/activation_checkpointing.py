"""Transformers' decoder layers that keep less between forward and backward.

In: a model of `model.llama.llama`, with or without weights, and `MemorySettings`. Out: the same, its layers of another
class: weights, names and results stay, what autograd keeps of a layer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from model.attention.saved_results import SavedResults
from model.layers.memory_settings import MemorySettings
from model.layers.tiled_mlp import TiledLlamaMLP, only_saving


def apply_memory_settings(model: LlamaForCausalLM, settings: MemorySettings) -> None:
    """Apply `settings` to the model's layers, in place."""
    for layer in model.model.layers:
        layer.__class__ = RecomputingDecoderLayer
        layer.settings = settings
        if settings.mlp_tile is not None:
            TiledLlamaMLP.adopt(layer.mlp, settings.mlp_tile)
            layer.mlp._z3_leaf = True  # DeepSpeed's mark: ZeRO-3 gathers all three weights on entry, for all tiles


class RecomputingDecoderLayer(LlamaDecoderLayer):
    """Transformers' layer in two halves, each or both of them computed again in the backward."""

    settings: MemorySettings

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]  # the others pass on
        """Arguments and result of `LlamaDecoderLayer.forward`."""
        activations = self.settings.activations
        if activations == "keep" or not torch.is_grad_enabled():
            return self._whole(hidden_states, kwargs)
        if activations == "mlp":
            hidden_states = self._attend(hidden_states, _again(self.input_layernorm, hidden_states), kwargs)
            return _again(self._feed_forward, hidden_states)
        on_host = self.settings.offload_activations
        kept = SavedResults(on_host) if activations == "all-but-attention" else None
        with save_on_cpu(pin_memory=hidden_states.is_cuda) if on_host else nullcontext():
            return _again(self._whole, hidden_states, kwargs, kept=kept)

    def _whole(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return self._feed_forward(self._attend(hidden, self.input_layernorm(hidden), kwargs))

    def _attend(self, hidden: Tensor, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return hidden + self.self_attn(hidden_states=normed, **kwargs)[0]

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _again(compute: Callable[..., Tensor], *args: Any, kept: SavedResults | None = None) -> Tensor:
    """`compute(*args)`, which the backward computes again from its arguments and, in `kept`, attention's result.

    Nothing in a layer is random, so no random state is kept.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return (kept.saving() if kept else nullcontext()), _repeating(kept)

    result: Tensor = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return result


@contextmanager
def _repeating(kept: SavedResults | None) -> Iterator[None]:
    with only_saving(), kept.restoring() if kept else nullcontext():
        yield
