"""Attention that is not run twice: its output and logsumexp, handed from a forward to the forward that repeats it.

A checkpointed layer is computed again in the backward. All but the attention is cheap in that, so the first forward
runs under `SavedResults.saving()` and the second under `SavedResults.restoring()`, where `packed_ring_attention` takes
what the first saved instead of computing and exchanging keys again (rematerialisation-aware checkpointing,
DistFlashAttn, arXiv 2310.03294).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class SavedResults:
    """The results of one layer's attention calls, first in, first out; on the host between the two forwards or not."""

    def __init__(self, on_host: bool = False) -> None:
        self._on_host = on_host
        self._results: deque[tuple[Tensor, Tensor]] = deque()
        self._is_saving = False

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it each attention saves its result here."""
        with self._current(is_saving=True):
            yield

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Within it each attention takes the next result from here."""
        with self._current(is_saving=False):
            yield

    @contextmanager
    def _current(self, is_saving: bool) -> Iterator[None]:
        self._is_saving = is_saving
        token = _saved.set(self)
        try:
            yield
        finally:
            _saved.reset(token)

    def store(self, out: Tensor, lse: Tensor) -> None:
        """Keep out and lse, without the graph that out is about to belong to."""
        out = out.detach()
        self._results.append((to_host(out), to_host(lse)) if self._on_host else (out, lse))

    def take(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The next result, on `device`; it is kept no longer."""
        out, lse = self._results.popleft()
        return out.to(device, non_blocking=True), lse.to(device, non_blocking=True)


_saved: ContextVar[SavedResults | None] = ContextVar("saved", default=None)


def saved_result(device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The result of the attention that is being repeated, None where it has to be computed."""
    saved = _saved.get()
    return None if saved is None or saved._is_saving else saved.take(device)


def save_result(out: Tensor, lse: Tensor) -> None:
    """Keep a result for the forward that will repeat this one, if there is to be one."""
    if (saved := _saved.get()) is not None:
        saved.store(out, lse)


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory, pinned where x is on a GPU, which then goes on while it is made; x itself on the CPU."""
    if not x.is_cuda:
        return x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return copy.copy_(x, non_blocking=True)
