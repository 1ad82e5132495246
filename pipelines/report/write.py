"""Manifests, metrics and pictures of all stages to `report.html` and `report.json`.

Both are a pure function of what the stages committed; they are written to the stage's folder and to the run's root.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.dag.stage import Stage
from pipelines.evaluate.stage import EvaluateStage
from pipelines.recipe import Recipe
from pipelines.report.page import render
from pipelines.report.record import ReportFigures, ReportOutputs, ReportRecord
from pipelines.report.summary import Outputs, gather
from storage.store import Store

HTML = "report.html"
JSON = "report.json"


def write_report(recipe: Recipe, stages: Sequence[Stage[Any]], inputs: Outputs, store: Store) -> ReportRecord:
    """Write the report of a run whose stages are all done. inputs: their outputs by name."""
    facts = _finite(gather(recipe, stages, inputs))
    html = render(facts, _pictures(inputs))
    text = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False) + "\n"
    for place in (store, Store(recipe.storage.root, recipe.storage.options)):
        for name, content in ((HTML, html), (JSON, text)):
            with place.writing(name) as file:
                file.write(content.encode())
    figures = ReportFigures(tuple(facts["verdicts"]), len(html.encode()))
    return ReportRecord(ReportOutputs(HTML, JSON), figures)


def _pictures(inputs: Outputs) -> dict[str, bytes]:
    """PNG by name, of those that the evaluation made."""
    pictures = {}
    if evaluation := inputs.get(EvaluateStage.kind):
        for name in evaluation.record.outputs.pictures:
            with evaluation.store.open(name) as file:
                pictures[name] = file.read()
    return pictures


def _finite(value: Any) -> Any:
    """The same tree with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
