"""A rank alone on a device computes what it would among others, by either route and with any Ulysses degree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu.fast.stand_in import RankAlone, ring_of
from model.attention.plan.hardware import AttentionShape
from model.attention.plan.options import Route
from model.attention.plan.planner import plan_sequence

CUTS = np.array([0, 300, 330, 512])


@pytest.mark.parametrize(("route", "ulysses"), [("direct", 1), ("direct", 2), ("relay", 1)])
def test_every_rank_alone_computes_what_attention_over_the_whole_sequence_does(route: Route, ulysses: int) -> None:
    shape = AttentionShape(heads=4, kv_heads=2, head_size=16)
    plan = ring_of(plan_sequence(CUTS, 8, route=route, ulysses=ulysses, shape=shape))
    assert plan.ring == 8 // ulysses
    ranks = [RankAlone(plan, rank, 4 // ulysses, 2 // ulysses, 16, torch.device("cpu")) for rank in range(plan.ring)]
    assert max(alone.difference() for alone in ranks) < 4e-3
    assert sum(alone.n_pairs for alone in ranks) == sum(n * (n + 1) // 2 for n in np.diff(CUTS).tolist())
    assert max(alone.n_keys for alone in ranks) > plan.tokens_per_rank, "some rank needs others' keys"


def test_calls_can_be_repeated() -> None:
    plan = plan_sequence(CUTS, 4, ulysses=1, shape=AttentionShape(heads=2, kv_heads=1, head_size=16))
    alone = RankAlone(plan, 2, 2, 1, 16, torch.device("cpu"))
    first, again = (alone.forward() for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(x, y) for x, y in zip(alone.backward(first), alone.backward(again), strict=True))
