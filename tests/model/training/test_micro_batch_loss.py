"""One micro-batch's loss: packed equals padded, and the figures add up over any split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.llama.config import llama_config
from model.llama.llama import build_llama
from model.llama.loss import token_nll
from model.training.micro_batch_loss import MicroBatchLoss, micro_batch_loss
from model.training.rank_batch import Dispatcher
from tests.model.peak_memory import Widths
from tests.model.two_modalities import TwoSoftmaxes, two_sums
from tokenization.loader.batch import MicroBatch

TEXT, VOCABULARY = 40, 96
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.fixture
def model():
    return build_llama(llama_config(SIZES, {"text": TEXT, "vision": VOCABULARY - TEXT}, 64, 1e4), 0)


def documents(seed=0, high=VOCABULARY):
    """Token ids, and target weights as the loss defines them: 0.5 over the targets of a modality, some without loss."""
    generator = np.random.default_rng(seed)
    made = []
    for length in (13, 1, 7, 19):
        tokens = generator.integers(0, high, length)
        valid = (np.arange(length) > 0) & (generator.random(length) < 0.7)
        weight = np.zeros(length, dtype=np.float32)
        for modality in (tokens < TEXT, tokens >= TEXT):
            if (valid & modality).any():
                weight[valid & modality] = 0.5 / (valid & modality).sum()
        made.append((tokens, weight))
    return made


def batch(made):
    """Packed end to end: a position's label is the next token, and a document's last position has none."""
    tokens = np.concatenate([t for t, _ in made])
    labels = np.concatenate([np.append(t[1:], 0) for t, _ in made])
    weights = np.concatenate([np.append(w[1:], np.float32(0)) for _, w in made])
    boundaries = np.cumsum([0] + [len(t) for t, _ in made])
    return Dispatcher()(MicroBatch(tokens, labels, weights, boundaries, keys=()))


def test_packed_loss_sums_and_gradients_equal_the_documents_apart(model):
    made = documents()
    packed, sums = micro_batch_loss(model, batch(made))
    packed.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart = [micro_batch_loss(model, batch([document])) for document in made]
    sum(loss for loss, _ in apart).backward()
    assert packed.item() == pytest.approx(sum(loss.item() for loss, _ in apart), abs=1e-5)
    for name, value in sums.items():
        assert value.item() == pytest.approx(sum(part[name].item() for _, part in apart), abs=1e-5)
    for ours, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6)


def test_sums_are_weighted_nats_plain_nats_and_targets_of_each_modality(model):
    share = batch(documents())
    labels, weights = share.labels, share.loss_weight
    local_sum, sums = micro_batch_loss(model, share)
    packing = {"position_ids": share.positions[None], "plan": share.plan, "group": None}
    hidden = model.model(input_ids=share.tokens[None], **packing)
    nll = token_nll(
        hidden.last_hidden_state[0], model.lm_head.weight, labels, [range(TEXT), range(TEXT, VOCABULARY)]
    ).detach()
    for name, modality in (("text", labels < TEXT), ("vision", labels >= TEXT)):
        counted = modality & (weights > 0)
        assert sums[f"{name}_targets"].item() == counted.sum().item()
        assert sums[f"{name}_nll"].item() == pytest.approx(nll[counted].sum().item(), rel=1e-6)
        assert sums[f"{name}_weighted"].item() == pytest.approx((nll * weights)[counted].sum().item(), rel=1e-6)
    assert local_sum.item() == pytest.approx((sums["text_weighted"] + sums["vision_weighted"]).item(), rel=1e-6)
    assert not any(value.requires_grad for value in sums.values())


def test_the_sums_of_the_sources_are_those_of_their_documents(model):
    made = documents()
    share = batch(made)
    numbers = torch.tensor([0, 2, 2, -1])  # of four documents; the last stands for padding, whose targets count nowhere
    source = numbers.repeat_interleave(torch.tensor([len(t) for t, _ in made])).to(torch.int16)
    weight = share.loss_weight.masked_fill(source < 0, 0)
    _, sums = micro_batch_loss(model, replace(share, loss_weight=weight, source=source, n_sources=3))
    apart = [micro_batch_loss(model, batch([document]))[1] for document in made]
    for name in ("weighted", "nll", "targets"):
        whole = [one[f"text_{name}"].item() + one[f"vision_{name}"].item() for one in apart]
        assert sums[f"source_{name}"].tolist() == pytest.approx([whole[0], 0, whole[1] + whole[2]], rel=1e-5)
        assert sums[f"source_{name}"].sum().item() == pytest.approx(
            sums[f"text_{name}"].item() + sums[f"vision_{name}"].item(), rel=1e-6
        )


def test_all_logits_never_exist_and_text_alone_pays_for_text_alone(model):
    with Widths() as widths:
        micro_batch_loss(model, batch(documents()))[0].backward()
    assert VOCABULARY not in widths.seen
    with Widths() as widths:
        micro_batch_loss(model, batch(documents(high=TEXT)))[0].backward()
    assert TEXT in widths.seen
    assert VOCABULARY - TEXT not in widths.seen


def test_without_any_target_the_sum_is_zero_and_reaches_every_parameter(model):
    share = batch(documents())
    local_sum, sums = micro_batch_loss(model, replace(share, loss_weight=torch.zeros_like(share.loss_weight)))
    local_sum.backward()
    assert local_sum.item() == 0
    assert all(value.item() == 0 for value in sums.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_module_is_the_function(model):
    share = batch(documents())
    assert torch.equal(MicroBatchLoss(model)(share)[0], micro_batch_loss(model, share)[0])


@pytest.mark.parametrize("high", [TEXT, VOCABULARY])
def test_text_and_vision_are_to_the_bit_what_they_were_when_there_were_no_others(model, high):
    share = batch(documents(high=high))
    loss, sums = micro_batch_loss(model, share, chunk=4)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    packing = {"position_ids": share.positions[None], "plan": share.plan, "group": None, "use_cache": False}
    hidden = model.model(input_ids=share.tokens[None], **packing).last_hidden_state[0]
    labels = share.labels.masked_fill(share.loss_weight == 0, -1)
    nll = TwoSoftmaxes.apply(hidden, model.lm_head.weight, labels, TEXT, 4)
    before = (share.loss_weight * nll).sum()
    before.backward()
    assert torch.equal(loss, before)
    assert all(torch.equal(mine, p.grad) for mine, p in zip(gradients, model.parameters(), strict=True))
    for name, value in two_sums(nll.detach(), share, TEXT).items():
        assert torch.equal(sums[name], value), name


def test_a_third_modality_has_sums_of_its_own():
    config = llama_config(SIZES, {"text": TEXT, "vision": 30, "audio": VOCABULARY - TEXT - 30}, 64, 1e4)
    share = batch(documents())
    _, sums = micro_batch_loss(build_llama(config, 0), share)
    counted = share.labels[share.loss_weight > 0]
    numbers = {name: int(sums[f"{name}_targets"]) for name in ("text", "vision", "audio")}
    assert numbers == {
        "text": int((counted < TEXT).sum()),
        "vision": int(((counted >= TEXT) & (counted < TEXT + 30)).sum()),
        "audio": int((counted >= TEXT + 30).sum()),
    }
    assert all(numbers.values())
