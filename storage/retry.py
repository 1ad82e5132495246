"""Repeating a call that fails for a while: how often, with what pauses, and what is logged meanwhile."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from storage import errors

log = logging.getLogger(f"ringworld.{__name__}")

T = TypeVar("T")


@dataclass(frozen=True)
class Backoff:
    """attempts: calls at most. pause: seconds before the second one; each pause is `growth` times the one before."""

    attempts: int
    pause: float
    growth: float = 2.0


REQUEST = Backoff(attempts=7, pause=0.5)
"""For a request to a store that has answered before: half a minute of pauses."""
STORE_AWAY = Backoff(attempts=20, pause=30.0, growth=1.0)
"""For work that costs more to give up than to wait: ten minutes of pauses, besides those of each request."""

_WARN_EVERY_SECONDS = 60.0
_warned: dict[str | None, float] = {}


def retry(
    action: Callable[[], T],
    what: str,
    backoff: Backoff,
    *,
    is_transient: Callable[[Exception], bool] = errors.is_transient,
    topic: str | None = None,
    warn: bool = True,
    pause_of: Callable[[Exception], float] = lambda error: 0.0,
) -> T:
    """What `action` returns; it is called again while its errors are transient, as `backoff` allows. Raises the last.

    what: the failure, for a warning that is logged once a minute for each topic (None: every time). warn: False where
    another rank that fails in the same way logs it. pause_of: the seconds that an error asks for at least.
    """
    for attempt in range(1, backoff.attempts):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            now = time.monotonic()
            if warn and (topic is None or now - _warned.get(topic, -math.inf) >= _WARN_EVERY_SECONDS):
                _warned[topic] = now
                reason = getattr(error, "reason", "") or f"{type(error).__name__}: {error}"
                log.warning("%s (%s); trying again, up to %d times", what, reason, backoff.attempts - attempt)
            pause = backoff.pause * backoff.growth ** (attempt - 1) * random.uniform(0.8, 1.2)
            time.sleep(max(pause, pause_of(error)))
    return action()
