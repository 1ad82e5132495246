"""What a rank holds at once: in proportion to its share of the sequence, however long the sequence is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from model.attention.plan.options import Route
from model.attention.plan.planner import LAYOUTS
from model.attention.plan.runs import AHEAD
from model.attention.plan.sequence_plan import SequencePlan
from model.attention.ring import packed_ring_attention
from tests.model.attention_groups import run_in_processes
from tests.model.peak_memory import peak_bytes

HEADS, KV_HEADS, SIZE, ITEMSIZE = 4, 2, 32, 4
CASES: list[tuple[str, Route]] = [("zigzag", "direct"), ("zigzag", "relay"), ("shared-0.5%", "direct")]


def peaks(group: dist.ProcessGroup, plans: list[SequencePlan]) -> list[tuple[int, int]]:
    """This rank's peak of one forward and backward in bytes, and the most keys of one stage, for each plan."""
    rank = dist.get_rank(group)
    results = []
    for plan in plans:
        generator = torch.Generator().manual_seed(rank)
        shapes = [(plan.tokens_per_rank, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        *inputs, grad = (torch.randn(shape, generator=generator) for shape in shapes)
        stages = plan.rank(rank).stages

        def step() -> None:
            q, k, v = (x.detach().requires_grad_() for x in inputs)  # noqa: B023
            packed_ring_attention(q, k, v, plan, group).backward(grad)  # noqa: B023

        step()
        results.append((peak_bytes(step), max(stage.n_keys for stage in stages)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["one document", pytest.param("several", marks=pytest.mark.faults)])
def test_peak_grows_with_the_share_and_the_keys_in_flight_and_not_with_the_sequence(mix: str) -> None:
    per_token: dict[tuple, list[float]] = {}
    for sp in (4, 8):
        plans = []
        for share in (128, 256, 512):
            s = share * sp
            boundaries = np.array([0, s] if mix == "one document" else [0, s // 2, s // 2 + 16, 7 * s // 8, s])
            plans += [SequencePlan(boundaries, LAYOUTS[name](boundaries, sp), sp, 1, way) for name, way in CASES]
        by_rank = run_in_processes(peaks, sp, plans)
        for i, plan in enumerate(plans):
            share = plan.tokens_per_rank
            for peak, stage_keys in (of_rank[i] for of_rank in by_rank):
                # Queries, keys, values, output, their gradients and accumulators; blocks of keys and of gradients.
                own = share * (6 * HEADS + 8 * KV_HEADS) * SIZE * ITEMSIZE
                in_flight = 2 * (AHEAD + 1) * stage_keys * 2 * KV_HEADS * SIZE * ITEMSIZE
                assert peak <= own + in_flight
                assert stage_keys <= 2 * share
            worst = max(of_rank[i][0] for of_rank in by_rank)
            per_token.setdefault((sp, CASES[i % len(CASES)]), []).append(worst / share)
    for bytes_per_token in per_token.values():  # three sizes of the sequence, the same bytes for each token of a share
        assert max(bytes_per_token) <= 1.25 * min(bytes_per_token)
    for (
        case
    ) in CASES:  # the sequence twice as long over twice the ranks: until enough stages are there to fill the pipe
        assert per_token[8, case][-1] <= 1.5 * per_token[4, case][-1]
