"""The law holds whatever is computed again, tiled, kept on the host or fused: no gradient and no weight changes.

Each way to keep less at each ZeRO stage, alone and with all else that saves memory, by torch's own kernels and by
compiled ones, on 1, 2 and 4 real gloo processes against `PaddedReference`; and with keys in a ring whose ranks are
Ulysses pairs.
"""

from __future__ import annotations

import pytest

from model.layers.memory_settings import MemorySettings
from model.training.mesh import build_mesh
from testing.law_batch import N_SEQUENCES, relative_difference
from testing.padded_reference import PaddedReference
from testing.sharings import Sharing, gradients_by_sharing
from tests.model.attention_groups import run_in_processes
from tests.model.test_gradient_law import STEPS, TOLERANCE, Case, assert_padded_training, train

EVERYTHING = MemorySettings("all-but-attention", True, 50, True, True)  # no length is a multiple of 50
CASES = {
    (1, 1): [
        Case(1, 1, memory=MemorySettings("mlp", mlp_tile=50)),
        Case(2, 2, memory=MemorySettings("full", mlp_tile=50, offload_optimizer=True)),
        Case(3, 2, memory=EVERYTHING),
        Case(2, 1, memory=MemorySettings("all-but-attention"), kernels="compile"),
    ],
    (1, 2): [
        Case(1, 1, memory=MemorySettings("mlp")),
        Case(2, 2, memory=MemorySettings("all-but-attention")),
        Case(3, 1, memory=MemorySettings("full")),
        Case(3, 2, memory=MemorySettings("keep", mlp_tile=50)),
        Case(1, 2, memory=MemorySettings("full", True, offload_optimizer=True)),
        Case(2, 1, memory=MemorySettings("all-but-attention", True, 50, offload_optimizer=True)),
        Case(3, 1, memory=MemorySettings("mlp", offload_optimizer=True, offload_parameters=True)),
        Case(3, 2, memory=EVERYTHING),
        Case(1, 1, kernels="compile"),
        Case(2, 2, memory=MemorySettings("mlp"), kernels="compile"),
        Case(3, 1, memory=MemorySettings("full"), kernels="compile"),
        Case(3, 2, memory=EVERYTHING, kernels="compile"),
    ],
    (2, 2): [
        Case(2, 1, memory=MemorySettings("all-but-attention", True, 50, True)),
        Case(3, 1, memory=EVERYTHING),
        Case(3, 1, memory=MemorySettings("keep", mlp_tile=50), kernels="compile"),
    ],
}
SHARINGS = [Sharing("zigzag", 2, "direct"), Sharing("shared-0.5%", 2, "relay"), Sharing("contiguous", 1, "relay")]


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple]:
    return {"vision-text": PaddedReference("vision-text").train(STEPS)}


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("dp", "sp"), CASES)
def test_training_that_saves_memory_equals_padded_training(dp, sp, reference):
    per_rank = run_in_processes(train, dp * sp, sp, CASES[dp, sp])
    assert_padded_training(per_rank, reference, f"dp{dp}sp{sp}")


@pytest.mark.slow
@pytest.mark.faults
def test_training_that_saves_memory_equals_padded_training_over_ulysses_and_ring(reference):
    expected, _, _ = reference["vision-text"]
    for by_kernels in run_in_processes(share_lean, 4):
        assert {kernels: len(gradients) for kernels, gradients in by_kernels.items()} == {"torch": 3, "compile": 1}
        for kernels, gradients in by_kernels.items():
            for sharing, gradient in gradients.items():
                assert relative_difference(gradient, expected) < TOLERANCE, (kernels, sharing)


def share_lean(group: object) -> dict[str, dict]:
    lean = {"zero_stage": 3, "grad_accum": N_SEQUENCES, "memory": EVERYTHING}
    some = {"torch": SHARINGS, "compile": SHARINGS[:1]}
    mesh = build_mesh(4)
    return {
        kernels: gradients_by_sharing(mesh, sharings, kernels=kernels, **lean) for kernels, sharings in some.items()
    }
