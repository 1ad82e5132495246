"""Attention that is not run twice: its output and logsumexp, handed from a forward to the forward that repeats it.

A checkpointed layer is computed again in the backward, where all but the attention is cheap. So the first forward runs
under `SavedResults.saving()` and the second under `SavedResults.restoring()`, where `packed_ring_attention` takes what
the first saved instead of exchanging and computing again (rematerialisation-aware checkpointing, DistFlashAttn, arXiv
2310.03294).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class SavedResults:
    """The results of one layer's attention calls, first in, first out; in host memory meanwhile where `on_host`."""

    def __init__(self, on_host: bool = False) -> None:
        self.on_host = on_host
        self.is_saving = False
        self.results: deque[tuple[Tensor, Tensor]] = deque()

    def saving(self) -> AbstractContextManager[None]:
        """Within it each attention saves its result here."""
        return self._current(is_saving=True)

    def restoring(self) -> AbstractContextManager[None]:
        """Within it each attention takes the next result from here."""
        return self._current(is_saving=False)

    @contextmanager
    def _current(self, is_saving: bool) -> Iterator[None]:
        self.is_saving = is_saving
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[SavedResults | None] = ContextVar("saved_results", default=None)


def saved_result(device: torch.device) -> tuple[Tensor, Tensor] | None:
    """out and lse of the attention that is being repeated, on `device`; None where they have to be computed."""
    saved = _current.get()
    if saved is None or saved.is_saving:
        return None
    out, lse = saved.results.popleft()
    return out.to(device, non_blocking=True), lse.to(device, non_blocking=True)


def save_result(out: Tensor, lse: Tensor) -> None:
    """Keep a result, without its graph, for the forward that will repeat this one, if there is one."""
    if (saved := _current.get()) is not None:
        out = out.detach()
        saved.results.append((_to_host(out), _to_host(lse)) if saved.on_host else (out, lse))


def _to_host(x: Tensor) -> Tensor:
    """A copy in pinned host memory, made while the GPU works on; x itself where it is on the CPU."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
