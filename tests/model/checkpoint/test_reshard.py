"""A checkpoint goes to any number of ranks, any mesh and any ZeRO stage, and the training after it is the same.

One run is taken from mesh to mesh, two steps on each, with two parameter groups: 2 ranks of ZeRO 1, a sequence-parallel
pair of ZeRO 3, a lone rank of ZeRO 2, four ranks of ZeRO 3. Beside it runs one that nobody disturbs.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import pytest
import torch

from model import checkpoint
from model.training.mesh import Mesh, build_mesh
from storage.store import Store
from testing.engine_state import MOMENTS, adam_counters, differing, whole_state
from testing.law_batch import rank_batches, relative_difference, tiny_engine
from tests.model.attention_groups import run_in_processes
from tests.model.checkpoint.saving import save_checkpoint

pytestmark = pytest.mark.slow

STEPS = 8
LEG = 2
TOLERANCE = 1e-6

log = logging.getLogger(__name__)


class Leg(NamedTuple):
    """Some steps on one mesh: what was loaded, what was left, and what the optimizer's groups and counters say."""

    loaded: dict[str, torch.Tensor]
    left: dict[str, torch.Tensor]
    losses: list[float]
    decay: list[float]
    counters: set[int]
    random: torch.Tensor


def run(mesh: Mesh, zero_stage: int, source: str | None, target: str | None, steps: int = LEG, **settings: Any) -> Leg:
    """Load, train and save."""
    engine = tiny_engine(mesh, zero_stage=zero_stage, **{"decay": "matrices", **settings})
    if source is not None:
        assert checkpoint.load_latest(engine, Store(source)) == {"position": engine.step}
    random, loaded = torch.get_rng_state(), whole_state(engine) if source is not None else {}
    batch, n_examples = rank_batches(mesh)
    losses = [engine.train_step(batch, n_examples).loss for _ in range(steps)]
    if target is not None:
        save_checkpoint(engine, Store(target), {"position": engine.step})
    decay = [group["weight_decay"] for group in engine.deepspeed.optimizer.param_groups]
    leg = Leg(loaded, whole_state(engine), losses, decay, adam_counters(engine), random)
    engine.close()
    return leg


def on_two(group: Any, url: str) -> dict[str, Leg]:
    """The undisturbed runs, and the first two legs."""
    wide, long = build_mesh(1), build_mesh(2)
    legs = {
        "undisturbed": run(wide, 1, None, None, STEPS),
        "first": run(wide, 1, None, f"{url}/first"),
        "second": run(long, 3, f"{url}/first", f"{url}/second"),
        "undisturbed bf16": run(wide, 2, None, None, 2 * LEG, precision="bf16"),
        "first bf16": run(wide, 2, None, f"{url}/bf16", precision="bf16"),
    }
    for zero_stage in (1, 3):
        legs[f"bf16 {zero_stage}"] = run(wide, zero_stage, f"{url}/bf16", None, precision="bf16")
    return legs


def on_one(group: Any, url: str) -> dict[str, Leg]:
    """The third leg, at another stage again; and bf16's masters on a lone rank."""
    mesh = build_mesh()
    return {
        "third": run(mesh, 2, f"{url}/second", f"{url}/third"),
        "plain": run(mesh, 0, f"{url}/second", None),
        "bf16 alone": run(mesh, 3, f"{url}/bf16", None, 0, precision="bf16"),
    }


def on_four(group: Any, url: str) -> dict[str, Any]:
    """The last leg; once more at stage 0; and another model's engine."""
    legs: dict[str, Any] = {
        "last": run(build_mesh(2), 3, f"{url}/third", None),
        "last again": run(build_mesh(2), 3, f"{url}/third", None),
        "replicated": run(build_mesh(1), 0, f"{url}/third", f"{url}/replicated", 0),
        "sharded again": run(build_mesh(4), 1, f"{url}/replicated", None, 0),
    }
    return legs


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Leg]]:
    """All legs, by rank; where there are fewer ranks, those of the first ones."""
    url = str(tmp_path_factory.mktemp("resharded"))
    of_ranks: list[dict[str, Leg]] = [{}, {}, {}, {}]
    for size, function in ((2, on_two), (1, on_one), (4, on_four)):
        for seen, legs in zip(of_ranks, run_in_processes(function, size, url), strict=False):
            seen |= legs
    return of_ranks


@pytest.fixture(scope="module")
def legs(ranks: list[dict[str, Leg]]) -> dict[str, Leg]:
    return ranks[0]


@pytest.mark.parametrize(
    ("loaded", "left"),
    [
        ("second", "first"),
        ("third", "second"),
        ("plain", "second"),
        ("last", "third"),
        ("replicated", "third"),
        ("sharded again", "third"),
        ("bf16 1", "first bf16"),
        ("bf16 3", "first bf16"),
        ("bf16 alone", "first bf16"),
    ],
)
def test_master_weights_and_moments_are_what_was_saved_to_the_bit(legs: dict[str, Leg], loaded: str, left: str) -> None:
    assert len(legs[left].left) == 3 * 21
    assert differing(legs[loaded].loaded, legs[left].left) == []


def test_a_run_over_four_meshes_is_the_undisturbed_one(legs: dict[str, Leg]) -> None:
    undisturbed = legs["undisturbed"]
    route = [loss for name in ("first", "second", "third", "last") for loss in legs[name].losses]
    assert route == pytest.approx(undisturbed.losses, rel=TOLERANCE)
    weights, moments = (
        relative_difference(*({name: leg.left[name] for name in leg.left if is_moment(name) == kind} for leg in pair))
        for pair in [(legs["last"], undisturbed)]
        for kind in (False, True)
    )
    log.info("after %d steps over four meshes: weights %.1e, moments %.1e", STEPS, weights, moments)
    assert weights < TOLERANCE
    assert moments < 10 * TOLERANCE, "averages of gradients, which ranks add up in another order"
    assert legs["plain"].losses == pytest.approx(legs["third"].losses, rel=TOLERANCE)


def is_moment(name: str) -> bool:
    return name.endswith(MOMENTS)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_carries_on_at_another_stage(legs: dict[str, Leg], zero_stage: int) -> None:
    undisturbed, resharded = legs["undisturbed bf16"], legs[f"bf16 {zero_stage}"]
    assert resharded.losses == pytest.approx(undisturbed.losses[LEG:], rel=TOLERANCE)
    assert relative_difference(resharded.left, undisturbed.left) < TOLERANCE


def test_each_group_keeps_its_settings_and_no_counter_counts_twice(ranks: list[dict[str, Leg]]) -> None:
    for seen in ranks:
        for name, leg in seen.items():
            assert leg.decay == [0.1, 0.0], name
    for name, steps in {"first": 2, "second": 4, "third": 6, "last": 8, "plain": 6, "bf16 3": 4}.items():
        assert ranks[0][name].counters == {steps}, name


def test_random_numbers_are_each_ranks_own_or_derived(ranks: list[dict[str, Leg]]) -> None:
    for seen in ranks:
        assert torch.equal(seen["last"].random, seen["last again"].random)
    derived = [seen["last"].random for seen in ranks]
    assert all(not torch.equal(one, other) for i, one in enumerate(derived) for other in derived[:i])
