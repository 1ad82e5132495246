"""Evaluates the trained models by Ray tasks: independent parts, each committed once, then one table of figures.

In: the listing, the VQGAN, packed shards and the model of every training stage. Out: a record a part, pictures, and in
the manifest the figures: held-out loss beside unigram models, needle in a haystack, reconstructions, generated frames.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import ray

from pipelines.cluster.progress import Bar
from pipelines.cluster.same_code import as_driver
from pipelines.dag.partitions import run_partitions
from pipelines.dag.records import JsonRecords
from pipelines.evaluate.job import CONTINUATIONS, EvaluateJob, Kind, Part
from pipelines.evaluate.record import EvaluateFigures, EvaluateOutputs, EvaluateRecord, Row
from pipelines.evaluate.table import tabulate

log = logging.getLogger("ringworld")


def evaluate_all(job: EvaluateJob, line: Bar) -> EvaluateRecord:
    """Run every part."""
    parts = {part.name: part for part in cut_parts(job)}
    pool = job.recipe.evaluate.resources
    shared = ray.put(job)

    def submit(name: str) -> ray.ObjectRef:
        options = {"name": f"evaluate:{name}", "max_retries": 0, **pool.ray_options}
        return _measure.options(**options).remote(parts[name], shared, pool.cpus)

    records: dict[str, dict[str, Any]] = {}

    def on_done(record: dict[str, Any]) -> None:
        records[record["partition"]] = record
        line.advance(1)

    run_partitions("evaluate", submit, list(parts), JsonRecords(job.store), pool, on_done)
    figures = collect(job, [records[name] for name in parts])
    keys = ("stage", "source", "modality", "nats_per_token", "unigram_heldout", "unigram_train")
    message = "evaluate: %s %s %s: %.3f nats/token, unigram %.3f on the same tokens, %.3f from training shards"
    for row in figures.heldout:
        log.info(message, *(row[key] for key in keys))
    pictures = tuple(name for name in job.store.names("pictures") if name.endswith(".png"))
    return EvaluateRecord(EvaluateOutputs(tuple(JsonRecords.name(name) for name in parts), pictures), figures)


def cut_parts(job: EvaluateJob) -> list[Part]:
    """What is to be measured, one part each; fixed by the recipe and what the stages before made."""
    parts = [
        Part(f"loss-{model}-{source}", "loss", {"stage": model, "pack": pack, "source": source})
        for model, pack, source in _scored(job)
    ]
    evaluate = job.recipe.evaluate
    if evaluate.needle and job.objects(("text",), heldout=True):
        parts += [Part(f"needle-{context}", "needle", {"context": context}) for context in evaluate.needle.contexts]
    if job.has_vision:
        parts.append(Part("reconstruction-heldout", "reconstruction", {"heldout": True}))
        parts.append(Part("reconstruction-train", "reconstruction", {"heldout": False}))
    if job.has_vision and evaluate.generation:
        if job.objects(("video",), heldout=True):
            parts += [Part(f"continuation-{n}", "continuation", {"index": n}) for n in range(CONTINUATIONS)]
        parts += [Part(f"prompt-{n}", "prompt", {"index": n}) for n in range(len(evaluate.generation.prompts))]
    return parts


def collect(job: EvaluateJob, records: list[dict[str, Any]]) -> EvaluateFigures:
    """The figures of all parts.

    heldout: rows of `tabulate`, for each stage over each source of its mixture and, as source "all", over all of them;
    then, as stage "final", the last model over every source of the run, each packed by the last stage that reads it.
    """
    losses = [record["result"] for record in records if record["kind"] == "loss"]
    by_stage = [
        (stage.name, [loss for loss in losses if loss["stage"] == stage.name and loss["source"] in stage.mixture])
        for stage in job.recipe.curriculum
    ]
    by_stage.append(("final", [loss for loss in losses if loss["stage"] == job.last]))
    heldout: list[Row] = []
    for stage, own in by_stage:
        rows = [row for loss in own for row in tabulate(job, [loss], loss["source"])]
        rows += tabulate(job, own, "all") if own else []
        heldout += [{**row, "stage": stage} for row in rows]

    def of(kind: Kind) -> tuple[Row, ...]:
        return tuple({"part": record["partition"], **record["result"]} for record in records if record["kind"] == kind)

    return EvaluateFigures(tuple(heldout), of("needle"), of("reconstruction"), of("continuation") + of("prompt"))


def _scored(job: EvaluateJob) -> list[tuple[str, str, str]]:
    """(model's stage, packing stage, source) of all that is scored: every stage on its own sources, the last on all."""
    stages = job.recipe.curriculum
    scored = [(stage.name, stage.name, source) for stage in stages for source in sorted(stage.mixture)]
    last = stages[-1]
    packed_by = {source: stage.name for stage in stages for source in sorted(stage.mixture)}
    scored += [(last.name, pack, source) for source, pack in sorted(packed_by.items()) if source not in last.mixture]
    sets = {stage.name: job.packed(stage.name).record.outputs.sets for stage in stages}
    return [one for one in scored if "heldout" in sets[one[1]].get(one[2], {})]


_MEASURES: dict[Kind, tuple[str, str]] = {
    "loss": ("heldout_loss", "score_part"),
    "needle": ("needle", "needle_part"),
    "reconstruction": ("reconstruction", "reconstruct_part"),
    "continuation": ("generation", "continue_part"),
    "prompt": ("generation", "prompt_part"),
}
"""The module of `pipelines.evaluate.tasks`, and the function in it."""


def measure_of(kind: Kind) -> Callable[..., dict[str, Any]]:
    """What measures a part of this kind, imported where it runs: the driver needs no torch, and text no VQGAN."""
    module, name = _MEASURES[kind]
    measure: Callable[..., dict[str, Any]] = getattr(import_module(f"pipelines.evaluate.tasks.{module}"), name)
    return measure


@ray.remote
@as_driver
def _measure(part: Part, job: EvaluateJob, cpus: float) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(max(1, int(cpus)))
    transformers.utils.logging.disable_progress_bar()  # the terminal has one bar already
    result = measure_of(part.kind)(job, part.name, **part.arguments)
    record = {"partition": part.name, "kind": part.kind, "result": result}
    job.store.write_json(JsonRecords.name(part.name), record)
    return record
