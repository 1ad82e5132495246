"""Every way in which ranks share a sequence, and the law's gradient by each of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product, starmap
from typing import Any, NamedTuple

import torch

from model.training.lr_schedule import Schedule
from model.training.mesh import Mesh
from testing.engine_state import whole_gradient
from testing.law_batch import N_SEQUENCES, rank_batches, tiny_engine


class Sharing(NamedTuple):
    """One way to share a sequence; what is None is the planner's choice."""

    layout: str | None = None
    ulysses: int | None = None
    route: str | None = None


SHARINGS = [Sharing(), *starmap(Sharing, product(("contiguous", "zigzag", "shared-0.5%"), (1, 2), ("direct", "relay")))]


def gradients_by_sharing(
    mesh: Mesh, sharings: Sequence[Sharing] = SHARINGS, **settings: Any
) -> dict[Sharing, dict[str, torch.Tensor]]:
    """The gradient by each of `sharings` at the initial weights, which a learning rate of 0 keeps. Collective.

    settings: of `tiny_engine`.
    """
    engine = tiny_engine(mesh, Schedule(peak=0.0), **{"zero_stage": 2, "grad_accum": N_SEQUENCES, **settings})
    gradients = {}
    for sharing in sharings:
        # A sequence a micro-batch, the first of them one document: however it is shared, some of it must travel.
        engine.accumulate(*rank_batches(mesh, N_SEQUENCES, **sharing._asdict()))
        gradients[sharing] = whole_gradient(engine)
        engine.update()
    engine.close()
    return gradients
