"""Ulysses' exchange (arXiv 2309.14509): from some tokens with all heads to all tokens with some heads, and back.

In: rows [T, H, D] of u neighbouring ranks, which together hold u T tokens in order. Out: rows [u T, H / u, D] of all
those tokens for the rank's share of the heads. Each is the other's inverse, and the other's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.attention.p2p import Exchange


def tokens_for_heads(q: Tensor, k: Tensor, v: Tensor, exchange: Exchange, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, D] each to [u T, H / u, D], neighbours' tokens in order of their ranks. Differentiable; collective."""
    if degree == 1:
        return q, k, v
    # One message a neighbour: its share of the heads of all three, side by side.
    shares = zip(*(x.chunk(degree, dim=1) for x in (q, k, v)))
    joint = torch.cat([x for share in shares for x in share], dim=1)
    joint = _Swap.apply(joint, _gather_tokens, _gather_heads, exchange, degree)
    q, k, v = joint.split([x.shape[1] // degree for x in (q, k, v)], dim=1)
    return q, k, v


def heads_for_tokens(x: Tensor, exchange: Exchange, degree: int) -> Tensor:
    """[u T, h, D], this rank's heads of all its neighbours' tokens, to [T, u h, D]. Differentiable; collective."""
    return _Swap.apply(x, _gather_heads, _gather_tokens, exchange, degree) if degree > 1 else x


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: Any, swap_back: Any, exchange: Exchange, degree: int) -> Tensor:
        ctx.swap_back, ctx.exchange, ctx.degree = swap_back, exchange, degree
        return swap(x, exchange, degree)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.swap_back(grad, ctx.exchange, ctx.degree), None, None, None, None


def _gather_tokens(x: Tensor, exchange: Exchange, degree: int) -> Tensor:
    return _swap(x.chunk(degree, dim=1), exchange).flatten(0, 1)


def _gather_heads(x: Tensor, exchange: Exchange, degree: int) -> Tensor:
    return _swap(x.chunk(degree), exchange).transpose(0, 1).flatten(1, 2)


def _swap(parts: Sequence[Tensor], exchange: Exchange) -> Tensor:
    """Send part i to neighbour i; returns [u, *part], what each neighbour sent, in the order of ranks. Collective."""
    degree = len(parts)
    first = exchange.rank // degree * degree
    received = parts[0].new_empty(degree, *parts[0].shape)
    received[exchange.rank - first] = parts[exchange.rank - first]
    others = [i for i in range(degree) if first + i != exchange.rank]
    exchange.start({first + i: parts[i].contiguous() for i in others}, {first + i: received[i] for i in others}).wait()
    return received
