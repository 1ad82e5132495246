"""Ulysses' exchange (arXiv 2309.14509): from some tokens with all heads to all tokens with some heads, and back.

In: rows [T, H, D] of u neighbouring ranks, which together hold u T tokens in order. Out: rows [u T, H / u, D] of all
those tokens for the rank's share of the heads. Each is the other's inverse, and the other's gradient.
"""

from __future__ import annotations

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
    parts = _TokensForHeads.apply(joint, exchange, degree).split([x.shape[1] // degree for x in (q, k, v)], dim=1)
    return parts[0], parts[1], parts[2]


def heads_for_tokens(x: Tensor, exchange: Exchange, degree: int) -> Tensor:
    """[u T, h, D], this rank's heads of all its neighbours' tokens, to [T, u h, D]. Differentiable; collective."""
    return _HeadsForTokens.apply(x, exchange, degree) if degree > 1 else x


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, degree: int) -> Tensor:
        ctx.exchange, ctx.degree = exchange, degree
        return _swap(list(x.chunk(degree, dim=1)), exchange).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _swap(list(grad.chunk(ctx.degree)), ctx.exchange).transpose(0, 1).flatten(1, 2), None, None


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, degree: int) -> Tensor:
        ctx.exchange, ctx.degree = exchange, degree
        return _swap(list(x.chunk(degree)), exchange).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _swap(list(grad.chunk(ctx.degree, dim=1)), ctx.exchange).flatten(0, 1), None, None


def _swap(parts: list[Tensor], exchange: Exchange) -> Tensor:
    """Part i of each neighbour to neighbour i: [u, *part], by the neighbour it came from."""
    degree = len(parts)
    first = exchange.rank // degree * degree
    received = parts[0].new_empty(degree, *parts[0].shape)
    received[exchange.rank - first] = parts[exchange.rank - first]
    others = [i for i in range(degree) if first + i != exchange.rank]
    exchange.start({first + i: parts[i].contiguous() for i in others}, {first + i: received[i] for i in others}).wait()
    return received
