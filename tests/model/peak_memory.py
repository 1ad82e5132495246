"""What a computation makes: how much is allocated, and how wide its tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.allocations import peak_bytes

__all__ = ["Widths", "peak_bytes"]


class Widths(TorchDispatchMode):
    """Collects the last dimension of every tensor that any operation makes, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                self.seen.add(tensor.shape[-1])
        return out
