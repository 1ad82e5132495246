"""Which training steps to trace, as the command line names them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from storage.errors import UserError


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps of each train stage to trace, first <= step < end, on rank 0 or on all ranks."""

    first: int
    end: int
    all_ranks: bool = False

    @classmethod
    def parse(cls, text: str, all_ranks: bool = False) -> ProfiledSteps:
        """`A:B`, or `N` for N steps after the first, which warms up. Raises UserError on anything else."""
        given = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
        first, end = (0, 0) if given is None else (int(given[1] or 1), int(given[2]) + (given[1] is None))
        if first >= end:
            raise UserError(f"--profile {text}: give steps as A:B, from A up to B - 1, or as a number of steps")
        return cls(first, end, all_ranks)
