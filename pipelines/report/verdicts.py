"""What the numbers say, in sentences computed from them: good, fair or bad, never kinder than they are. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WELL_UNDER = 0.5
"""Nats under the unigram entropy from which a model has clearly learnt from context."""


def verdicts(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """One sentence {"grade": good | fair | bad, "text": ..} for each thing that was measured."""
    said = [_loss(row) for row in evaluation.get("heldout", []) if (row["stage"], row["source"]) == ("final", "all")]
    if not said:
        said = [_of("bad", "Nothing was held out, so no loss says what the model has learnt; name sources.*.heldout.")]
    if evaluation.get("needle"):
        said.append(_needle(evaluation["needle"]))
    reconstruction = _reconstruction(evaluation.get("reconstruction", []))
    continuation = _continuation(evaluation.get("generation", []))
    return said + [one for one in (reconstruction, continuation) if one]


def _loss(row: Mapping[str, Any]) -> dict[str, str]:
    margin = row["unigram_heldout"] - row["nats_per_token"]
    beside_train = row["unigram_train"] - row["nats_per_token"]
    start = (
        f"On {row['targets']:,} held-out {row['modality']} tokens the final model's loss is "
        f"{row['nats_per_token']:.2f} nats a token"
    )
    entropy = f"the unigram entropy of the same tokens, {row['unigram_heldout']:.2f}"
    if margin >= WELL_UNDER:
        return _of(
            "good",
            f"{start}, {margin:.2f} under {entropy}, and {beside_train:.2f} under a unigram model of the training "
            "shards: it has learnt to predict from context.",
        )
    if margin > 0:
        return _of("fair", f"{start}, only {margin:.2f} under {entropy}: it has learnt a little from context.")
    if beside_train > 0:
        return _of(
            "fair",
            f"{start}, {-margin:.2f} over {entropy}, though {beside_train:.2f} under a unigram model of the training "
            f"shards, {row['unigram_train']:.2f}: more training is needed.",
        )
    return _of(
        "bad",
        f"{start}, over both {entropy}, and a unigram model of the training shards, {row['unigram_train']:.2f}: it has "
        "learnt less than how frequent tokens are.",
    )


def _needle(rows: list[Mapping[str, Any]]) -> dict[str, str]:
    cells = [value for row in rows for value in row["accuracy"]]
    accuracy = sum(cells) / len(cells)
    key = "digit_nats" if any(row["choice_nats_without"] is None for row in rows) else "choice_nats"
    gains = [row[f"{key}_without"] - value for row in rows for value in row[key]]
    gain = sum(gains) / len(gains)
    start = (
        f"Needle in a haystack: {accuracy:.0%} of the answers are right over {len(rows)} context"
        f"{'s' if len(rows) > 1 else ''} and {len(rows[0]['depths'])} depths"
    )
    digit = "a digit of the answer, chosen among the ten," if key == "choice_nats" else "a digit of the answer"
    change = f"{abs(gain):.2f} nats {'less' if gain > 0 else 'more'}"
    nats = (
        f"{digit} costs the same with the needle there as without it"
        if abs(gain) < 0.005
        else f"{digit} costs {change} with the needle there than without it"
    )
    if accuracy >= 0.9:
        return _of("good", f"{start}; {nats}.")
    if accuracy > 0 or gain > 0.1:
        return _of("fair", f"{start}; {nats}.")
    return _of("bad", f"{start}; {nats}, so the model does not look back for it.")


def _reconstruction(rows: list[Mapping[str, Any]]) -> dict[str, str] | None:
    by_split = {row["heldout"]: row["psnr"] for row in rows if row["psnr"] is not None}
    if True not in by_split:
        return None
    heldout = by_split[True]
    beside = f" ({by_split[False]:.1f} dB on clips that it may have been trained on)" if False in by_split else ""
    grade = "good" if heldout >= 20 else "fair" if heldout >= 15 else "bad"
    return _of(grade, f"The VQGAN brings held-out frames back at {heldout:.1f} dB{beside}.")


def _continuation(rows: list[Mapping[str, Any]]) -> dict[str, str] | None:
    done = [row for row in rows if row["kind"] == "continuation" and "skipped" not in row]
    if not done:
        return None
    mean = {key: sum(row[key] for row in done) / len(done) for key in ("psnr", "psnr_still", "psnr_reconstruction")}
    agreement = sum(row["code_agreement"] for row in done) / len(done)
    still = sum(row["code_agreement_still"] for row in done) / len(done)
    grade = (
        "good" if mean["psnr"] >= mean["psnr_still"] else "fair" if mean["psnr"] >= mean["psnr_still"] - 6 else "bad"
    )
    return _of(
        grade,
        f"Continued held-out clips reach {mean['psnr']:.1f} dB against what really came; the last frame standing still "
        f"{mean['psnr_still']:.1f} dB, the VQGAN's own reconstruction {mean['psnr_reconstruction']:.1f} dB. "
        f"{agreement:.0%} of the generated codes are the true ones, {still:.0%} when standing still.",
    )


def _of(grade: str, text: str) -> dict[str, str]:
    return {"grade": grade, "text": text}
