"""Trying again where a store is away for a while, when giving up would cost more than waiting."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import is_transient

ATTEMPTS, PAUSE = 20, 30.0
"""How often, and the seconds between; a store's client has asked several times before it tells of a failure."""

log = logging.getLogger(f"ringworld.{__name__}")

T = TypeVar("T")


def retry(action: Callable[[], T], what: str, warn: bool = True) -> T:
    """What `action` returns; while its errors are transient, it is called up to `ATTEMPTS` times.

    what: is tried, for the warning at each failure. warn: whether to warn; of ranks that fail alike, one does.
    """
    for attempt in itertools.count(1):
        try:
            return action()
        except Exception as error:
            if attempt == ATTEMPTS or not is_transient(error):
                raise
            if warn:
                log.warning("%s: %s; trying again in %g s", what, error, PAUSE)
            time.sleep(PAUSE)
    raise AssertionError("there is no last attempt")
