"""The chunked two-softmax loss is the dense one, at a bounded cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.llama.loss import LossHead, token_nll
from testing.dense_loss import dense_nll
from tests.model.peak_memory import Widths, peak_bytes
from tests.model.two_modalities import TwoSoftmaxes

TEXT, VISION, WIDTH = 48, 24, 16
RANGES = (range(TEXT), range(TEXT, TEXT + VISION))


def weighted_loss(hidden, weight, labels, weights, ranges, chunk=1024):
    """Sum of weight x negative log-likelihood; a target of weight 0 is not computed."""
    labels = labels.masked_fill(weights == 0, -1)
    return (weights * token_nll(hidden, weight, labels, ranges, chunk)).sum()


def inputs(n, seed=0, low=-1, high=TEXT + VISION, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(TEXT + VISION, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(low, high, (n,), generator=generator), torch.randn(n, generator=generator)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 40), chunk=st.integers(1, 50), seed=st.integers(0, 999), kind=st.sampled_from(["text", "both"]))
def test_nll_and_gradients_equal_the_dense_formula_for_any_chunk(n, chunk, seed, kind):
    hidden, weight, labels, upstream = inputs(n, seed, high=TEXT if kind == "text" else TEXT + VISION)
    nll = token_nll(hidden, weight, labels, RANGES, chunk)
    ours = torch.autograd.grad((nll * upstream).sum(), (hidden, weight))
    reference = dense_nll(hidden, weight, labels, RANGES)
    theirs = torch.autograd.grad((reference * upstream).sum(), (hidden, weight))
    # A logit near 16, of WIDTH products summed in fp32, is off by a few of its roundings.
    torch.testing.assert_close(nll.double(), reference, rtol=1e-6, atol=1e-5)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * max(1, n))


def test_gradients_pass_gradcheck_in_double():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 9))
    labels = torch.tensor([0, 5, 8, -1, 6])
    assert torch.autograd.gradcheck(lambda h, w: token_nll(h, w, labels, (range(6), range(6, 9)), 2), (hidden, weight))


def test_targets_without_weight_change_nothing_and_get_no_gradient():
    hidden, weight, labels, weights = inputs(32, low=0)
    weights = weights.masked_fill(torch.arange(32) % 3 == 0, 0.0)
    weighted_loss(hidden, weight, labels, weights, RANGES, chunk=5).backward()
    assert hidden.grad[::3].abs().max() == 0
    expected = (weights.double() * dense_nll(hidden, weight, labels, RANGES)).sum()
    assert weighted_loss(hidden, weight, labels, weights, RANGES).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_rank_without_targets_still_reaches_its_parameters():
    hidden, weight, _, weights = inputs(4)
    weighted_loss(hidden, weight, torch.full((4,), -100), weights, RANGES).backward()
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_text_alone_never_touches_the_vision_rows():
    hidden, weight, labels, weights = inputs(64, low=0, high=TEXT)
    with Widths() as widths:
        weighted_loss(hidden, weight, labels, weights, RANGES, chunk=16).backward()
    assert TEXT in widths.seen
    assert VISION not in widths.seen
    assert TEXT + VISION not in widths.seen


def test_memory_is_bounded_by_the_chunk_and_not_by_all_logits():
    n, text, vision, chunk = 4096, 3072, 1024, 128
    hidden = torch.randn(n, 8).requires_grad_()
    weight = torch.randn(text + vision, 8).requires_grad_()
    labels = torch.arange(n) % (text + vision)

    def step():
        weighted_loss(
            hidden, weight, labels, torch.ones(n), (range(text), range(text, text + vision)), chunk
        ).backward()

    all_logits, a_chunk = 4 * n * (text + vision), 4 * chunk * text
    peak = peak_bytes(step)
    assert peak < all_logits / 10
    assert peak > a_chunk, "the profiler saw nothing"
    assert peak < 3 * a_chunk + 10 * n * 8 * 4


def test_bf16_weights_accumulate_their_gradient_in_fp32():
    """Many small chunks: summed in bf16 the gradient would stall; in fp32 it is within a rounding of the true one."""
    hidden, weight, labels, _ = inputs(2048, dtype=torch.bfloat16, low=0)
    token_nll(hidden, weight, labels, RANGES, chunk=4).sum().backward()
    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    dense_nll(exact_h, exact_w, labels, RANGES).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad.double() - exact_w.grad).norm() / exact_w.grad.norm() < 5e-3


def test_the_head_gives_logits_or_nats_from_one_weight():
    head = LossHead.adopt(linear := torch.nn.Linear(WIDTH, TEXT + VISION, bias=False))
    hidden, _, labels, _ = inputs(9, low=0)
    assert head.weight is linear.weight
    torch.testing.assert_close(head(hidden), linear(hidden))
    torch.testing.assert_close(head(hidden, labels, RANGES), token_nll(hidden, linear.weight, labels, RANGES))


def test_under_autocast_the_matmuls_run_in_its_dtype():
    hidden, weight, labels, _ = inputs(64, low=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = token_nll(hidden, weight, labels, RANGES)
    nll.sum().backward()
    rounded = token_nll(hidden.bfloat16(), weight.bfloat16(), labels, RANGES)
    assert torch.equal(nll, rounded)
    assert weight.grad.dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels, _ = inputs(4)
    with pytest.raises(ValueError, match=r"\[T, D\] and \[T\]"):
        token_nll(hidden.unsqueeze(0), weight, labels, RANGES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("high", [TEXT, TEXT + VISION])
def test_text_and_vision_are_to_the_bit_what_they_were_when_there_were_no_others(dtype, high):
    ours, theirs = ([*inputs(200, high=high, dtype=dtype)] for _ in range(2))
    now = token_nll(*ours[:3], RANGES, 16)
    before = TwoSoftmaxes.apply(*theirs[:3], TEXT, 16)
    assert torch.equal(now, before)
    (now * ours[3]).sum().backward()
    (before * theirs[3]).sum().backward()
    for mine, other in zip(ours[:2], theirs[:2]):
        assert mine.grad.abs().sum() > 0
        assert torch.equal(mine.grad, other.grad)


def test_each_of_three_modalities_has_a_softmax_of_its_own():
    ranges = (range(30), range(30, 60), range(60, TEXT + VISION))
    hidden, weight, labels, upstream = inputs(64, low=0)
    nll = token_nll(hidden, weight, labels, ranges, 7)
    assert all(((labels >= ids.start) & (labels < ids.stop)).any() for ids in ranges)
    reference = dense_nll(hidden, weight, labels, ranges)
    torch.testing.assert_close(nll.double(), reference, rtol=1e-6, atol=1e-5)
    ours, theirs = (torch.autograd.grad((one * upstream).sum(), (hidden, weight)) for one in (nll, reference))
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
