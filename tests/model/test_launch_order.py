"""One order for all: what the ranks launch on the world, on their sequence's group and on their weights' group.

NCCL deadlocks where two ranks run operations of two communicators in different orders. gloo does not, so what real
processes launch is recorded, and run through as NCCL would at worst: one after another on each rank.
"""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from model.layers.memory_settings import MemorySettings
from model.training.mesh import Mesh, build_mesh
from testing.launch_order import Launch, launches, left_waiting
from testing.law_batch import rank_batches, tiny_engine
from tests.model.attention_groups import run_in_processes

RANKS = 4
AHEAD = {"stage3_param_persistence_threshold": 0}
ONE_BY_ONE = AHEAD | {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
"""Weights gathered ahead of their use, of so small a model all at once; and each as it is used, as of a large one."""
WORLD, FIRST, LAST = Launch("w", (0, 1, 2, 3), False), Launch("s", (0, 1), False), Launch("s", (2, 3), False)


def ring(*ranks: int) -> Launch:
    return Launch("s", tuple(sorted(ranks)), True)


def test_ranks_that_launch_in_one_order_all_end() -> None:
    first, last = [FIRST, WORLD, ring(0, 1), WORLD], [WORLD, LAST, LAST, WORLD]
    assert left_waiting([first, first, last, last]) == {}
    assert left_waiting([[ring(0, 1)], [ring(0, 1, 2)], [ring(1, 2)], []]) == {}, "one batch a rank, whoever is in it"


def test_ranks_that_launch_in_two_orders_are_left_waiting() -> None:
    assert set(left_waiting([[FIRST, WORLD], [WORLD, FIRST], [WORLD], [WORLD]])) == {0, 1, 2, 3}
    others = [[ring(0, 1), ring(0, 2)], [ring(0, 2), ring(1, 2)]]
    assert left_waiting([others[0], [ring(0, 1), ring(1, 2)], others[1], []]) == {}
    assert left_waiting([others[0], [ring(1, 2), ring(0, 1)], others[1], []]) != {}
    assert left_waiting([[WORLD], [WORLD], [WORLD], []]) == {rank: WORLD for rank in range(3)}


def train(mesh: Mesh, options: dict[str, int]) -> None:
    memory = MemorySettings("all-but-attention", mlp_tile=50)
    engine = tiny_engine(mesh, zero_stage=3, grad_accum=2, zero_group=2, memory=memory, zero_options=options)
    for layout, route in product(("contiguous", "zigzag", "shared-0.5%"), ("direct", "relay")):
        engine.train_step(*rank_batches(mesh, 2, layout=layout, route=route))
    for ulysses in (1, 2):
        engine.eval_step(*rank_batches(mesh, 2, ulysses=ulysses))
    engine.close()


def observe(group: Any) -> dict[str, Any]:
    mesh = build_mesh(2, timeout=timedelta(seconds=77))
    with launches() as launched:
        for options in (AHEAD, ONE_BY_ONE):
            train(mesh, options)
    assert mesh.sp_group is not None
    timeout = mesh.sp_group._get_backend(torch.device("cpu")).options._timeout
    return {"launched": launched, "order": os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"], "timeout": timeout}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_in_processes(observe, RANKS)


@pytest.mark.faults
@pytest.mark.slow
def test_all_ranks_launch_the_operations_of_their_three_groups_in_one_order(ranks: list[dict[str, Any]]) -> None:
    of_ranks = [seen["launched"] for seen in ranks]
    assert left_waiting(of_ranks) == {}
    for rank, launched in enumerate(of_ranks):
        names = {launch.group for launch in launched}
        assert len(names) == 4, "the world, two that share a sequence, and two that hold all weights, for each engine"
        assert {len(launch.ranks) for launch in launched} == {2, 4}
        turns = sum(before.group != after.group for before, after in pairwise(launched))
        assert turns > 100, f"rank {rank}'s groups hardly take turns: the test shows nothing"
        assert any(launch.is_exchange for launch in launched)


@pytest.mark.faults
@pytest.mark.slow
def test_one_turn_taken_the_other_way_round_is_noticed(ranks: list[dict[str, Any]]) -> None:
    of_ranks = [list(seen["launched"]) for seen in ranks]
    mine = of_ranks[1]
    turn = next(n for n, (one, other) in enumerate(pairwise(mine)) if one.is_exchange and not other.is_exchange)
    mine[turn : turn + 2] = mine[turn + 1], mine[turn]
    assert left_waiting(of_ranks) != {}


@pytest.mark.faults
@pytest.mark.slow
def test_nccl_is_told_to_keep_the_order_and_groups_wait_as_long_as_the_world(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["order"] == "1"
        assert seen["timeout"] == timedelta(seconds=77)


def test_an_order_that_the_environment_says_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0")
    build_mesh()
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "0"
