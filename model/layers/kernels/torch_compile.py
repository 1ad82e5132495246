"""A layer's position-wise parts, each one kernel forward and one backward, made by torch.compile.

Tensors are [tokens, ...]; a part is compiled once for any number of tokens, a second or two on first use (on a CPU ten
more for the first of all), and kept in inductor's cache on disk for the next process. Only arithmetic is compiled: what
autograd keeps is chosen here, so that recomputation, offloading and ZeRO-3 work unchanged. Beside torch's own
operations a norm keeps one row less and SwiGLU one wide row less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.layers.kernels.interface import LayerKernels, SwiGLU

# A few small kernels are compiled where they are used: no worker needs a pool of compiling processes beside it.
torch._inductor.config.compile_threads = 1


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled whole, its tensors of two dimensions and more with any number of tokens."""
    compiled = torch.compile(function, fullgraph=True)

    def call(*arguments: Tensor | float) -> Any:
        plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        for x in plain:
            if isinstance(x, Tensor) and x.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(*plain)

    return call


def _wide(x: Tensor) -> Tensor:
    """In the dtype to compute in: fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- RMSNorm, with fp32 inside and the result rounded before the weight as transformers' Llama does ---


@_fused
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * _normalised(_wide(x), eps)[0].to(x.dtype)


@_fused
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalised, inverse = _normalised(_wide(x), eps)
    grad = _wide(grad)
    turned = grad * weight
    grad_x = inverse * (turned - normalised * (turned * normalised).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad * normalised).sum(0).to(weight.dtype)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * inverse, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x.flatten(0, -2), weight, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _rms_norm_backward(grad.flatten(0, -2), x.flatten(0, -2), weight, ctx.eps)
        return grad_x.view(x.shape), grad_weight, None


# --- Rotary embedding in halves (arXiv 2104.09864): the backward turns by the opposite angles ---


@_fused
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned(q, cos, sin), _turned(k, cos, sin)


@_fused
def _rotate_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _turned(q, cos, -sin), _turned(k, cos, -sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _Rotate._apply(_rotate, q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_Rotate._apply(_rotate_back, grad_q, grad_k, *ctx.saved_tensors), None, None

    @staticmethod
    def _apply(turn: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k = turn(*(x.flatten(0, 1) for x in tensors))
        return q.view(tensors[0].shape), k.view(tensors[1].shape)


# --- SwiGLU without its products (arXiv 2002.05202) ---


@_fused
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@_fused
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.silu(gate) * up, *_gradients(grad, gate, up)


def _gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, wide = _wide(grad), _wide(gate)
    sigmoid = torch.sigmoid(wide)
    active = wide * sigmoid
    return (grad * up * (sigmoid + active * (1 - sigmoid))).to(gate.dtype), (grad * active).to(up.dtype)


_swiglu_gradients = _fused(_gradients)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = _swiglu_gradients(*(x.flatten(0, -2) for x in (grad, gate, up)))
        return grad_gate.view(gate.shape), grad_up.view(up.shape)


KERNELS = LayerKernels(_RMSNorm.apply, _Rotate.apply, SwiGLU(_SwiGLU.apply, _swiglu_backward))
