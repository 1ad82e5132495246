"""Functions compiled by numba: from its cache on disk where it has one, else for this process alone.

In: a function over numpy arrays and numbers, calling nothing but others like it. Out: the same, compiled at its first
call, and releasing the interpreter while it runs, so that a loader's thread does not hold up the training beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba

logger = logging.getLogger(f"ringworld.{__name__}")

Function = TypeVar("Function", bound=Callable)


def compiled(function: Function) -> Function:
    """`function`, compiled; a cache that cannot be written costs seconds in every process, not the job."""
    njit: Any = numba.njit
    try:
        return njit(cache=True, nogil=True)(function)
    except Exception as error:  # a read-only home, a full disk, a damaged cache on a network drive
        logger.info("no numba cache for %s (%s); compiling in memory", function.__name__, error)
        return njit(nogil=True)(function)
