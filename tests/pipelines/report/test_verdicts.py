"""The sentences of the report follow the numbers, in both directions."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.report.verdicts import verdicts


def loss(nats: float) -> dict[str, Any]:
    row = {"stage": "final", "source": "all", "modality": "text", "targets": 1234, "nats_per_token": nats}
    return {**row, "unigram_heldout": 6.0, "unigram_train": 6.4}


@pytest.mark.parametrize(
    ("nats", "grade", "words"),
    [
        (5.5, "good", "0.50 under the unigram entropy of the same tokens, 6.00, and 0.90 under"),
        (5.51, "fair", "only 0.49 under"),
        (6.2, "fair", "0.20 over the unigram entropy of the same tokens, 6.00, though 0.20 under a unigram model"),
        (6.4, "bad", "over both"),
    ],
)
def test_a_loss_is_good_only_half_a_nat_under_the_unigram_entropy(nats: float, grade: str, words: str) -> None:
    (said,) = verdicts({"heldout": [loss(nats)]})
    assert said["grade"] == grade
    assert words in said["text"]
    assert f"On 1,234 held-out text tokens the final model's loss is {nats:.2f} nats a token" in said["text"]


def test_only_the_final_model_over_all_sources_is_judged() -> None:
    rows = [{**loss(1.0), "stage": "first"}, {**loss(1.0), "source": "books"}, loss(7.0)]
    assert [said["grade"] for said in verdicts({"heldout": rows})] == ["bad"]


def test_nothing_held_out_is_said_to_be_unknown() -> None:
    (said,) = verdicts({})
    assert said["grade"] == "bad"
    assert "Nothing was held out" in said["text"]


@pytest.mark.parametrize(
    ("accuracy", "nats", "grade", "words"),
    [
        (1.0, 0.1, "good", "100% of the answers are right over 1 context and 2 depths"),
        (0.0, 2.0, "fair", "a digit of the answer, chosen among the ten, costs 0.30 nats less with the needle there"),
        (0.0, 2.3, "bad", "costs the same with the needle there as without it"),
        (0.0, 2.5, "bad", "costs 0.20 nats more with the needle there"),
    ],
)
def test_a_needle_that_is_not_found_still_counts_by_the_nats_it_saves(
    accuracy: float, nats: float, grade: str, words: str
) -> None:
    row = {"depths": [0.0, 1.0], "accuracy": [accuracy] * 2, "choice_nats": [nats] * 2, "choice_nats_without": 2.3}
    said = verdicts({"heldout": [loss(1.0)], "needle": [row]})[1]
    assert said["grade"] == grade
    assert words in said["text"]
    grouped = {**row, "choice_nats": [None] * 2, "choice_nats_without": None}
    grouped |= {"digit_nats": [nats] * 2, "digit_nats_without": 2.3}
    again = verdicts({"heldout": [loss(1.0)], "needle": [grouped]})[1]
    assert again["text"] == said["text"].replace(", chosen among the ten,", "")


def test_reconstructions_are_judged_on_what_was_held_out() -> None:
    row = {"psnr": 20.4, "ssim": 0.61, "frechet": 3.25}
    rows = [{**row, "heldout": True}, {**row, "heldout": False, "psnr": 24.0}]
    said = verdicts({"reconstruction": rows})[1]
    assert said["grade"] == "good"
    assert "20.4 dB (24.0 dB on clips that it may have been trained on), an SSIM of 0.61" in said["text"]
    assert "a Fréchet distance of 3.25" in said["text"]
    assert "Fréchet" not in verdicts({"reconstruction": [{**rows[0], "frechet": None}]})[1]["text"]
    assert len(verdicts({"reconstruction": rows[1:]})) == 1


def test_continuations_are_judged_beside_the_still_frame_where_something_moves() -> None:
    row = {"kind": "continuation", "psnr": 20.0, "psnr_still": 19.0, "psnr_reconstruction": 25.0}
    moving = {**row, "code_agreement": 0.3, "code_agreement_still": 0.25}
    rows = [moving, {**row, "psnr": 5.0, "code_agreement": 0.1, "code_agreement_still": 0.9}]
    rows.append({"kind": "continuation", "skipped": "short"})
    said = verdicts({"generation": rows})[1]
    assert said["grade"] == "good"
    assert "in the 1 of 2 windows where under half of the codes stay, reach 20.0 dB" in said["text"]
    assert "30% of the generated codes are the true ones, 25% when standing still" in said["text"]
    assert verdicts({"generation": [{**moving, "code_agreement": 0.2}]})[1]["grade"] == "fair"
    assert verdicts({"generation": [{**moving, "code_agreement": 0.2, "psnr": 18.0}]})[1]["grade"] == "fair"
    assert verdicts({"generation": [{**moving, "code_agreement": 0.2, "psnr": 10.0}]})[1]["grade"] == "bad"
    assert verdicts({"generation": [{**moving, "code_agreement_still": 0.5}]})[1]["grade"] == "fair"
    assert len(verdicts({"generation": rows[2:]})) == 1
