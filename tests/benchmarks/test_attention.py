"""`ringworld bench attention`: every system executed, with one result, in real processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.attention import Settings, _digest, _padded, _same
from benchmarks.lwm_ring import LwmRing
from benchmarks.peers import PEERS, pad_documents
from benchmarks.slow import SlowExchange
from jobs.cli import main
from model.attention.p2p import NoExchange
from model.attention.plan.sequence_plan import SequencePlan


def test_every_systems_plan_shares_the_sequence_over_all_ranks() -> None:
    plans = Settings(ranks=4, context=1024, mix="lwm", seed=1).plans()
    assert list(plans) == ["ours", *PEERS]
    assert all(plan.sp == 4 for plan in plans.values())
    assert plans["zigzag"].route == plans["contiguous"].route == "relay"
    assert plans["min_heap"].route == plans["per_document_zigzag"].route == "direct"
    assert plans["per_document_zigzag"].n_tokens > 1024


def test_padding_puts_zeros_behind_each_document() -> None:
    cu_seqlens = np.array([0, 3, 8])
    padded = _padded(torch.arange(1, 9)[:, None], cu_seqlens, pad_documents(cu_seqlens, 2))
    assert padded[:, 0].tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 8, 0, 0, 0]


def test_an_lwm_ring_of_one_rank_is_masked_attention() -> None:
    settings = Settings(ranks=1, context=96, mix="one", heads=2, kv_heads=2, head_size=16)
    tensors = settings.tensors()
    plan = SequencePlan(np.array([0, 40, 96]), settings.plans()["lwm_ring"].assignment, 1)
    found = LwmRing(NoExchange(), plan).forward_backward(*tensors)
    q, k, v = (x.double().transpose(0, 1).requires_grad_() for x in tensors[:3])
    document = np.repeat([0, 1], [40, 56])
    mask = torch.from_numpy((document[:, None] == document) & np.tri(96, dtype=bool))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = [out, *torch.autograd.grad(out, (q, k, v), tensors[3].double().transpose(0, 1))]
    for x, y in zip(found, expected):
        torch.testing.assert_close(x.transpose(0, 1).double(), y.detach(), rtol=1e-4, atol=1e-5)


def test_digests_tell_a_result_that_is_wrong_in_a_few_rows() -> None:
    settings = Settings(ranks=1, context=4096, mix="one")
    rows = settings.tensors()
    generator = torch.Generator().manual_seed(1)
    results = [torch.randn(x.shape, generator=generator) for x in (rows[0], *rows[:3])]
    rounded = [x * (1 + 1e-6 * torch.randn(x.shape, generator=generator)) for x in results]
    wrong = [x.clone() for x in results]
    wrong[2][100:140] = 0
    digest = _digest(results, rows)
    assert _same([_digest(rounded, rows)], [digest])
    assert not _same([_digest(wrong, rows)], [digest])


class Clock:
    """Time that passes only where somebody sleeps."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_slow_exchange_counts_what_comes_and_lets_it_arrive_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("benchmarks.slow.time", clock)
    slow = SlowExchange(NoExchange(), seconds_per_byte=0.01)
    first, second = (slow.start({}, {1: torch.zeros(100)}) for _ in range(2))
    clock.sleep(1)  # computing meanwhile
    first.wait()
    assert clock.now == 100 + 4
    second.wait()
    assert clock.now == 100 + 8
    slow.start({1: torch.zeros(100)}, {}).wait()  # sending takes this rank no longer
    assert clock.now == 100 + 8
    assert (slow.bytes_received, slow.exchanges) == (800, 2)


@pytest.mark.slow
@pytest.mark.faults
def test_the_benchmark_runs_in_processes_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    small = ["--ranks", "2", "--context", "2048", "--kv-heads", "2", "--rounds", "1", "--seed", "1"]
    assert main(["bench", "attention", *small, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert list(report["systems"]) == ["ours", *PEERS]
    for figures in report["systems"].values():
        assert len(figures["seconds_by_rank"]) == 2
        assert figures["slowest"] == max(figures["seconds_by_rank"]) > 0
    assert [claim["target"] for claim in report["claims"]] == [1.1, 5, 1.3]
    assert main(["bench", "attention", *small, "--slow-exchange", "0.01", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["seconds"] > 0
    assert report["seconds_slowed"] > 0
