"""All that the report says, as one tree of plain JSON, from the manifests and metrics of the stages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.recipe import Recipe
from pipelines.report.verdicts import verdicts
from pipelines.train.metrics.steps import read_metrics, step_seconds, tokens_per_second, whole_seconds
from storage.store import Store

Inputs = Mapping[str, tuple[Store, Mapping[str, Any]]]
_SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)
_PER_STEP = (
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "text_nats",
    "text_targets",
    "vision_nats",
    "vision_targets",
)


def gather(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The report's tree. Secrets in the storage options are left out."""
    evaluation = dict(inputs["evaluate"][1]["figures"]) if "evaluate" in inputs else {}
    training = [_training(stage.name, inputs) for stage in recipe.train.stages if f"train-{stage.name}" in inputs]
    stages = [_stage(name, manifest, inputs) for name, (_, manifest) in inputs.items()]
    return {
        "name": recipe.name,
        "finished": max(stage["finished"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "stages": stages,
        "training": training,
        "shards": _shards(recipe, inputs),
        "evaluation": evaluation,
        "verdicts": verdicts(evaluation),
        "quarantine": [
            {"stage": name, **entry} for name, (_, manifest) in inputs.items() for entry in manifest["quarantine"]
        ],
        "recipe": _without_secrets(recipe.model_dump(mode="json")),
    }


def _stage(name: str, manifest: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": manifest["seconds"],
        "finished": manifest["finished"],
        "fingerprint": manifest["fingerprint"],
        "inputs": [one for one in manifest["inputs"] if one in inputs],
        "counts": _counts(name, manifest),
        "quarantined": len(manifest["quarantine"]),
    }


def _counts(name: str, manifest: Mapping[str, Any]) -> list[str]:
    """What the stage made, in a few words, for the picture of the DAG."""
    figures = manifest.get("figures", {})
    kind = name.split("-", 1)[0]
    if kind == "sources":
        groups = figures.values()
        total = sum(group["bytes"] for group in groups)
        return [_of(sum(group["objects"] for group in groups), "objects"), f"{count(total)}B"]
    if kind == "vqgan":
        shown = [f"{count(figures['steps'])} steps"] if "steps" in figures else ["imported"]
        return shown + ([f"{figures['psnr']:.1f} dB in training"] if "psnr" in figures else [])
    if kind == "tokenize":
        return [_of(figures[what], what) for what in ("documents", "tokens")]
    if kind == "pack":
        sets = [one for splits in manifest["outputs"]["sets"].values() for one in splits.values()]
        filled, tokens = (sum(one[key] for one in sets) for key in ("n_filled", "n_tokens"))
        return [_of(figures["sequences"], "sequences"), f"{100 * filled / max(tokens, 1):.1f}% filled"]
    if kind == "train":
        return [_of(figures[what], what) for what in ("steps", "tokens")]
    if kind == "evaluate":
        return [_of(len(manifest["outputs"][what]), what) for what in ("parts", "pictures")]
    return []


def _of(number: float, things: str) -> str:
    return f"{count(number)} {things[:-1] if number == 1 else things}"


def _training(stage: str, inputs: Inputs) -> dict[str, Any]:
    """Per-step columns of a training stage and its totals."""
    steps = list(read_metrics(inputs[f"train-{stage}"][0]))
    columns = {name: [step[name] for step in steps] for name in _PER_STEP}
    columns["seconds"] = [whole_seconds(step) for step in steps]
    tail = steps[-max(1, len(steps) // 10) :]
    return {
        "stage": stage,
        "steps": len(steps),
        "tokens": sum(columns["tokens"]),
        "seconds": sum(columns["seconds"]),
        "tokens_per_second": tokens_per_second(steps),
        "text_nats_per_token": _nats(tail, "text"),
        "vision_nats_per_token": _nats(tail, "vision"),
        "mfu": _mfu(steps),
        "sources": _by_source(tail),
        "per_step": columns,
    }


def _nats(steps: Sequence[Mapping[str, Any]], modality: str) -> float | None:
    targets = sum(step[f"{modality}_targets"] for step in steps)
    return sum(step[f"{modality}_nats"] for step in steps) / targets if targets else None


def _mfu(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the seconds of all steps; None where what the devices can do is not known."""
    known = [(step["machine"]["mfu"], step_seconds(step)) for step in steps if "mfu" in step["machine"]]
    return sum(mfu * seconds for mfu, seconds in known) / sum(seconds for _, seconds in known) if known else None


def _by_source(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each source that had targets in these steps its name, its targets and the mean over them."""
    nats, targets = Counter[str](), Counter[str]()
    for step in steps:
        for source, figures in step["sources"].items():
            targets[source] += figures["targets"]
            nats[source] += figures["targets"] * figures.get("nats_per_token", 0.0)
    return [
        {"source": source, "targets": number, "nats_per_token": nats[source] / number}
        for source, number in sorted(targets.items())
        if number
    ]


def _shards(recipe: Recipe, inputs: Inputs) -> list[dict[str, Any]]:
    rows = []
    for stage in recipe.train.stages:
        _, manifest = inputs.get(f"pack-{stage.name}", (None, None))
        for source, splits in sorted((manifest or {"outputs": {"sets": {}}})["outputs"]["sets"].items()):
            for split, totals in sorted(splits.items(), reverse=True):
                numbers = {key: value for key, value in totals.items() if key != "file"}
                rows.append(
                    {"stage": stage.name, "context": stage.context, "source": source, "split": split, **numbers}
                )
    return rows


def _without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    options = tree["storage"]["options"]
    tree["storage"]["options"] = _redacted(options)
    return tree


def _redacted(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: "..." if _SECRET.search(key) else _redacted(item) for key, item in value.items()}


def context_name(tokens: int) -> str:
    """A context as it is called: 1024 -> 1K, 1048576 -> 1M, 1000 -> 1,000."""
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{suffix}"
    return f"{tokens:,}"


def count(number: float) -> str:
    """A count with three digits at most and a prefix: 1234567 -> 1.23M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"
