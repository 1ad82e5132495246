"""All that the report says, as one tree of plain JSON, from the manifests and metrics of the stages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.dag.manifest import Manifest, StageOutput, record_json
from pipelines.dag.stage import Stage
from pipelines.evaluate.stage import EvaluateStage
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.recipe import Recipe
from pipelines.report.samples import last_samples
from pipelines.report.verdicts import verdicts
from pipelines.train.metrics.steps import modalities, read_metrics, step_seconds, tokens_per_second, whole_seconds
from pipelines.train.record import TrainRecord
from pipelines.train.stage import TrainStage
from tokenization.shards.index import targets_of

Outputs = Mapping[str, StageOutput[Any]]
"""What the stages before made, by name."""
_SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)


def gather(recipe: Recipe, stages: Sequence[Stage[Any]], outputs: Outputs) -> dict[str, Any]:
    """The report's tree, of the stages that have outputs. Secrets in the storage options are left out."""
    done = [(stage, outputs[stage.name]) for stage in stages if stage.name in outputs]
    evaluations = [record_json(output.record)["figures"] for stage, output in done if isinstance(stage, EvaluateStage)]
    evaluation = evaluations[0] if evaluations else {}
    tree = recipe.public_json()
    tree["storage"]["options"] = _redacted(recipe.storage.options)
    rows = [_stage(stage, output.manifest, outputs) for stage, output in done]
    training = [_training(stage, output) for stage, output in done if isinstance(stage, TrainStage)]
    return {
        "name": recipe.name,
        "finished": max(row["finished"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "stages": rows,
        "training": training,
        "samples": last_samples(recipe, training),
        "shards": [row for stage, output in done if isinstance(stage, PackStage) for row in _shards(stage, output)],
        "evaluation": evaluation,
        "verdicts": verdicts(evaluation) if recipe.train else [],
        "thinned": [note for stage, output in done for note in stage.notes(record_json(output.record)["figures"])],
        "quarantine": [{"stage": stage.name, **bad} for stage, output in done for bad in output.manifest.quarantine],
        "recipe": tree,
    }


def _stage(stage: Stage[Any], manifest: Manifest[Any], outputs: Outputs) -> dict[str, Any]:
    return {
        "name": stage.name,
        "lane": stage.lane,
        "below": stage.drawn_below,
        "seconds": manifest.seconds,
        "finished": manifest.finished,
        "fingerprint": manifest.fingerprint,
        "inputs": [one for one in stage.inputs if one in outputs],
        "counts": list(stage.summary(manifest)),
        "quarantined": manifest.quarantined,
        "not_listed": manifest.quarantined - len(manifest.quarantine),
    }


def _training(stage: TrainStage, output: StageOutput[TrainRecord]) -> dict[str, Any]:
    """Per-step columns of a training stage, its totals, and what was measured of held-out sequences meanwhile."""
    steps = list(read_metrics(output.store))
    names = dict.fromkeys(name for step in steps for name in modalities(step))
    columns = {name: [step[name] for step in steps] for name in ("loss", "lr", "grad_norm", "tokens")}
    for column in (f"{name}_{figure}" for name in names for figure in ("nats", "targets")):
        columns[column] = [step.get(column, 0) for step in steps]
    columns["seconds"] = [whole_seconds(step) for step in steps]
    tail = steps[-max(1, len(steps) // 10) :]
    return {
        "stage": stage.stage.name,
        "steps": len(steps),
        "tokens": sum(columns["tokens"]),
        "seconds": sum(columns["seconds"]),
        "tokens_per_second": tokens_per_second(steps),
        **{f"{name}_nats_per_token": _nats(tail, name) for name in names},
        "mfu": _mfu(steps),
        "sources": _by_source(tail),
        "per_step": columns,
        "heldout": [{"step": step["step"], **step["heldout"]} for step in steps if "heldout" in step],
        "best": output.record.figures.best,
    }


def _nats(steps: Sequence[Mapping[str, Any]], modality: str) -> float | None:
    targets = sum(step.get(f"{modality}_targets", 0) for step in steps)
    return sum(step.get(f"{modality}_nats", 0.0) for step in steps) / targets if targets else None


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


def _shards(stage: PackStage, output: StageOutput[PackRecord]) -> Iterator[dict[str, Any]]:
    settings = stage.stage
    for source, splits in sorted(output.record.outputs.sets.items()):
        for split, totals in sorted(splits.items(), reverse=True):
            numbers = {key: value for key, value in totals.items() if key != "file"}
            row = {"stage": settings.name, "context": settings.context, "source": source, "split": split, **numbers}
            yield {**row, "targets": targets_of(totals)}


def _redacted(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: "..." if _SECRET.search(key) else _redacted(item) for key, item in value.items()}
