"""Transformers' Llama with fused kernels in its norms, attention and MLPs; weights, names and results stay.

In: a model of `model.llama.llama`, with or without weights, and a choice of kernels. Out: the same, its modules of
other classes.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from model.layers.kernels.interface import Kernels, LayerKernels
from model.layers.tiled_mlp import TiledLlamaMLP, check_swiglu
from model.llama.rope import ExactLlamaAttention


def fuse(model: LlamaForCausalLM, name: Kernels) -> None:
    """Run the model's position-wise parts by these kernels, in place."""
    if name == "torch":
        return
    kernels = load_kernels(name)
    for module in model.modules():
        if type(module) is LlamaMLP:
            check_swiglu(module, f"kernels {name} are", "set kernels: torch")
    for module in model.modules():
        if isinstance(module, TiledLlamaMLP):
            module.swiglu = kernels.swiglu
        elif isinstance(module, ExactLlamaAttention):
            module.rotate = kernels.rotate
        elif (fused := _FUSED.get(type(module))) is not None:
            module.__class__ = fused
            cast(Any, module).kernels = kernels


def load_kernels(name: Kernels) -> LayerKernels:
    """The kernels of "compile" or "liger"; imports what they need, which takes seconds."""
    if name == "liger":
        from model.layers.kernels.liger import KERNELS
    else:
        from model.layers.kernels.torch_compile import KERNELS
    return KERNELS


class FusedRMSNorm(LlamaRMSNorm):
    """Transformers' norm in one kernel."""

    kernels: LayerKernels

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [..., D] in, [..., D] out."""
        return self.kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FusedLlamaMLP(LlamaMLP):
    """Transformers' MLP with one kernel between its products."""

    kernels: LayerKernels

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] in, [..., D] out."""
        return self.down_proj(self.kernels.swiglu.forward(self.gate_proj(x), self.up_proj(x)))


_FUSED = {LlamaRMSNorm: FusedRMSNorm, LlamaMLP: FusedLlamaMLP}
