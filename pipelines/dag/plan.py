"""Which stages are done, which will run, and why.

A changed setting re-runs exactly what depends on it; changed code and libraries are shown and re-run nothing. What was
made before outputs had versions, in folders named by hashes of code, is adopted where settings and inputs agree.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipelines.dag.code_versions import changed_versions, made_by
from pipelines.dag.kept import Kept, kept_stages, requests
from pipelines.dag.manifest import MANIFEST, STARTED, Declaration, digest, is_fingerprint, refuse_newer
from pipelines.dag.stage import Stage
from storage.errors import UserError
from storage.store import Store

REBUILDS = "rebuilds.json"
"""In the run's root: how often `--rebuild` was given for each stage, by name."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its folder, whether it will run and why, and notes on what is there.

    made_as: the fingerprint under which its folder was made, which is another where an older run was adopted. request:
    as of `requests`.
    """

    stage: Stage[Any]
    declaration: Declaration
    store: Store
    status: Literal["done", "resume", "run"]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    made_as: str
    request: str = ""

    @property
    def name(self) -> str:
        """The stage's name in the DAG."""
        return self.stage.name

    @property
    def fingerprint(self) -> str:
        """Of the declaration."""
        return self.declaration.fingerprint


def plan(stages: Sequence[Stage[Any]], store: Store, rebuild: Collection[str] = ()) -> list[PlannedStage]:
    """Decide for each stage, in order, whether its output is there. Pure but for reading the store.

    rebuild: names of stages to make again although they are done; a rebuild that has begun carries on. Raises UserError
    where the DAG has no stage of that name.
    """
    names = [stage.name for stage in stages]
    if unknown := sorted(set(rebuild) - set(names)):
        raise UserError(f"--rebuild {unknown[0]}: the recipe has no such stage; its stages are {', '.join(names)}")
    rebuilds: dict[str, int] = dict(store.read_json(REBUILDS) or {})
    planned = _plan(stages, store, rebuilds)
    again = [stage.name for stage in planned if stage.name in rebuild and stage.status == "done"]
    if not again:
        return planned
    return _plan(stages, store, rebuilds | {name: rebuilds.get(name, 0) + 1 for name in again})


def _plan(stages: Sequence[Stage[Any]], store: Store, rebuilds: Mapping[str, int]) -> list[PlannedStage]:
    asked = requests(stages, rebuilds)
    kept = kept_stages(stages, store, asked)
    planned: dict[str, PlannedStage] = {}
    for stage in stages:
        declaration = Declaration(
            stage=stage.name,
            kind=stage.kind,
            settings=json.loads(json.dumps(stage.settings(), sort_keys=True)),
            output_version=stage.output_version,
            inputs={name: planned[name].fingerprint for name in stage.inputs},
            rebuild=rebuilds.get(stage.name, 0),
        )
        history = store.at("stages", stage.name)
        one = None
        if (own := kept.get(stage.name)) and own.declaration != declaration:
            one = _kept(stage, own, history, declaration)
        planned[stage.name] = replace(one or _planned(stage, declaration, history, planned), request=asked[stage.name])
    return list(planned.values())


def _kept(stage: Stage[Any], own: Kept, history: Store, today: Declaration) -> PlannedStage | None:
    """A stage with the data that it began with; None where it is not done and what it was made from is there no more.

    today: as it would be declared with the data that are there now.
    """
    notes = (f"keeps the data that it began with, of {own.began}",)
    declared = own.declaration
    planned = _there(stage, declared, history.at(own.folder), declared.fingerprint, notes)
    return planned if planned.status == "done" or declared.inputs == today.inputs else None


def _planned(
    stage: Stage[Any], declaration: Declaration, history: Store, before: Mapping[str, PlannedStage]
) -> PlannedStage:
    home, made_as = history.at(declaration.fingerprint[:16]), declaration.fingerprint
    notes: tuple[str, ...] = ()
    if not home.exists(STARTED):
        folders = filter(is_fingerprint, history.folders())
        earlier = {folder: history.at(folder).read_json(STARTED) or {} for folder in folders}
        inputs = {name: before[name].made_as for name in stage.inputs}
        same = [folder for folder, tree in earlier.items() if _is_adoptable(tree, declaration, inputs)]
        if not same:
            reasons = _reasons(declaration, list(earlier.values()), inputs)
            return PlannedStage(stage, declaration, home, "run", reasons, stage.notes(None), made_as)
        folder = max(same, key=lambda name: (history.at(name).read_json(MANIFEST) or {}).get("finished", ""))
        home, made_as = history.at(folder), digest(earlier[folder])
        notes += ("adopted: made from the same inputs by the same settings, before outputs had versions",)
    return _there(stage, declaration, home, made_as, notes)


def _there(
    stage: Stage[Any], declaration: Declaration, home: Store, made_as: str, notes: tuple[str, ...]
) -> PlannedStage:
    """A stage that has begun in a folder."""
    manifest = home.read_json(MANIFEST)
    if manifest is None:
        reasons = ("started and not finished: carries on where it stopped",)
        return PlannedStage(stage, declaration, home, "resume", reasons, notes + stage.notes(None), made_as)
    refuse_newer(manifest, home.path(MANIFEST))
    if changed := changed_versions(manifest.get("made_by", {}), made_by(stage.libraries)):
        notes += (f"made with {', '.join(changed)}; `--rebuild {stage.name}` makes it again",)
    notes += stage.notes(manifest.get("figures", {}))
    return PlannedStage(stage, declaration, home, "done", (), notes, made_as)


def _is_adoptable(tree: Mapping[str, Any], declaration: Declaration, inputs: Mapping[str, str]) -> bool:
    """Whether a folder of format 1, named by hashes of code, holds what the declaration asks for.

    tree: its `started.json`. inputs: the fingerprints under which the inputs were made.
    """
    return (
        "code" in tree
        and (declaration.output_version, declaration.rebuild) == (1, 0)
        and (tree["settings"], tree["inputs"]) == (declaration.settings, inputs)
    )


def _reasons(new: Declaration, earlier: Sequence[Mapping[str, Any]], inputs: Mapping[str, str]) -> tuple[str, ...]:
    """What changed since the run of this stage that differs least. inputs: as in `_is_adoptable`."""
    differences = [
        _differences(Declaration.from_json(tree), new, inputs if "code" in tree else new.inputs)
        for tree in earlier
        if tree
    ]
    return min(differences, key=len) if differences else ("never run",)


def _differences(old: Declaration, new: Declaration, inputs: Mapping[str, str]) -> tuple[str, ...]:
    reasons = [f"input {name} changed" for name in inputs if old.inputs.get(name) != inputs[name]]
    reasons += [f"setting {line}" for line in _changed("", old.settings, new.settings)]
    if old.output_version != new.output_version:
        reasons.append(f"this version makes other output: {old.output_version} -> {new.output_version}")
    if new.rebuild > old.rebuild:
        reasons.append("--rebuild asks for it again")
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
