"""Transformers' Llama with fused kernels in its norms, attention and MLPs; weights, names and results stay.

In: a model of `model.llama.llama`, made lean or not, with its weights or still empty, and a choice of kernels. Out: the
same, its modules of other classes.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from model.layers.kernels.interface import Kernels, LayerKernels, load_kernels
from model.layers.tiled_mlp import TiledLlamaMLP, check_swiglu


def fuse(model: LlamaForCausalLM, name: Kernels) -> None:
    """Let the model's position-wise parts run by these kernels, in place."""
    if name == "torch":
        return
    kernels = load_kernels(name)
    for module in model.modules():
        if isinstance(module, TiledLlamaMLP):
            module.swiglu = kernels.swiglu
            continue
        if type(module) is LlamaMLP:
            check_swiglu(module, f"kernels {name} are", "set kernels: torch")
        if (fused := _FUSED.get(type(module))) is not None:
            module.__class__ = fused
            cast(Any, module).kernels = kernels


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


class FusedLlamaAttention(LlamaAttention):
    """Transformers' attention, queries and keys turned by one kernel and rounded by it to their own dtype."""

    kernels: LayerKernels

    def forward(  # type: ignore[override]  # the others pass on
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and result of `LlamaAttention.forward`, which generates where there is a cache."""
        if kwargs.get("past_key_values") is not None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.kernels.rotate(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


_FUSED = {LlamaRMSNorm: FusedRMSNorm, LlamaMLP: FusedLlamaMLP, LlamaAttention: FusedLlamaAttention}
