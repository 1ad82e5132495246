"""The report stage: manifests, metrics and pictures of all stages to `report.html` and `report.json`.

Both are a pure function of what the stages committed; they are written to the stage's folder and to the run's root.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pipelines.recipe import Recipe
from pipelines.report.page import render
from pipelines.report.summary import gather
from storage.store import Store

HTML = "report.html"
JSON = "report.json"


def write_report(recipe: Recipe, inputs: Mapping[str, tuple[Store, Mapping[str, Any]]], store: Store) -> dict[str, Any]:
    """Write the report of a run whose stages are all done and return the stage's part of the manifest."""
    facts = _finite(gather(recipe, inputs))
    html = render(facts, _pictures(inputs))
    text = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False) + "\n"
    for place in (store, Store(recipe.storage.root, recipe.storage.options)):
        for name, content in ((HTML, html), (JSON, text)):
            with place.writing(name) as file:
                file.write(content.encode())
    return {
        "outputs": {"html": HTML, "json": JSON},
        "figures": {"verdicts": facts["verdicts"], "bytes": len(html.encode())},
    }


def _pictures(inputs: Mapping[str, tuple[Store, Mapping[str, Any]]]) -> dict[str, bytes]:
    """PNG by name, of those that the evaluation made."""
    if "evaluate" not in inputs:
        return {}
    store, manifest = inputs["evaluate"]
    pictures = {}
    for name in manifest["outputs"]["pictures"]:
        with store.open(name) as file:
            pictures[name] = file.read()
    return pictures


def _finite(value: Any) -> Any:
    """The same tree with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
