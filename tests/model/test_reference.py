"""The numbers of LWM's released code (tests/data/lwm), reproduced from its own parameters through the ring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.model.lwm_reference import (
    TEXT,
    arrays,
    assert_close_to_thinned,
    gradients,
    joint,
    load,
    logits,
    loss,
    lwm_tensors,
    padded_weights,
    rows_in_one_sequence,
)

LOGITS = 1.5e-5
GRADIENTS = 8e-7


@pytest.fixture(scope="module")
def text():
    return arrays("text_A")


@pytest.fixture(scope="module")
def vision():
    stored = arrays("vision_V1")
    stored["ids"] = joint(stored["input_tokens"], stored["input_vision_masks"])
    stored["labels"] = joint(stored["target_tokens"], stored["target_vision_masks"])
    return stored


@pytest.mark.parametrize("case", ["plain", "packed"])
def test_text_logits_equal_the_released_code(text, case):
    ids = text["input_ids"]
    plan = rows_in_one_sequence(text["segment_ids"] if case == "packed" else np.zeros_like(ids))
    if case == "packed":
        np.testing.assert_array_equal(plan.positions.reshape(ids.shape), text["packed_position_ids"])
    np.testing.assert_allclose(logits(load("text_A"), ids, plan), text[f"logits_{case}"], rtol=0, atol=LOGITS)


def test_text_logits_behind_left_padding_equal_the_released_code(text):
    model = load("text_A")
    model.set_attn_implementation("sdpa")
    ours = model(
        input_ids=torch.from_numpy(text["input_ids"]).long(),
        attention_mask=torch.from_numpy(text["leftpad_attention_mask"]),
        position_ids=torch.from_numpy(text["leftpad_position_ids"]).long(),
    ).logits.detach()[:, 15::16]
    real = text["leftpad_attention_mask"][:, 15::16] == 1  # what stands at padding means nothing
    np.testing.assert_allclose(ours.numpy()[real], text["logits_leftpad"][real], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("case", ["plain", "packed"])
def test_vision_logits_equal_the_released_code_over_both_slices(vision, case):
    ids = vision["ids"]
    plan = rows_in_one_sequence(vision["segment_ids"] if case == "packed" else np.zeros_like(ids))
    ours = logits(load("vision_V1"), ids, plan)
    prefix = "packed_" if case == "packed" else ""
    np.testing.assert_allclose(ours[..., :TEXT], vision[f"{prefix}text_logits"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(ours[..., TEXT:], vision[f"{prefix}vision_logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize(
    ("case", "mask"), [("plain", "loss_mask"), ("plain_emptyrow", "loss_mask_emptyrow"), ("plain_nomask", None)]
)
def test_text_loss_equals_the_released_code_also_where_a_row_has_no_target(text, case, mask):
    ids, labels = text["input_ids"], text["target_ids"]
    valid = np.ones(ids.shape) if mask is None else text[mask]
    weights = padded_weights(np.zeros(ids.shape, dtype=bool), valid, "text")
    local_sum, _ = loss(load("text_A"), ids, labels, weights, rows_in_one_sequence(np.zeros_like(ids)))
    assert local_sum.item() == pytest.approx(float(text[f"loss_{case}"]), abs=2e-6)


def test_packed_text_loss_and_gradients_equal_the_released_code(text):
    model = load("text_A")
    ids, labels = text["input_ids"], text["target_ids"]
    weights = padded_weights(np.zeros(ids.shape, dtype=bool), text["loss_mask"], "text")
    local_sum, _ = loss(model, ids, labels, weights, rows_in_one_sequence(text["segment_ids"]))
    local_sum.backward()
    assert local_sum.item() == pytest.approx(float(text["loss_packed"]), abs=2e-6)
    stored = arrays("text_A_gradients")
    norms = stored.pop("norms")
    assert_close_to_thinned(gradients(model, stacked=False), stored, norms, GRADIENTS)


def test_vision_losses_and_gradients_equal_the_released_code(vision):
    model = load("vision_V1")
    weights = padded_weights(vision["target_vision_masks"], vision["loss_masks"], "vision-text")
    plan = rows_in_one_sequence(np.zeros_like(vision["ids"]))
    local_sum, sums = loss(model, vision["ids"], vision["labels"], weights, plan)
    local_sum.backward()
    assert local_sum.item() == pytest.approx(float(vision["loss"]), abs=2e-6)
    assert 2 * sums["text_weighted"].item() == pytest.approx(float(vision["text_loss"]), abs=2e-6)
    assert 2 * sums["vision_weighted"].item() == pytest.approx(float(vision["vision_loss"]), abs=2e-6)
    stored = arrays("vision_V1_gradients")
    norms = stored.pop("norms")
    assert_close_to_thinned(gradients(model, stacked=True), stored, norms, GRADIENTS)


def test_four_training_steps_equal_the_released_code():
    """AdamW on all parameters, clip 1, cosine after warm-up; the first update has rate 0, as schedule(0) is."""
    stored = arrays("training")
    model = load("vision_V1")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(4):
        batch = {name: stored[f"step{step}/{name}"] for name in ("input_tokens", "target_tokens", "loss_masks")}
        is_vision, target_is_vision = (stored[f"step{step}/{side}_vision_masks"] for side in ("input", "target"))
        local_sum, sums = loss(
            model,
            joint(batch["input_tokens"], is_vision),
            joint(batch["target_tokens"], target_is_vision),
            padded_weights(target_is_vision, batch["loss_masks"], "vision-text"),
            rows_in_one_sequence(np.zeros_like(batch["input_tokens"])),
        )
        optimizer.zero_grad()
        local_sum.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = _rate(step)
        optimizer.step()
        assert local_sum.item() == pytest.approx(stored["metric/loss"][step], abs=3e-6)
        assert 2 * sums["text_weighted"].item() == pytest.approx(stored["metric/text_loss"][step], abs=3e-6)
        assert 2 * sums["vision_weighted"].item() == pytest.approx(stored["metric/vision_loss"][step], abs=3e-6)
        assert norm.item() == pytest.approx(stored["metric/gradient_norm"][step], rel=1e-6)
        # The released code logs the rate of the update to come.
        assert _rate(step + 1) == pytest.approx(stored["metric/learning_rate"][step], rel=1e-6)
    final = lwm_tensors(
        {name: weight.detach() for name, weight in model.named_parameters()}, model.config, stacked=True
    )
    expected = {name.removeprefix("final/"): value for name, value in stored.items() if name.startswith("final/")}
    assert_close_to_thinned(final, expected, stored["final_norms"], atol=2e-5)


def _rate(step: int) -> float:
    """The schedule of that run: 2 steps of warm-up to 5e-3, then a cosine to 1e-3 over the rest of 10."""
    return 5e-3 * step / 2 if step < 2 else 1e-3 + 4e-3 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2
