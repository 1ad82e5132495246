"""What of a plan can be asked for by name. Apart from the planner, which takes a compiler to import."""

from __future__ import annotations

from typing import Literal

Layout = Literal["contiguous", "zigzag", "shared-0.5%", "shared-3%", "shared-10%", "shared-30%"]
"""Which tokens each rank holds; "shared" ones keep the work of all ranks within so much of its mean."""
Route = Literal["direct", "relay"]
"""How keys travel: to exactly those who need them, or on from neighbour to neighbour."""
