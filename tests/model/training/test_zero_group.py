"""ZeRO-3 over groups: the law, the memory and the checkpoints of four ranks, two of which hold all weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model import checkpoint
from model.layers.memory_settings import MemorySettings
from model.memory_estimate.plan import parameter_counts
from model.memory_estimate.zero import Sizes, zero_bytes
from model.training.engine import TrainingEngine
from model.training.mesh import Mesh, build_mesh
from model.training.settings import EngineSettings
from storage.errors import UserError
from storage.store import Store
from testing.engine_state import differing, whole_state, whole_weights
from testing.law_batch import rank_batches, relative_difference, tiny_config, tiny_engine
from testing.padded_reference import PaddedReference
from tests.model.attention_groups import failure, run_in_processes
from tests.model.checkpoint.saving import save_checkpoint
from tests.model.test_gradient_law import STEPS, TOLERANCE, Case, assert_padded_training, train
from tests.model.test_memory_law import EVERYTHING

RANKS, GROUP = 4, 2
RELEASING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""So that a model as small as this one lets go of its weights between forward and backward, as a large one does."""


def cases(grad_accum: int) -> list[Case]:
    """Engines with groups and without, one after another in the same processes."""
    by_memory = [Case(3, grad_accum, memory=memory) for memory in (MemorySettings(), EVERYTHING)]
    both = [case._replace(zero_group=group) for case in by_memory for group in (GROUP, None)]
    return [*both, Case(3, 1, objective="text", zero_group=RANKS)]


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize(("sp", "grad_accum"), [(1, 1), (2, 2)])
def test_groups_change_no_gradient_and_no_weight(sp: int, grad_accum: int) -> None:
    reference = {objective: PaddedReference(objective).train(STEPS) for objective in ("vision-text", "text")}
    per_rank = run_in_processes(train, RANKS, sp, cases(grad_accum))
    assert_padded_training(per_rank, reference, f"groups of {GROUP}, sp {sp}")
    for case in cases(grad_accum)[:4:2]:
        (gradient, weights, metrics), plain = (per_rank[0][each] for each in (case, case._replace(zero_group=None)))
        assert differing(gradient, plain[0]) == [], "the same sums in the same order"
        assert [differing(*states) for states in zip(weights, plain[1])] == [[]] * STEPS
        assert [step.loss for step in metrics] == [step.loss for step in plain[2]]


def observe(group: Any, url: str) -> dict[str, Any]:
    """All that the tests below look at, in one group of processes."""
    mesh, seen = build_mesh(2), {}
    engine = tiny_engine(mesh, zero_stage=3, grad_accum=2, zero_group=GROUP, zero_options=RELEASING)
    batch, n_examples = rank_batches(mesh, grad_accum=2)
    seen["gathered"] = gathered(engine, batch, n_examples)
    save_checkpoint(engine, Store(url), {})
    seen["saved"], seen["loss"] = whole_state(engine), engine.eval_step(batch, n_examples).loss
    seen["held"] = held(engine)
    further = [engine.train_step(batch, n_examples).loss for _ in range(2)]
    checkpoint.load_latest(engine, Store(url))
    seen["gone back"] = engine.eval_step(batch, n_examples).loss
    seen["again"] = [engine.train_step(batch, n_examples).loss for _ in range(2)] == further
    engine.close()
    seen["uneven"] = failure(lambda: tiny_engine(mesh, zero_stage=3, zero_group=3))
    seen["plain"] = loaded(mesh, url)
    seen["without a ring"] = loaded(build_mesh(), url, zero_group=GROUP)
    with kept_copies():
        engine = tiny_engine(mesh, zero_stage=3, grad_accum=2, zero_group=GROUP)
        for _ in range(STEPS):
            engine.train_step(batch, n_examples)
        seen["stale"] = whole_weights(engine)
        engine.close()
    return seen


def gathered(engine: TrainingEngine, batch: Any, n_examples: int) -> list[Counter]:
    """Elements that gathers fetch in the first micro-batch of a step and in its second, by the ranks they are from."""
    from deepspeed.runtime.zero import partition_parameters

    engine.train_step(batch, n_examples)  # DeepSpeed learns the order of the modules
    gather, fetched = partition_parameters._dist_allgather_fn, [Counter(), Counter()]
    forward, number = engine._forward, iter(fetched)
    now = [Counter()]

    def counted(own: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        now[0][dist.get_world_size(group)] += whole.numel()
        return gather(own, whole, group)

    def numbered(micro_batch: Any) -> Any:
        now[0] = next(number)
        return forward(micro_batch)

    partition_parameters._dist_allgather_fn, engine._forward = counted, numbered
    engine.train_step(batch, n_examples)
    partition_parameters._dist_allgather_fn, engine._forward = gather, forward
    return fetched


def held(engine: TrainingEngine) -> int:
    """Bytes of weights that this rank has after a pass: its share of the world's, and of its group's."""
    parts = [(p.ds_tensor, p.ds_secondary_tensor) for p in engine.model.parameters()]
    return sum(part.nbytes for both in parts for part in both if part is not None)


def loaded(mesh: Mesh, url: str, zero_stage: int = 3, **settings: Any) -> tuple[dict[str, torch.Tensor], float]:
    engine = tiny_engine(mesh, zero_stage=zero_stage, **settings)
    checkpoint.load_latest(engine, Store(url))
    found = whole_state(engine), engine.eval_step(*rank_batches(mesh)).loss
    engine.close()
    return found


@contextmanager
def kept_copies() -> Iterator[None]:
    """A mutation: what is held for the group outlives the update."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    right, Optimizer.invalidate_secondary_tensor = Optimizer.invalidate_secondary_tensor, lambda self: None
    yield
    Optimizer.invalidate_secondary_tensor = right


def on_two(group: Any, url: str) -> dict[str, Any]:
    return {"two": loaded(build_mesh(2), url), "two, ZeRO 1": loaded(build_mesh(), url, zero_stage=1)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    url = str(tmp_path_factory.mktemp("groups"))
    of_four = run_in_processes(observe, RANKS, url)
    return [{**seen, **run} for seen, run in zip(of_four, [*run_in_processes(on_two, 2, url), {}, {}])]


@pytest.mark.faults
@pytest.mark.slow
def test_only_the_first_forward_after_an_update_gathers_from_the_world(ranks: list[dict[str, Any]]) -> None:
    n_parameters = parameter_counts(tiny_config())[0]
    for seen in ranks:
        first, second = seen["gathered"]
        assert n_parameters <= first[RANKS] < 1.01 * n_parameters, "each weight once"
        assert n_parameters <= first[GROUP] < 1.01 * n_parameters, "again for the backward"
        assert RANKS not in second
        assert 2 * n_parameters <= second[GROUP] < 2.02 * n_parameters


@pytest.mark.faults
@pytest.mark.slow
def test_a_rank_holds_the_weights_that_the_plan_of_its_memory_says(ranks: list[dict[str, Any]]) -> None:
    n_parameters, layer, _ = parameter_counts(tiny_config())
    settings = EngineSettings(3, grad_accum=2, zero_group=GROUP)
    planned = zero_bytes(Sizes(n_parameters, layer, layer), settings, RANKS, kept_share=0, on_cuda=False).weights
    assert planned == pytest.approx(4 * n_parameters * (1 / RANKS + 1 / GROUP), abs=8)
    for seen in ranks:
        assert planned <= seen["held"] < 1.01 * planned


@pytest.mark.faults
@pytest.mark.slow
def test_a_checkpoint_knows_of_no_groups(ranks: list[dict[str, Any]]) -> None:
    saved = ranks[0]["saved"]
    for name in ("plain", "without a ring", "two", "two, ZeRO 1"):
        state, loss = ranks[0][name]
        assert differing(state, saved) == [], name
        assert loss == pytest.approx(ranks[0]["loss"], rel=1e-6), name


@pytest.mark.faults
@pytest.mark.slow
def test_what_is_held_for_the_group_is_that_of_the_checkpoint_gone_back_to(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["gone back"] == seen["loss"]
        assert seen["again"]


@pytest.mark.faults
@pytest.mark.slow
def test_the_law_notices_weights_of_before_the_update(ranks: list[dict[str, Any]]) -> None:
    _, weights, _ = PaddedReference("vision-text").train(STEPS)
    assert relative_difference(ranks[0]["stale"], weights[-1]) > 100 * TOLERANCE


@pytest.mark.faults
@pytest.mark.slow
def test_a_group_that_does_not_divide_the_workers_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert isinstance(seen["uneven"], UserError)
        assert str(seen["uneven"]) == "zero_group 3 does not divide the 4 training workers; choose a divisor of 4"


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_groups_are_of_zero_3(zero: int) -> None:
    with pytest.raises(ValueError, match=f"zero_group 2 needs ZeRO stage 3, not {zero}; set zero: 3 or drop it"):
        EngineSettings(zero, zero_group=2)


def test_a_rank_alone_is_no_group() -> None:
    with pytest.raises(ValueError, match="zero_group must be 2 or more ranks, not 1"):
        EngineSettings(3, zero_group=1)
