"""A layer's position-wise parts by Liger Kernel: Triton, on a GPU (optional package `ringworld[liger]`)."""

from __future__ import annotations

from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction, swiglu_backward, swiglu_forward
from torch import Tensor

from model.layers.kernels.interface import LayerKernels, SwiGLU


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Writes over q and k, and over their gradients."""
    q, k, *_ = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # some return the tables too
    return q.transpose(1, 2), k.transpose(1, 2)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    product = swiglu_forward(gate, up)[2]
    return product, *swiglu_backward(gate, up, grad)


KERNELS = LayerKernels(_rms_norm, _rotate, SwiGLU(LigerSiLUMulFunction.apply, _swiglu_backward))
