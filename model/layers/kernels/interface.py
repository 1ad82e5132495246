"""Which kernels run a decoder layer's position-wise parts: torch's own, fused by torch.compile, or Liger's.

A choice changes nothing but rounding and speed; attention has kernels of its own (`model.attention.flash_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a recipe is read without torch
    from torch import Tensor

Kernels = Literal["torch", "compile", "liger"]
"""torch: a kernel for each operation, as transformers writes them. compile: each part fused by torch.compile
(PyTorch 2, ASPLOS 2024), on CPU or GPU. liger: those of Liger Kernel (arXiv 2410.10989), in Triton, on a GPU."""


@dataclass(frozen=True)
class SwiGLU:
    """silu(gate) * up of tensors [..., I].

    forward: (gate, up) to it, differentiable once. backward: (grad, gate, up) to it again, and to the gradients of gate
    and of up, for a caller that kept neither; it may write over gate and up.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class LayerKernels:
    """The position-wise parts of a layer, differentiable once.

    rms_norm: (x [..., D], weight [D], eps) to x's shape and dtype. rotate: (q [B, T, H, d], k [B, T, Hkv, d], cos and
    sin [B, T, d], fp32 or q's dtype) to q and k turned, in their own dtypes; it may write over q and k.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: SwiGLU
