"""Block calls beside one call of the same work: reckoned anywhere, measured on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.kernels import block_costs, kernels_report
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.planner import plan_sequence
from storage.errors import UserError


def test_the_ideal_call_is_of_the_same_work() -> None:
    shape = AttentionShape(heads=2, kv_heads=1, head_size=16)
    plan = plan_sequence(np.array([0, 700, 1024]), 4, ulysses=1, shape=shape)
    costs = block_costs(plan, shape, torch.device("cpu"), torch.float32, peak=1e12)
    assert costs["pairs"] == max(plan.rank(rank).n_pairs for rank in range(4))
    per_pair = costs["blocks_seconds"] / costs["pairs"]
    assert costs["blocks_tflops"] == pytest.approx(4 * 2 * 16 * 3.5 / per_pair / 1e12)
    assert costs["blocks_over_ideal"] == pytest.approx(costs["ideal_tflops"] / costs["blocks_tflops"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="no CUDA device here"):
        kernels_report([4096], 4, "lwm", 0, AttentionShape(), Hardware())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured() -> None:
    report = kernels_report([16384], 8, "lwm", 0, AttentionShape(kv_heads=8), Hardware())
    assert report["rows"][0]["blocks_tflops"] < report["matrix_peak_tflops"]
    assert 0 < report["rows"][0]["blocks_share_of_peak"] < 1
