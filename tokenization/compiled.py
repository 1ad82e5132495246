"""Functions compiled by numba, which are cached on disk where that is possible.

In: a function of numpy arrays and numbers that calls only such functions. Out: the same function, compiled at its first
call; it releases the GIL while it runs, so that a loader's thread does not delay training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba

logger = logging.getLogger(f"ringworld.{__name__}")

Function = TypeVar("Function", bound=Callable)


def compiled(function: Function) -> Function:
    """The compiled function; where no cache can be written, every process compiles it again."""
    njit: Any = numba.njit
    try:
        return njit(cache=True, nogil=True)(function)
    except Exception as error:  # a read-only home, a full disk, a damaged cache on a network drive
        logger.info("no numba cache for %s (%s); compiling in memory", function.__name__, error)
        return njit(nogil=True)(function)
