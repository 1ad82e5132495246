"""The kernels of a decoder layer's position-wise parts: torch's own, fused by torch.compile, or Liger's.

A choice changes only rounding and speed; attention has kernels of its own (`model.attention.flash_kernels`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a recipe is read without torch
    from torch import Tensor

Kernels = Literal["torch", "compile", "liger"]
"""See `TrainingSettings.kernels`; torch.compile is by PyTorch 2 (ASPLOS 2024), Liger Kernel by arXiv 2410.10989."""


@dataclass(frozen=True)
class SwiGLU:
    """silu(gate) * up of tensors [..., I].

    forward: (gate, up) to the product, differentiable once. backward: (grad, gate, up) to the product again and the
    gradients of gate and of up, for a caller that computes gate and up again; it may write over both.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class LayerKernels:
    """The position-wise parts of a layer, differentiable once.

    rms_norm: (x [..., D], weight [D], eps) to x's shape and dtype. rotate: (q [B, T, H, d], k [B, T, Hkv, d], cos and
    sin [B, T, d], fp32 or q's dtype) to rotated q and k, in their own dtypes; it may write over q and k.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: SwiGLU


def missing_for(name: Kernels) -> str | None:
    """What this machine lacks to run these kernels, and the remedy, or None; does not look for a GPU."""
    if name == "liger" and not _is_installed("liger_kernel"):
        return "the package liger-kernel is not installed; pip install 'ringworld[liger]' here and on the workers"
    if name == "compile" and not _has_compiler():
        return "torch.compile finds no C++ compiler; install g++ here and on the workers"
    return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # imported here: it takes seconds
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
