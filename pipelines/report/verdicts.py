"""What the numbers say, in sentences computed from them: good, fair or bad, never kinder than they are. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean as mean
from typing import Any

from pipelines.evaluate.task_table import TASKS

WELL_UNDER = 0.5
"""Nats under the unigram entropy from which a model has clearly learnt from context."""


MOVING = 0.5
"""Share of codes that agree with the last given frame's under which something moves in a window."""

_Verdict = tuple[str, str]  # grade and text


def verdicts(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """One sentence {"grade": good | fair | bad, "text": ..} for each thing that was measured."""
    found = [_loss(row) for row in evaluation.get("heldout", []) if (row["stage"], row["source"]) == ("final", "all")]
    if not found:
        found = [("bad", "Nothing was held out, so no loss says what the model has learnt; name sources.*.heldout.")]
    if evaluation.get("needle"):
        found.append(_needle(evaluation["needle"]))
    found += _reconstruction(evaluation.get("reconstruction", [])) + _continuation(evaluation.get("generation", []))
    for task, rows in evaluation.get("further", {}).items():
        found += [verdict] if (verdict := TASKS[task].verdict(rows)) else []
    found += _holes(evaluation.get("holes", []))
    return [{"grade": grade, "text": text} for grade, text in found]


def _holes(holes: list[Mapping[str, Any]]) -> list[_Verdict]:
    if not holes:
        return []
    first, more = holes[0], f", and {len(holes) - 1} more" if len(holes) > 1 else ""
    cells = f"{len(holes)} cell{'s' if len(holes) > 1 else ''} of the evaluation"
    missing = f"{first['cell']} ({first['reason']}){more}"
    remedy = "mend the cause and run the recipe with --rebuild evaluate, which tries them alone again"
    return [("bad", f"{cells} could not be measured and the figures are without: {missing}; {remedy}.")]


def _loss(row: Mapping[str, Any]) -> _Verdict:
    margin = row["unigram_heldout"] - row["nats_per_token"]
    beside_train = row["unigram_train"] - row["nats_per_token"]
    start = (
        f"On {row['targets']:,} held-out {row['modality']} tokens the final model's loss is "
        f"{row['nats_per_token']:.2f} nats a token"
    )
    entropy = f"the unigram entropy of the same tokens, {row['unigram_heldout']:.2f}"
    train = "a unigram model of the training shards"
    if margin >= WELL_UNDER:
        under = f"{margin:.2f} under {entropy}, and {beside_train:.2f} under {train}"
        return "good", f"{start}, {under}: it has learnt to predict from context."
    if margin > 0:
        return "fair", f"{start}, only {margin:.2f} under {entropy}: it has learnt a little from context."
    if beside_train > 0:
        between = f"{-margin:.2f} over {entropy}, though {beside_train:.2f} under {train}, {row['unigram_train']:.2f}"
        return "fair", f"{start}, {between}: more training is needed."
    over = f"over both {entropy}, and {train}, {row['unigram_train']:.2f}"
    return "bad", f"{start}, {over}: it has learnt less than how frequent tokens are."


def _needle(rows: list[Mapping[str, Any]]) -> _Verdict:
    accuracy = mean(value for row in rows for value in row["accuracy"])
    key = "digit_nats" if any(row["choice_nats_without"] is None for row in rows) else "choice_nats"
    gain = mean(row[f"{key}_without"] - value for row in rows for value in row[key])
    start = (
        f"Needle in a haystack: {accuracy:.0%} of the answers are right over {len(rows)} context"
        f"{'s' if len(rows) > 1 else ''} and {len(rows[0]['depths'])} depths"
    )
    digit = "a digit of the answer, chosen among the ten," if key == "choice_nats" else "a digit of the answer"
    nats = f"{digit} costs {abs(gain):.2f} nats {'less' if gain > 0 else 'more'} with the needle there than without it"
    if abs(gain) < 0.005:
        nats = f"{digit} costs the same with the needle there as without it"
    if accuracy >= 0.9:
        return "good", f"{start}; {nats}."
    if accuracy > 0 or gain > 0.1:
        return "fair", f"{start}; {nats}."
    return "bad", f"{start}; {nats}, so the model does not look back for it."


def _reconstruction(rows: list[Mapping[str, Any]]) -> list[_Verdict]:
    by_split = {row["heldout"]: row for row in rows if row["psnr"] is not None}
    if True not in by_split:
        return []
    heldout = by_split[True]
    trained = (
        f" ({by_split[False]['psnr']:.1f} dB on clips that it may have been trained on)" if False in by_split else ""
    )
    frechet = "" if heldout["frechet"] is None else f" and a Fréchet distance of {heldout['frechet']:.2f}"
    grade = "good" if heldout["psnr"] >= 20 else "fair" if heldout["psnr"] >= 15 else "bad"
    text = (
        f"The VQGAN brings held-out frames back at {heldout['psnr']:.1f} dB{trained}, an SSIM of {heldout['ssim']:.2f}"
    )
    return [(grade, f"{text}{frechet}.")]


def _continuation(rows: list[Mapping[str, Any]]) -> list[_Verdict]:
    done = [row for row in rows if row["kind"] == "continuation" and "skipped" not in row]
    if not done:
        return []
    moving = [row for row in done if row["code_agreement_still"] < MOVING]
    keys = ("psnr", "psnr_still", "psnr_reconstruction", "code_agreement", "code_agreement_still")
    psnr, still, best, agreement, still_agreement = (mean(row[key] for row in moving or done) for key in keys)
    start = f"Continued held-out clips, in the {len(moving)} of {len(done)} windows where under half of the codes stay,"
    if not moving:
        start = f"Continued held-out clips, of whose {len(done)} windows in none more than half of the codes change,"
    text = (
        f"{start} reach {psnr:.1f} dB against what really came; the last frame standing still {still:.1f} dB, the "
        f"VQGAN's own reconstruction {best:.1f} dB. {agreement:.0%} of the generated codes are the true ones, "
        f"{still_agreement:.0%} when standing still."
    )
    better = (psnr > still) + (agreement > still_agreement)
    return [("good" if better == 2 and moving else "fair" if better or psnr >= still - 6 else "bad", text)]
