"""The law of the project: the gradient of the same documents is the same number, however they are spread.

Packed over 1, 2 and 4 real gloo processes, at ZeRO 0-3, with and without accumulation, the first gradient and the
weights after each of four optimizer steps equal those of `PaddedReference`, which shares nothing with the engine but
the initial weights: no packing, no ring, no chunked loss, no DeepSpeed. So does the gradient by every layout, Ulysses
degree and route.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from model.layers.memory_settings import MemorySettings
from model.training.mesh import build_mesh
from model.training.micro_batch_loss import micro_batch_loss
from model.training.rank_batch import Dispatcher
from testing.engine_state import whole_gradient, whole_weights
from testing.law_batch import global_batch, rank_batches, relative_difference, tiny_engine, tiny_llama
from testing.padded_reference import PaddedReference
from testing.sharings import SHARINGS, Sharing, gradients_by_sharing
from tests.model.attention_groups import run_in_processes
from tokenization.loader.batch import MicroBatch

STEPS = 4
TOLERANCE = 1e-5
MESHES = {"dp1sp1": (1, 1), "dp1sp2": (1, 2), "dp2sp1": (2, 1), "dp2sp2": (2, 2)}

log = logging.getLogger(__name__)


class Case(NamedTuple):
    """One way to run the step on a mesh."""

    zero_stage: int
    grad_accum: int
    objective: str = "vision-text"
    memory: MemorySettings = MemorySettings()
    kernels: str = "torch"
    zero_group: int | None = None


CASES = [
    *(Case(zero_stage, grad_accum) for zero_stage, grad_accum in product((1, 2, 3), (1, 2))),
    Case(0, 1),
    Case(2, 2, objective="text"),
    Case(3, 1, objective="text"),
]


def train(group: Any, sp: int, cases: Sequence[Case] = CASES) -> dict[Case, tuple]:
    """The first gradient, the weights after each step and the metrics, of every case; in each process of a group."""
    mesh = build_mesh(sp)
    results = {}
    for case in cases:
        batch, n_examples = rank_batches(mesh, case.grad_accum, case.objective)
        engine = tiny_engine(
            mesh,
            zero_stage=case.zero_stage,
            grad_accum=case.grad_accum,
            memory=case.memory,
            kernels=case.kernels,
            zero_group=case.zero_group,
        )
        weights, metrics = [], []
        for step in range(STEPS):
            if step == 0:  # the two halves of `train_step`, to look at the gradient between them
                engine.accumulate(batch, n_examples)
                gradient = whole_gradient(engine)
                engine.update()
            else:
                metrics.append(engine.train_step(batch, n_examples))
            weights.append(whole_weights(engine))
        results[case] = (gradient, weights, metrics)
        engine.close()
    return results


def share(group: Any, sp: int) -> dict[Sharing, dict[str, torch.Tensor]]:
    return gradients_by_sharing(build_mesh(sp))


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple]:
    return {objective: PaddedReference(objective).train(STEPS) for objective in ("vision-text", "text")}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_packed_training_equals_padded_training(name, reference):
    dp, sp = MESHES[name]
    assert_padded_training(run_in_processes(train, dp * sp, sp), reference, name)


def assert_padded_training(per_rank: list[dict[Case, tuple]], reference: dict[str, tuple], name: str) -> None:
    """What `train` gave on every rank is what the padded reference gives, and the same on all."""
    differences = {}
    for case in per_rank[0]:
        expected_gradient, expected_weights, expected_losses = reference[case.objective]
        gradient, weights, metrics = per_rank[0][case]
        differences[case] = (
            relative_difference(gradient, expected_gradient),
            *(relative_difference(ours, theirs) for ours, theirs in zip(weights, expected_weights[1:], strict=True)),
        )
        assert [m.loss for m in metrics] == pytest.approx(expected_losses[1:], rel=TOLERANCE)
        for other in per_rank[1:]:
            assert all(torch.equal(other[case][0][key], gradient[key]) for key in gradient), "ranks disagree"
            assert [(m.loss, m.grad_norm) for m in other[case][2]] == [(m.loss, m.grad_norm) for m in metrics]
    report = "\n".join(
        f"{name} {tuple(case)}: gradient {d[0]:.1e}, weights by step {', '.join(f'{x:.1e}' for x in d[1:])}"
        for case, d in differences.items()
    )
    log.info("relative differences to padded training\n%s", report)
    assert max(x for d in differences.values() for x in d) < TOLERANCE, report


@pytest.mark.slow
@pytest.mark.parametrize("sp", [pytest.param(2, marks=pytest.mark.faults), 4])
def test_every_layout_ulysses_degree_and_route_gives_the_padded_gradient(sp, reference):
    expected, _, _ = reference["vision-text"]
    per_rank = run_in_processes(share, sp, sp)
    differences = {sharing: relative_difference(gradient, expected) for sharing, gradient in per_rank[0].items()}
    report = "\n".join(f"sp {sp} {tuple(sharing)}: gradient {x:.1e}" for sharing, x in differences.items())
    log.info("relative differences to the padded gradient\n%s", report)
    assert len(differences) == len(SHARINGS)
    assert max(differences.values()) < TOLERANCE, report
    for other in per_rank[1:]:
        assert all(
            torch.equal(other[sharing][name], x) for sharing in SHARINGS for name, x in per_rank[0][sharing].items()
        ), "ranks disagree"


@pytest.mark.slow
def test_the_law_notices_documents_that_attend_across():
    """The same tokens and weights with the boundaries removed give another gradient: the tolerance can fail."""
    expected, _, _ = PaddedReference("vision-text").train(1)
    gradients = []
    for naive in (False, True):
        (batch,), n_examples = global_batch()
        cu_seqlens = batch.cu_seqlens[[0, -1]] if naive else batch.cu_seqlens
        gradients.append(single_process_gradient(replace(batch, cu_seqlens=cu_seqlens), n_examples))
    exact, naive = (relative_difference(gradient, expected) for gradient in gradients)
    assert exact < TOLERANCE
    assert naive > 0.1


def single_process_gradient(batch: MicroBatch, n_examples: int) -> dict[str, torch.Tensor]:
    """The gradient of a micro-batch without an engine."""
    llama = tiny_llama()
    local_sum, _ = micro_batch_loss(llama, Dispatcher()(batch))
    (local_sum / n_examples).backward()
    return {name: p.grad for name, p in llama.named_parameters()}
