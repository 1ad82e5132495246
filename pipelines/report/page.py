"""The report's tree and pictures to one HTML page that needs nothing beside it: no network, no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines.evaluate.plain_table import plain_table
from pipelines.evaluate.task_table import TASKS
from pipelines.report import dag_svg as dag
from pipelines.report import figures, task_figures
from pipelines.report.numbers import context_name, count
from pipelines.train.metrics.steps import modalities

OWN_SECTIONS = ("multi-needle", "ruler", "perplexity", "choice", "qa", "video-needle")
"""Tasks of whose rows the page shows more than a plain table."""


def render(facts: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page. pictures: PNG by the name under which the tree's evaluation mentions them."""
    environment = Environment(
        loader=PackageLoader("pipelines.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "context": context_name,
        "duration": dag.duration,
        "nats": partial(_shown, "{:.3f}", "–"),
        "decibels": partial(_shown, "{:.1f} dB", "∞"),
        "share": partial(_shown, "{:.1%}", "–"),
    }
    evaluation = facts["evaluation"]
    every = evaluation.get("heldout", [])
    heldout = shown_rows(every)
    needle = evaluation.get("needle", [])
    further = {task: rows for task, rows in (evaluation.get("further") or {}).items() if rows}
    # The report's own box, whose stage is not done while the page is drawn.
    page: dict[str, Any] = {"name": "report", "lane": "model", "below": None, "seconds": None}
    page |= {"counts": [], "quarantined": 0, "inputs": [stage["name"] for stage in facts["stages"]]}
    plots = {
        "training": Markup(figures.training_curves(facts["training"], every)) if facts["training"] else "",
        "heldout": Markup(figures.heldout_bars(heldout)) if heldout else "",
        "needle": Markup(figures.needle_maps(needle, _last_context(facts))) if needle else "",
        "dag": dag.draw([*facts["stages"], page]),
    }
    for task, draw in (("perplexity", task_figures.loss_by_position), ("video-needle", task_figures.film_map)):
        plots[task.replace("-", "_")] = Markup(draw(further[task])) if task in further else ""
    return environment.get_template("page.html.j2").render(
        facts=facts,
        evaluation=evaluation,
        trained=list(dict.fromkeys(name for stage in facts["training"] for name in modalities(stage["per_step"]))),
        packed=list(dict.fromkeys(name for shards in facts["shards"] for name in shards["targets"])),
        heldout=heldout,
        final=[row for row in every if (row["stage"], row["source"]) == ("final", "all")],
        needle=needle,
        reconstructions=[row for row in evaluation.get("reconstruction", []) if row["psnr"] is not None],
        continuations=[row for row in _generated(evaluation, "continuation") if "skipped" not in row],
        prompts=_generated(evaluation, "prompt"),
        tasks={task.replace("-", "_"): further.get(task, ()) for task in OWN_SECTIONS},
        further=[(TASKS[task].title, *plain_table(rows)) for task, rows in further.items() if task not in OWN_SECTIONS],
        holes=evaluation.get("holes", []),
        plots=plots,
        uris={name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in pictures.items()},
        recipe=yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True, width=110),
    )


def _last_context(facts: Mapping[str, Any]) -> int:
    context: int = facts["recipe"]["train"]["stages"][-1]["context"]
    return context


def shown_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of the held-out table that say something new: "all" only over several sources, no row twice."""
    sources: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        sources.setdefault((row["stage"], row["modality"]), set()).add(row["source"])
    final = [{**row, "stage": ""} for row in rows if row["stage"] == "final"]
    return [
        row
        for row in rows
        if (row["source"] != "all" or len(sources[row["stage"], row["modality"]]) > 2)
        and (row["stage"] == "final" or {**row, "stage": ""} not in final)
    ]


def _generated(evaluation: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [row for row in evaluation.get("generation", []) if row["kind"] == kind]


def _shown(form: str, absent: str, value: float | None) -> str:
    return absent if value is None else form.format(value)
