"""The plan of one packed sequence: who holds which tokens, who sends which keys to whom, what each kernel call sees.

The planner makes a `SequencePlan` on the host once per batch, and each rank derives its own `RankPlan` from it
(`rank_plan.py`). With a Ulysses degree u (arXiv 2309.14509), u neighbouring ranks act as one rank of a ring: they hold
its tokens in u equal shares and, for the attention itself, all its tokens for one u-th of the heads each. The ring then
has sp / u ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from model.attention.plan.layouts import Assignment
from model.attention.plan.options import Route
from model.attention.plan.rank_plan import direct_stages, relay_stages
from model.attention.plan.runs import RankPlan
from model.attention.plan.segments import Segments, cut_at_documents


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Who holds which tokens of one packed sequence, and how keys travel.

    cu_seqlens: int64 [n_documents + 1], from 0 to S. assignment: which rank of the ring holds which piece. ring: ranks
    of the ring; ulysses: ranks that act as one of them. route: "direct" sends each rank exactly the keys it needs,
    "relay" passes every rank's keys on from neighbour to neighbour. layout: the name of the assignment's layout.
    Raises ValueError unless the pieces tile the sequence and all ranks hold equally many tokens.
    """

    cu_seqlens: np.ndarray
    assignment: Assignment
    ring: int
    ulysses: int = 1
    route: Route = "direct"
    layout: str = ""
    _rank_plans: dict[int, RankPlan] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.cu_seqlens) < 2 or self.cu_seqlens[0] != 0 or (np.diff(self.cu_seqlens) <= 0).any():
            raise ValueError("cu_seqlens does not ascend from 0 without empty documents")
        start, owner = self.assignment
        if not len(start) == len(owner) or len(start) == 0 or start[0] != 0 or (self.piece_sizes <= 0).any():
            raise ValueError("the pieces do not ascend from 0 to the end of the sequence")
        if owner.min() < 0 or owner.max() >= self.ring:
            raise ValueError(f"a piece lies on none of the {self.ring} ranks of the ring")
        n_tokens = np.bincount(owner, self.piece_sizes, minlength=self.ring)
        if (n_tokens != n_tokens[0]).any() or int(n_tokens[0]) % self.ulysses:
            raise ValueError("the ranks do not hold equally many tokens")

    @property
    def sp(self) -> int:
        """Ranks that share the sequence."""
        return self.ring * self.ulysses

    @property
    def n_tokens(self) -> int:
        """S, tokens of the packed sequence."""
        return int(self.cu_seqlens[-1])

    @property
    def tokens_per_rank(self) -> int:
        """T = S / sp."""
        return self.n_tokens // self.sp

    @property
    def piece_sizes(self) -> np.ndarray:
        """int64 [n]: tokens of each piece of the assignment."""
        return np.diff(self.assignment.start, append=self.n_tokens)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [S]: each token's position in its document, from 0."""
        return np.arange(self.n_tokens) - np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_seqlens))

    @cached_property
    def fingerprint(self) -> dict[str, int]:
        """Hashes of 63 bits of the plan's parts, by name, which ranks compare before they start."""
        start, owner = self.assignment
        parts = {
            "document boundaries": self.cu_seqlens.astype(np.int64).tobytes(),
            "layouts": start.astype(np.int64).tobytes() + owner.astype(np.int64).tobytes(),
            "rings, Ulysses degrees or routes": repr((self.ring, self.ulysses, self.route)).encode(),
        }
        return {part: int.from_bytes(hashlib.sha256(data).digest()[:8]) >> 1 for part, data in parts.items()}

    def ring_indices(self, ring_rank: int) -> np.ndarray:
        """int64 [S / ring]: positions in the packed sequence of what a rank of the ring holds: its storage order."""
        mine = self.assignment.owner == ring_rank
        starts, sizes = self.assignment.start[mine], self.piece_sizes[mine]
        ends = np.cumsum(sizes)
        return np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1])

    def indices(self, rank: int) -> np.ndarray:
        """int64 [T]: positions in the packed sequence of what `rank` holds, ascending, which is its storage order."""
        ring_rank, part = divmod(rank, self.ulysses)
        return self.ring_indices(ring_rank)[part * self.tokens_per_rank : (part + 1) * self.tokens_per_rank]

    def rank(self, rank: int) -> RankPlan:
        """The part of the plan that `rank` executes, derived once."""
        if rank not in self._rank_plans:
            derive = direct_stages if self.route == "direct" else relay_stages
            local, stages = derive(self.segments, self.ring, rank, self.ulysses)
            self._rank_plans[rank] = RankPlan(self.n_tokens // self.ring, self.route, local, stages)
        return self._rank_plans[rank]

    @cached_property
    def segments(self) -> Segments:
        """The pieces cut at document boundaries."""
        return cut_at_documents(self.cu_seqlens, self.assignment, self.ring)
