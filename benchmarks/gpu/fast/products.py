"""Floating-point operations of the matrix products that a call really runs, counted as torch dispatches them.

What formulas reckon is held against it: torch's own `FlopCounterMode` leaves out products in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FACTORS = {
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.addmm_: (1, 2),
}
"""Where among an operator's arguments its two factors are."""


def counted_products(call: Callable[[], object]) -> float:
    """A multiply and an add are two; forward, backward and what is computed again in it. Attention is no product."""
    counter = _Counter()
    with counter:
        call()
    return counter.flops


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (places := _FACTORS.get(func.overloadpacket)) is not None:
            a, b = (args[place] for place in places)
            self.flops += 2 * math.prod(a.shape) * b.shape[-1]
        return func(*args, **(kwargs or {}))
