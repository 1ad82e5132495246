"""model/training/engine.py and model/training/mesh.py on two real processes: what a step does, reports and refuses."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.attention.plan.planner import plan_sequence
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import Mesh, build_mesh
from model.training.rank_batch import RankBatch
from model.training.settings import EngineSettings
from storage.errors import UserError
from testing.engine_state import differing, whole_state, whole_weights
from testing.law_batch import LENGTHS, global_batch, rank_batches, tiny_engine
from testing.padded_reference import PaddedReference
from tests.model.attention_groups import failure, run_in_processes
from tests.model.start_memory import N_LAYER, N_PARAMETERS, save_text_model, starts

SMALL = 16 << 20  # bytes of what a start imports and makes beside weights
WARM_UP = Schedule(peak=1e-2, warmup_steps=2)


def observe(group: Any, text_model: str) -> dict[str, Any]:
    """Everything the tests below look at, in one group of two ranks that share each sequence."""
    mesh = build_mesh(sp=2)
    batch, n_examples = rank_batches(mesh)
    seen: dict[str, Any] = {"mesh": (mesh.dp, mesh.sp, mesh.dp_rank, mesh.sp_rank, mesh.world_size)}
    seen["starts"] = starts(mesh, text_model)

    engine = tiny_engine(mesh, zero_stage=3, schedule=WARM_UP)
    initial = whole_weights(engine)
    seen["evaluated"] = engine.eval_step(batch, n_examples)
    engine.clock.read()
    seen["first"] = engine.train_step(batch, n_examples)
    seen["seconds"] = engine.clock.read()
    engine.eval_step(rank_batches(mesh, ulysses=2)[0], n_examples)  # each layer waits for the other rank
    seen["waited"] = engine.clock.read()
    seen["largest"] = mesh.largest([float(mesh.rank), -float(mesh.rank)])
    mixed = [two_sources(one) for one in batch]
    seen["by_source"] = engine.eval_step(mixed, n_examples)
    seen["after_first"], seen["initial"] = whole_weights(engine), initial
    seen["evaluated_twice"] = engine.eval_step([*batch, *batch], 2 * n_examples)
    seen["second"] = engine.train_step(batch, n_examples)
    seen["with_evaluation"] = [seen["first"].loss, seen["second"].loss, engine.train_step(batch, n_examples).loss]
    try:
        engine.train_step([*batch, *batch], n_examples)
    except ValueError as error:
        seen["too_many"] = str(error)
    engine.close()

    engine = tiny_engine(mesh, zero_stage=3, schedule=WARM_UP)
    seen["without_evaluation"] = [engine.train_step(batch, n_examples).loss for _ in range(3)]
    engine.close()

    for zero_stage in (1, 2, 3):
        seen["undisturbed", zero_stage] = evaluation_leaves_all(mesh, zero_stage)
    for zero_stage in (0, 1, 2, 3):
        seen["broken", zero_stage] = broken_step(tiny_engine(mesh, zero_stage=zero_stage), batch, n_examples)
        seen["spike", zero_stage] = spiking_step(mesh, zero_stage)
        for clip_norm in (0.0, 1e9):
            engine = tiny_engine(mesh, zero_stage=zero_stage, clip_norm=clip_norm)
            steps = [engine.train_step(batch, n_examples) for _ in range(2)]
            seen["clipped", zero_stage, clip_norm] = [(step.loss, step.grad_norm) for step in steps]
            engine.close()
    for zero_stage in (1, 2, 3):
        engine = tiny_engine(mesh, zero_stage=zero_stage, precision="bf16", eps=1e-8)
        seen["bf16", zero_stage] = [engine.train_step(batch, n_examples) for _ in range(8)]
        engine.close()

    seen["plans"] = differing_plans(mesh, batch[0], n_examples)
    seen["full_disk"] = failure(
        lambda: mesh.on_all_ranks(lambda: fail_on_rank(mesh.rank, OSError(errno.ENOSPC, "", "/d")))
    )
    seen["failure"] = failure(lambda: mesh.on_all_ranks(lambda: fail_on_rank(mesh.rank, KeyError("rank 1 alone"))))
    seen["agreed"] = (mesh.on_rank_zero(lambda: f"rank {mesh.rank}"), failure(lambda: mesh.on_rank_zero(lambda: 1 / 0)))
    seen["bad_sp"] = failure(lambda: build_mesh(sp=3))
    return seen


def differing_plans(mesh: Mesh, batch: RankBatch, n_examples: int) -> dict[str, str]:
    """What both ranks say where rank 1 has another plan than rank 0, by what is another in it."""
    engine, plan = tiny_engine(mesh, zero_stage=1), batch.plan
    cut = plan.cu_seqlens.copy()
    cut[1] += 1
    others = {
        "documents": replace(plan, cu_seqlens=cut),
        "layout": plan_sequence(plan.cu_seqlens, plan.sp, "contiguous", plan.ulysses, plan.route),
        "route": replace(plan, route="relay"),
    }
    said = {}
    for what, other in others.items():
        mine = replace(batch, plan=other if mesh.rank == 1 else plan)
        for step in (engine.train_step, engine.eval_step):
            said[f"{what} {step.__name__}"] = str(failure(lambda: step([mine], n_examples)))  # noqa: B023
    engine.close()
    return said


def evaluation_leaves_all(mesh: Mesh, zero_stage: int) -> bool:
    """Whether weights, moments and random states come out to the bit as without evaluations between the steps, which
    have another number of micro-batches.
    """
    batch, n_examples = rank_batches(mesh, grad_accum=2)
    states = []
    for evaluated in ([], [*batch, batch[0]]):
        torch.manual_seed(5)
        engine = tiny_engine(mesh, zero_stage=zero_stage, grad_accum=2)
        for _ in range(3):
            engine.train_step(batch, n_examples)
            if evaluated:
                engine.eval_step(evaluated, n_examples)
        states.append((whole_state(engine), torch.get_rng_state()))
        engine.close()
    (plain, random), (watched, random_after) = states
    return not differing(watched, plain) and torch.equal(random, random_after)


def two_sources(batch: RankBatch) -> RankBatch:
    """Every other token is of another source."""
    return replace(batch, source=torch.arange(len(batch.tokens)).to(torch.int16) % 2, n_sources=2)


def broken_step(engine: TrainingEngine, batch: list, n_examples: int) -> tuple[bool, float, float]:
    """Whether a step with a gradient that is not finite left the weights alone, its norm, and the next step's loss."""
    before = whole_weights(engine)
    broken = [replace(batch[0], loss_weight=batch[0].loss_weight * torch.inf)]
    norm = engine.train_step(broken, n_examples).grad_norm
    after = whole_weights(engine)
    same = before is None or all(torch.equal(after[name], before[name]) for name in before)
    loss = engine.train_step(batch, n_examples).loss
    engine.close()
    return same, norm, loss


def spiking_step(mesh: Mesh, zero_stage: int) -> tuple[bool, float, list[float], list[float]]:
    """Whether a step that is called a spike left the weights alone, its norm, the losses asked about and reported."""
    batch, n_examples = rank_batches(mesh, grad_accum=2)
    engine, asked = tiny_engine(mesh, zero_stage=zero_stage, grad_accum=2), []

    def is_spike(loss: float) -> bool:
        asked.append(loss)
        return len(asked) == 1

    before = whole_weights(engine)
    spike = engine.train_step(batch, n_examples, is_spike)
    after = whole_weights(engine)
    same = before is None or all(torch.equal(after[name], before[name]) for name in before)
    others = [engine.train_step(batch, n_examples, is_spike) for _ in range(2)]
    engine.close()
    return same, spike.grad_norm, asked, [step.loss for step in (spike, *others)]


def fail_on_rank(rank: int, error: Exception) -> None:
    if rank == 1:
        raise error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    text_model = tmp_path_factory.mktemp("text")
    save_text_model(text_model)
    return run_in_processes(observe, 2, str(text_model))


pytestmark = pytest.mark.slow


def test_neighbouring_ranks_share_a_sequence(ranks):
    assert [seen["mesh"] for seen in ranks] == [(1, 2, 0, 0, 2), (1, 2, 0, 1, 2)]


def test_every_rank_reports_the_whole_batch(ranks):
    batch, _ = global_batch()
    first = ranks[0]["first"]
    assert (first.step, first.tokens) == (0, len(batch[0].tokens))
    vision = (batch[0].labels >= 320) & (batch[0].loss_weight > 0)
    assert first.modalities["vision"].targets == vision.sum()
    assert first.modalities["text"].targets == ((batch[0].loss_weight > 0) & ~vision).sum()
    assert first.loss == pytest.approx(PaddedReference("vision-text").loss().item(), rel=1e-6)
    assert first.loss == pytest.approx(first.modalities["text"].loss + first.modalities["vision"].loss)
    assert 0 < first.modalities["text"].nats / first.modalities["text"].targets < 20
    assert replace(ranks[1]["first"], seconds=0) == replace(first, seconds=0)


@pytest.mark.parametrize("start", ["random", "stored"])
def test_at_zero_3_a_rank_starts_in_the_memory_of_its_shard_and_a_layer(ranks, start):
    bound = 4 * (N_PARAMETERS // 2 + N_LAYER) + SMALL
    assert bound < 0.8 * 4 * N_PARAMETERS, "the test could not fail"
    assert max(seen["starts"][start].grown for seen in ranks) < bound
    assert [seen["starts"][start].other for seen in ranks] == [[], []]


def test_below_zero_3_a_rank_starts_in_the_memory_of_the_weights_that_the_engine_keeps_and_a_layer(ranks):
    bound = 2 * N_PARAMETERS + 4 * N_LAYER + SMALL
    assert bound < 0.8 * 4 * N_PARAMETERS, "the test could not fail"
    assert max(seen["starts"]["replicated"].grown for seen in ranks) < bound


def test_the_losses_of_the_sources_sum_to_the_loss(ranks):
    first, mixed = ranks[0]["first"], ranks[0]["by_source"]
    assert [one.loss for one in first.sources] == [pytest.approx(first.loss, rel=1e-6)]
    assert [one.targets for one in first.sources] == [
        first.modalities["text"].targets + first.modalities["vision"].targets
    ]
    assert sum(one.loss for one in mixed.sources) == pytest.approx(mixed.loss, rel=1e-6)
    assert sum(one.nats for one in mixed.sources) == pytest.approx(
        mixed.modalities["text"].nats + mixed.modalities["vision"].nats, rel=1e-6
    )
    assert (
        sum(one.targets for one in mixed.sources)
        == mixed.modalities["text"].targets + mixed.modalities["vision"].targets
    )
    assert 0 < mixed.sources[0].loss != mixed.sources[1].loss > 0
    assert ranks[1]["by_source"].sources == mixed.sources


def test_documents_alone_are_useful(ranks):
    batch, _ = global_batch()
    lengths = np.diff(batch[0].cu_seqlens)[batch[0].source[batch[0].cu_seqlens[:-1]] >= 0]
    assert sorted(lengths.tolist()) == sorted(LENGTHS)
    assert ranks[0]["first"].useful_tokens == sum(LENGTHS) < ranks[0]["first"].tokens
    assert ranks[0]["first"].useful_pairs == sum(length * (length + 1) // 2 for length in LENGTHS)


def test_a_step_knows_its_parts_and_how_long_it_waited_for_others(ranks):
    for seen in ranks:
        seconds = seen["seconds"]
        assert set(seconds) >= {"forward", "backward", "update"}
        assert set(seen["waited"]) == {"communication"}
        assert 0 < seen["waited"]["communication"] < 10
        assert seconds["forward"] + seconds["backward"] + seconds["update"] < seen["first"].seconds
        assert seen["largest"] == [1.0, 0.0]


def test_evaluation_is_the_loss_of_a_step_without_the_step(ranks):
    first, evaluated = ranks[0]["first"], ranks[0]["evaluated"]
    assert evaluated.loss == pytest.approx(first.loss, rel=1e-9)
    assert evaluated.modalities["vision"].nats == pytest.approx(first.modalities["vision"].nats, rel=1e-9)
    assert ranks[0]["evaluated_twice"].loss == pytest.approx(first.loss, rel=1e-9)
    assert ranks[0]["evaluated_twice"].modalities["text"].targets == 2 * first.modalities["text"].targets
    assert ranks[0]["with_evaluation"] == ranks[0]["without_evaluation"]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_evaluation_between_steps_leaves_weights_moments_and_random_states_to_the_bit(ranks, zero_stage):
    assert all(seen["undisturbed", zero_stage] for seen in ranks)


def test_the_first_update_under_warm_up_changes_nothing(ranks):
    assert (ranks[0]["first"].lr, ranks[0]["second"].lr) == (0.0, 5e-3)
    assert all(torch.equal(ranks[0]["after_first"][name], w) for name, w in ranks[0]["initial"].items())
    assert ranks[0]["without_evaluation"][2] < ranks[0]["without_evaluation"][1]


def test_the_number_of_micro_batches_is_the_engines(ranks):
    assert ranks[0]["too_many"] == "an engine of grad_accum 1 was given 2 micro-batches"


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_leaves_the_weights(ranks, zero_stage):
    same, norm, loss = ranks[0]["broken", zero_stage]
    assert same
    assert not math.isfinite(norm)
    assert loss == pytest.approx(ranks[0]["first"].loss, rel=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_spike_leaves_the_weights_and_is_judged_by_the_global_loss(ranks, zero_stage):
    for seen in ranks:
        same, norm, asked, losses = seen["spike", zero_stage]
        assert same
        assert math.isnan(norm)
        assert asked == losses, "on every rank the loss that is reported"
        assert losses[1] == losses[0], "nothing was learnt"
        assert losses[2] < losses[1]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_clip_norm_of_0_clips_nothing_and_tells_the_norm(ranks, zero_stage):
    steps = ranks[0]["clipped", zero_stage, 0.0]
    assert steps == ranks[0]["clipped", zero_stage, 1e9]
    (_, norm), (loss, _) = steps
    assert norm == pytest.approx(ranks[0]["first"].grad_norm, rel=1e-5)
    assert loss < ranks[0]["first"].loss


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_learns_as_fp32_does_at_first(ranks, zero_stage):
    steps = ranks[0]["bf16", zero_stage]
    assert steps[0].loss == pytest.approx(ranks[0]["first"].loss, rel=2e-3)
    assert steps[0].grad_norm == pytest.approx(ranks[0]["first"].grad_norm, rel=1e-2)
    assert steps[-1].loss < 0.75 * steps[0].loss
    assert steps[-1].loss == pytest.approx(ranks[0]["bf16", 2][-1].loss, rel=1e-2)


def test_one_rank_that_fails_fails_all(ranks):
    for seen in ranks:
        assert isinstance(seen["full_disk"], UserError)
        assert str(seen["full_disk"]) == "/d: the disk is full; free space or write elsewhere"
        assert isinstance(seen["failure"], KeyError)


def test_what_rank_0_says_or_fails_at_holds_for_all(ranks):
    for seen in ranks:
        answer, error = seen["agreed"]
        assert answer == "rank 0"
        assert isinstance(error, ZeroDivisionError)


def test_ranks_of_a_sequence_that_planned_it_differently_say_so_instead_of_waiting(ranks):
    parts = {"documents": "document boundaries", "layout": "layouts", "route": "rings, Ulysses degrees or routes"}
    for seen in ranks:
        assert len(seen["plans"]) == 2 * len(parts)
        for name, said in seen["plans"].items():
            expected = "ranks 0 and 1 share a sequence, but planned micro-batch 0 with different "
            assert said.startswith(f"{expected}{parts[name.split()[0]]}: ")


def test_sp_must_divide_the_workers(ranks):
    assert isinstance(ranks[0]["bad_sp"], UserError)
    assert str(ranks[0]["bad_sp"]) == "sp = 3 does not divide the 2 training workers; choose a divisor of 2"


@pytest.mark.parametrize(
    "wrong", [{"zero": 4}, {"zero": 0, "precision": "bf16"}, {"precision": "fp16"}, {"grad_accum": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        EngineSettings(**wrong)


@pytest.mark.slow
def test_what_deepspeed_imports_for_an_optimizer_that_is_not_used_loads_no_compiler() -> None:
    code = (
        "import sys; from model.training import engine; import deepspeed; engine._import_muon_uncompiled();"
        "assert 'deepspeed.runtime.zero.muon.original_muon' in sys.modules;"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
