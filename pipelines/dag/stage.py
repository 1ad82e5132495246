"""The DAG: stages declared by inputs, settings and code; a fingerprint of those names the output folder.

A changed setting re-runs exactly what depends on it and nothing else. Each stage folder holds `started.json` (the
declaration, written when work begins) and `manifest.json` (written last, by one atomic put): a stage is done when its
manifest is there, and not before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.dag.code_versions import code_hashes
from storage.store import Store

MANIFEST = "manifest.json"
STARTED = "started.json"
Status = Literal["done", "resume", "run"]


@dataclass(frozen=True)
class Stage:
    """One node: what determines its output, and the function that makes it.

    settings: plain JSON. module: the one whose code makes the output. inputs: names of stages before it.
    run: called with the stage's `StageRun`; returns the stage-specific part of the manifest.
    """

    name: str
    settings: Mapping[str, Any]
    module: str
    inputs: tuple[str, ...]
    run: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its place in storage, whether it will run, and why."""

    stage: Stage
    fingerprint: str
    declaration: Mapping[str, Any]
    store: Store
    status: Status
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        """The stage's name in the DAG."""
        return self.stage.name


def plan(stages: Sequence[Stage], store: Store) -> list[PlannedStage]:
    """Decide for each stage, in order, whether its output is there. Pure but for reading the store."""
    planned: dict[str, PlannedStage] = {}
    for stage in stages:
        declaration = {
            "stage": stage.name,
            "settings": _plain(stage.settings),
            "code": code_hashes(stage.module),
            "inputs": {name: planned[name].fingerprint for name in stage.inputs},
        }
        fingerprint = digest(declaration)
        home = store.at("stages", stage.name, fingerprint[:16])
        status: Status = "run"
        reasons: tuple[str, ...] = ()
        if home.exists(MANIFEST):
            status = "done"
        elif home.exists(STARTED):
            status, reasons = "resume", ("started and not finished: carries on where it stopped",)
        else:
            reasons = _why(declaration, store.at("stages", stage.name))
        planned[stage.name] = PlannedStage(stage, fingerprint, declaration, home, status, reasons)
    return list(planned.values())


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True))


def _why(declaration: Mapping[str, Any], history: Store) -> tuple[str, ...]:
    """What changed since the run of this stage that differs least from the declaration."""
    earlier = [history.at(folder).read_json(STARTED) for folder in history.folders()]
    differences = [_differences(old, declaration) for old in earlier if old]
    return min(differences, key=len) if differences else ("never run",)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    reasons = [f"input {name} changed" for name in new["inputs"] if old["inputs"].get(name) != new["inputs"][name]]
    reasons += [f"setting {line}" for line in _changed("", old["settings"], new["settings"])]
    reasons += [f"code of {name} changed" for name in new["code"] if old["code"].get(name) != new["code"][name]]
    return tuple(reasons) or ("declared differently",)


def _changed(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for part in sorted({*old, *new}):
            lines += _changed(f"{key}.{part}".lstrip("."), old.get(part), new.get(part))
        return lines
    return [] if old == new else [f"{key}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
