"""Block kernels: results over blocks of keys merge to the whole, on the CPU and through the CUDA path's bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention import flash_kernels as kernels
from model.attention.flash_kernels import attend, attend_, attend_backward_
from model.attention.plan.planner import plan_sequence
from model.attention.plan.runs import Run
from testing.dense_attention import dense_results, random_tensors, relative_error
from testing.packed_attention import packed_results
from testing.varlen_attention import varlen_backward, varlen_forward

# One document of 40 tokens whose keys come in two blocks, [0, 24) and [24, 40), and a second document of 8 tokens.
BLOCKS = [
    (slice(0, 24), [Run(0, 24, 0, 24, True), Run(24, 40, 0, 24, False)]),
    (slice(24, 48), [Run(24, 40, 0, 16, True), Run(40, 48, 16, 24, True)]),
]
# The same pairs with keys in several runs and queries that are no neighbours.
SCRAMBLED = [
    (slice(24, 48), [Run(40, 48, 16, 24, True), Run(24, 40, 0, 16, True)]),
    (slice(0, 24), [Run(32, 40, 0, 24, False), Run(0, 24, 0, 24, True), Run(24, 32, 10, 24, False)]),
    (slice(0, 10), [Run(24, 32, 0, 10, False)]),
]


def shifted(runs: list[Run], keys: int) -> list[Run]:
    return [run._replace(k_start=run.k_start + keys, k_end=run.k_end + keys) for run in runs]


def by_blocks(tensors: list[Tensor], blocks: list[tuple[slice, list[Run]]]) -> list[Tensor]:
    """[out, dq, dk, dv], one call of each kernel a block of keys."""
    q, k, v, grad = tensors
    own = [run for keys, runs in blocks for run in shifted(runs, keys.start) if run.causal]
    out, lse = attend(q, k, v, own)
    for keys, runs in blocks:
        attend_(out, lse, q, k[keys], v[keys], [run for run in runs if not run.causal])
    out = out.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    for keys, runs in blocks:
        attend_backward_(dq, dk[keys], dv[keys], grad, q, k[keys], v[keys], out, lse, runs)
    return [out, dq, dk, dv]


@pytest.mark.parametrize("blocks", [BLOCKS, list(reversed(BLOCKS)), SCRAMBLED])
def test_blocks_of_keys_in_any_order_merge_to_the_whole(blocks: list) -> None:
    tensors = random_tensors(48, 4, 2, 24, torch.float64)
    reference = dense_results(tensors, np.array([0, 40, 48]))
    assert max(relative_error(x, r) for x, r in zip(by_blocks(tensors, blocks), reference)) <= 1e-12


def test_large_scores_overflow_nowhere() -> None:
    q, k, v, grad = random_tensors(48, 4, 2, 24, torch.float64)
    tensors = [200 * q, k, v, grad]
    results = by_blocks(tensors, BLOCKS)
    reference = dense_results(tensors, np.array([0, 40, 48]))
    assert all(torch.isfinite(x).all() for x in results)
    assert max(relative_error(x, r) for x, r in zip(results, reference)) <= 1e-10


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    tensors = random_tensors(48, 4, 4, 24, torch.float32)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    for x, y in zip(by_blocks(tensors, BLOCKS), by_blocks(strided, BLOCKS)):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "accumulator"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_results_are_accumulated_in_single_precision_or_better(dtype: torch.dtype, accumulator: torch.dtype) -> None:
    x = torch.zeros(3, 2, 8, dtype=dtype)
    out, lse = attend(x, x, x, [Run(0, 3, 0, 3, True)])
    assert out.dtype == lse.dtype == accumulator


def test_the_cuda_path_calls_operators_as_torch_declares_them() -> None:
    # On the meta device torch checks the call and infers the shapes without a GPU.
    tensors = [x.to("meta") for x in random_tensors(48, 4, 2, 20, torch.bfloat16)]
    out, dq, dk, dv = by_blocks(tensors, BLOCKS)
    assert out.shape == dq.shape == (48, 4, 20)
    assert dk.shape == dv.shape == (48, 2, 20)


@pytest.mark.parametrize("blocks", [BLOCKS, SCRAMBLED])
@pytest.mark.parametrize("size", [20, 24])
def test_the_cuda_path_gathers_and_scatters_the_right_rows(
    blocks: list, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_cuda_forward", varlen_forward)
    monkeypatch.setattr(kernels, "_cuda_backward", varlen_backward)
    monkeypatch.setattr(kernels, "_on_cpu", lambda q: False)
    tensors = random_tensors(48, 4, 2, size, torch.float64)
    reference = dense_results(tensors, np.array([0, 40, 48]))
    assert max(relative_error(x, r) for x, r in zip(by_blocks(tensors, blocks), reference)) <= 1e-12


@pytest.mark.parametrize("route", ["direct", "relay"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_attention_makes_no_cu_seqlens_where_a_batch_has_brought_those_of_its_plan(
    route: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, on four ranks: each tensor made of host data would be a blocking copy to a GPU."""
    monkeypatch.setattr(kernels, "_cuda_forward", varlen_forward)
    monkeypatch.setattr(kernels, "_cuda_backward", varlen_backward)
    monkeypatch.setattr(kernels, "_on_cpu", lambda q: False)
    cu_seqlens = np.array([0, 37, 38, 90, 128])
    tensors = random_tensors(128, 4, 2, 24, torch.float64)
    made = []
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name), made))

    plan = plan_sequence(cu_seqlens, 4, layout, 1, route)
    results = packed_results(tensors, plan)
    assert made, "without those of a batch the first call of each kind makes its own"
    plan = plan_sequence(cu_seqlens, 4, layout, 1, route)
    for rank in range(4):
        made.clear()
        kernels.CallBounds(plan.rank(rank)).to("cpu")
        assert len(made) == 1
    made.clear()
    again = packed_results(tensors, plan)
    assert made == []
    reference = dense_results(tensors, cu_seqlens)
    assert max(relative_error(x, r) for x, r in zip(results, reference)) <= 1e-12
    assert all(torch.equal(x, y) for x, y in zip(results, again))


def counted(make: Callable[..., Tensor], made: list[Tensor]) -> Callable[..., Tensor]:
    """`make`, which notes the int32 tensors: of the others the test itself cuts the sequence up."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.dtype == torch.int32:
            made.append(tensor)
        return tensor

    return call


@pytest.mark.parametrize("scores", [7, 2**24])
def test_tiles_of_scores_give_what_the_kernel_gives(monkeypatch, scores):
    """What fp32 takes on a GPU, run here: both kinds of runs, grouped-query heads, tiles of one query and of all."""
    monkeypatch.setattr(kernels, "DENSE_SCORES", scores)
    q, k, v, _ = random_tensors(20, 4, 2, 8, torch.float32)
    runs = [Run(0, 8, 0, 8, True), Run(8, 20, 3, 20, False)]
    out, lse = attend(q, k, v, runs)
    for a, b, tile_out, tile_lse in kernels._forward_dense(q, k, v, runs, None):
        torch.testing.assert_close(tile_out, out[a:b])
        torch.testing.assert_close(tile_lse, lse[a:b])
