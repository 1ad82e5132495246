"""The choices that a recipe may make of how a sequence is shared, free of slow imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from storage.setting_types import Positive

Layout = Literal["contiguous", "zigzag", "shared-0.5%", "shared-3%", "shared-10%", "shared-30%"]
Route = Literal["direct", "relay"]


@dataclass(frozen=True)
class AttentionOptions:
    """How a sequence is shared by its sp ranks; None leaves a choice to the planner."""

    layout: Layout | None = None
    """Which tokens each rank holds: contiguous, zigzag, or shared-0.5% to shared-30%, which share each document over
    the fewest ranks that keep the work of all within so much of its mean."""
    ulysses: Positive | None = None
    """Neighbouring ranks that split the heads among them instead of the keys; divides sp and the model's kv heads."""
    route: Route | None = None
    """`direct` sends each rank the keys it needs, `relay` passes all keys on from neighbour to neighbour."""

    def unfit_for(self, kv_heads: int) -> str | None:
        """What is wrong with these choices for a model of `kv_heads`, or None."""
        if self.ulysses is None or kv_heads % self.ulysses == 0:
            return None
        return f"ulysses {self.ulysses} does not divide the model's {kv_heads} kv heads; choose a divisor"
