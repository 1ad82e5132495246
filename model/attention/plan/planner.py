"""The planner: the layout, Ulysses degree and route of least modelled time for one packed sequence.

In: document boundaries, ranks, the layer's shape, the hardware. Out: a `SequencePlan`, the same on every rank, as sums
are of integers. Balance is not the aim: many short documents are best left where they are, and a looser balance that
shares fewer documents can win where the network is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import numpy as np

from model.attention.plan.balanced_layout import shared_over_fewest
from model.attention.plan.cost_model import Cost, direct_cost, relay_cost
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.layouts import Assignment, contiguous, zigzag
from model.attention.plan.options import Route
from model.attention.plan.segments import cut_at_documents, traffic
from model.attention.plan.sequence_plan import SequencePlan

TOLERANCES = (0.005, 0.03, 0.1, 0.3)


LAYOUTS: dict[str, Callable[[np.ndarray, int], Assignment]] = {
    "contiguous": lambda cu_seqlens, ranks: contiguous(int(cu_seqlens[-1]), ranks),
    "zigzag": lambda cu_seqlens, ranks: zigzag(int(cu_seqlens[-1]), ranks),
    **{f"shared-{100 * tolerance:g}%": partial(shared_over_fewest, tolerance=tolerance) for tolerance in TOLERANCES},
}

TIGHTEST = f"shared-{100 * TOLERANCES[0]:g}%"
FIRST = ("contiguous", "zigzag", TIGHTEST)
LOOSER = tuple(name for name in LAYOUTS if name not in FIRST)


@dataclass(frozen=True)
class Candidate:
    """One way to share a sequence, and its modelled cost."""

    layout: str
    ulysses: int
    route: Route
    assignment: Assignment
    cost: Cost


def plan_sequence(
    cu_seqlens: np.ndarray,
    sp: int,
    layout: str | None = None,
    ulysses: int | None = None,
    route: Route | None = None,
    shape: AttentionShape | None = None,
    hardware: Hardware | None = None,
) -> SequencePlan:
    """Plan a packed sequence over `sp` ranks: the candidate of least modelled time.

    cu_seqlens: integers [n_documents + 1], document boundaries from 0 to S. layout (one of `LAYOUTS`), ulysses, route:
    narrow the choice. shape, hardware: of the modelled time; without a shape, LWM 7B's and no Ulysses. Takes tens of
    milliseconds at S = 1M over 512 ranks. Raises ValueError on boundaries that do not ascend from 0, where sp does not
    divide S, on an unknown layout, and on a Ulysses degree that does not divide sp and the kv heads.
    """
    boundaries = np.ascontiguousarray(cu_seqlens, dtype=np.int64)
    if len(boundaries) < 2 or boundaries[0] != 0 or (np.diff(boundaries) <= 0).any():
        raise ValueError("cu_seqlens does not ascend from 0 without empty documents")
    if shape is None:
        shape, ulysses = AttentionShape(), ulysses or 1
    hardware = hardware or Hardware()
    layouts = FIRST if layout is None else (layout,)
    seconds = attrgetter("cost.seconds")
    best = min(candidates(boundaries, sp, layouts, ulysses, route, shape, hardware), key=seconds)
    if layout is None and best.ulysses < sp:  # looser balance is tried at the best degree only
        looser = candidates(boundaries, sp, LOOSER, best.ulysses, route, shape, hardware)
        best = min(best, *looser, key=seconds)
    return SequencePlan(boundaries, best.assignment, sp // best.ulysses, best.ulysses, best.route, best.layout)


def candidates(
    cu_seqlens: np.ndarray,
    sp: int,
    layouts: Sequence[str],
    ulysses: int | None,
    route: Route | None,
    shape: AttentionShape,
    hardware: Hardware,
) -> Iterator[Candidate]:
    """Ways to share a sequence by these layouts, with their costs: of every degree and route, or of those given."""
    n_tokens = int(cu_seqlens[-1])
    if unknown := [name for name in layouts if name not in LAYOUTS]:
        raise ValueError(f"layout {unknown[0]!r} is none of {', '.join(LAYOUTS)}")
    if sp < 1 or n_tokens % sp:
        raise ValueError(f"{n_tokens} tokens cannot be shared equally by {sp} ranks")
    if ulysses is not None and (sp % ulysses or shape.kv_heads % ulysses):
        raise ValueError(f"a Ulysses degree of {ulysses} does not divide {sp} ranks and {shape.kv_heads} kv heads")
    costs: dict[Route, Callable[..., Cost]] = {"direct": direct_cost, "relay": relay_cost}
    for degree in [ulysses] if ulysses else ulysses_degrees(sp, shape, hardware):
        ring = sp // degree
        for name in layouts if ring > 1 else layouts[:1]:
            assignment = LAYOUTS[name](cu_seqlens, ring)
            counted = traffic(cut_at_documents(cu_seqlens, assignment, ring), ring)
            for way, cost_of in costs.items():
                # Between two ranks a relay is the direct route.
                if route == way or (route is None and (way == "direct" or ring > 2)):
                    cost = cost_of(counted, n_tokens // ring, degree, shape, hardware)
                    yield Candidate(name, degree, way, assignment, cost)


def ulysses_degrees(sp: int, shape: AttentionShape, hardware: Hardware) -> list[int]:
    """Degrees that divide the kv heads and the ranks, and whose ranks lie within one node."""
    node = min(sp, hardware.ranks_per_node)
    return [u for u in range(1, node + 1) if sp % u == 0 and shape.kv_heads % u == 0 and node % u == 0]
