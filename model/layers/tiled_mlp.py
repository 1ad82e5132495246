"""The SwiGLU MLP over a tile of tokens at a time: rows as wide as `intermediate_size` never exist for all tokens.

In: hidden states and the three weights. Out: that of `LlamaMLP`'s forward; weight gradients are summed over tiles in
fp32 at least. Backward computes a tile's gate and up projection again. DeepSpeed's `TiledMLP` sums over tiles in the
weights' own dtype, gathers the weights for every tile under ZeRO-3, and costs a checkpointed layer a third forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP

from model.layers.kernels.interface import SwiGLU

_only_saving: ContextVar[bool] = ContextVar("only_saving", default=False)


@contextmanager
def only_saving() -> Iterator[None]:
    """Within it an MLP only saves for its backward and computes no output: a forward repeated in a backward."""
    token = _only_saving.set(True)
    try:
        yield
    finally:
        _only_saving.reset(token)


class TiledLlamaMLP(LlamaMLP):
    """A Llama's MLP in tiles of `tile` tokens. ZeRO-3 has to gather it whole: see `apply_memory_settings`."""

    tile: int
    swiglu: SwiGLU

    @classmethod
    def adopt(cls, mlp: LlamaMLP, tile: int) -> None:
        """Turn `mlp` into one, with the same weights and names. Raises ValueError unless it is a SwiGLU."""
        check_swiglu(mlp, "mlp_tile is", "drop mlp_tile")
        mlp.__class__ = cls
        tiled = cast(TiledLlamaMLP, mlp)
        tiled.tile, tiled.swiglu = tile, _TORCH

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] in, [..., D] out."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        out: Tensor = _TiledMLP.apply(x.flatten(0, -2), *weights, self.tile, self.swiglu)
        return out.view(x.shape)


def check_swiglu(mlp: LlamaMLP, what_is: str, remedy: str) -> None:
    """Raise ValueError unless it is an MLP of silu without biases."""
    if mlp.config.hidden_act != "silu" or mlp.config.mlp_bias:
        raise ValueError(
            f"{what_is} for an MLP of silu without biases, not {mlp.config.hidden_act} with "
            f"mlp_bias {mlp.config.mlp_bias}; {remedy}"
        )


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    active = F.silu(gate)
    product = active * up
    return product, torch.ops.aten.silu_backward(up.mul_(grad), gate), active.mul_(grad)


_TORCH = SwiGLU(_forward, _backward)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, tile: int, swiglu: SwiGLU) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        ctx.tile, ctx.swiglu = tile, swiglu
        if _only_saving.get():
            return x.new_zeros(()).expand_as(x)
        out = torch.empty_like(x)
        for rows, result in zip(x.split(tile), out.split(tile)):
            torch.mm(swiglu.forward(F.linear(rows, gate), F.linear(rows, up)), down.t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        d_gate, d_up, d_down = (torch.zeros_like(weight, dtype=exact) for weight in (gate, up, down))
        for rows, grad, result in zip(x.split(ctx.tile), grad_out.split(ctx.tile), grad_x.split(ctx.tile)):
            inner, grad_gated, grad_upped = ctx.swiglu.backward(grad @ down, F.linear(rows, gate), F.linear(rows, up))
            add_product_(d_down, grad, inner)
            torch.mm(grad_gated, gate, out=result)
            result.addmm_(grad_upped, up)
            add_product_(d_gate, grad_gated, rows)
            add_product_(d_up, grad_upped, rows)
        return grad_x, d_gate.to(gate.dtype), d_up.to(up.dtype), d_down.to(down.dtype), None, None


def add_product_(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """total += grad^T rows, in total's dtype."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), rows)
    else:
        total += grad.t() @ rows
