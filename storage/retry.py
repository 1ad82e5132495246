"""Calling again what fails for a while: how often, how long between, and what is logged meanwhile."""

from __future__ import annotations

import logging
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

    def seconds(self, attempt: int) -> float:
        """The pause after an attempt, the first of which is 1."""
        return self.pause * float(self.growth) ** (attempt - 1)


REQUEST = Backoff(attempts=7, pause=0.5)
"""Of a request to a store that has answered before: half a minute of pauses."""
STORE_AWAY = Backoff(attempts=20, pause=30.0, growth=1.0)
"""Of work that would cost more to give up than to wait for a store: ten minutes, on top of those of each request."""

_WARN_EVERY_SECONDS = 60.0
_warned: dict[str, float] = {}


def retry(
    action: Callable[[], T],
    what: str,
    backoff: Backoff,
    *,
    is_transient: Callable[[Exception], bool] = errors.is_transient,
    topic: str | None = None,
    warn: bool = True,
) -> T:
    """What `action` returns; while its errors are transient it is called again, as often as `backoff` says.

    what: failed just now, for a warning that is logged once a minute and topic (None: each failure is logged).
    warn: False where another rank that fails alike logs it. Raises the last error.
    """
    for attempt in range(1, backoff.attempts):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            if warn and _is_due(topic):
                reason = getattr(error, "reason", "") or f"{type(error).__name__}: {error}"
                log.warning("%s (%s); trying again, up to %d times", what, reason, backoff.attempts - attempt)
            time.sleep(backoff.seconds(attempt) * random.uniform(0.8, 1.2))
    return action()


def _is_due(topic: str | None) -> bool:
    now = time.monotonic()
    if topic is None or now - _warned.get(topic, -_WARN_EVERY_SECONDS) >= _WARN_EVERY_SECONDS:
        _warned[topic or ""] = now
        return True
    return False
