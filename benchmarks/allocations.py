"""What a computation allocates, by torch's own profiler of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

_BEGIN = "ringworld: begin"


def peak_bytes(compute: Callable[[], Any], before: Callable[[], Any] | None = None) -> int:
    """The most that is allocated at once while `compute` runs, on top of what `before` left; not what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if before is not None:
            before()
        with record_function(_BEGIN):
            pass
        compute()
    events = list(profiler.profiler.kineto_results.events())
    begin = next(event.start_ns() for event in events if event.name() == _BEGIN)
    held = most = 0
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for when, size in sorted(changes, key=lambda change: change[0]):
        held += size
        if when >= begin:
            most = max(most, held)
    return most
