"""Runs a recipe's DAG to the end on Ray: what is done is passed over, what was interrupted carries on."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

from pipelines.build import build_stages
from pipelines.cluster.capacity import needed_at_once
from pipelines.cluster.ray_cluster import ray_instance
from pipelines.dag.code_versions import made_by
from pipelines.dag.kept import REQUEST
from pipelines.dag.manifest import FORMAT, MANIFEST, STARTED, Manifest, StageOutput, place_in_run, read_manifest
from pipelines.dag.plan import REBUILDS, PlannedStage, plan
from pipelines.dag.stage import Stage, StageContext
from pipelines.dag.until import stages_until
from pipelines.preflight import check_recipe
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing_changes import changes_since
from pipelines.sources.stage import SourcesStage
from pipelines.tokenize.codes.users import note_user
from pipelines.tokenize.estimate import encoding_note
from pipelines.tokenize.stage import TokenizeStage, codes_store
from pipelines.train.profiled_steps import ProfiledSteps
from storage.errors import UserError
from storage.lease import STALE_SECONDS, lease
from storage.store import Store
from storage.urls import first_contact

log = logging.getLogger("ringworld")


def plan_recipe(recipe: Recipe, rebuild: Collection[str] = (), until: str | None = None) -> list[PlannedStage]:
    """The recipe's stages with what is done, what will run, and why. rebuild, until: as of `run_recipe`."""
    root = root_store(recipe)
    with first_contact(root.url):
        root.read_json(REBUILDS)
    root.check_output()
    return plan(_checked_stages(recipe, root, rebuild, until), root, rebuild)


def _checked_stages(recipe: Recipe, root: Store, rebuild: Collection[str], until: str | None) -> list[Stage[Any]]:
    codes_store(recipe).check_output("storage.codes")
    objects = list_sources(recipe)
    check_recipe(recipe, objects)
    notes: dict[str, tuple[str, ...]] = {}
    if found := changes_since(root.at("stages", SourcesStage.kind), objects):
        changes, finished = found
        notes[SourcesStage.kind] = (changes.sentence(len(objects), finished),)
        notes[TokenizeStage.kind] = encoding_note(root.at("stages", TokenizeStage.kind), changes, recipe)
    stages = build_stages(recipe, objects, notes)
    return stages if until is None else stages_until(stages, until, rebuild)


def root_store(recipe: Recipe) -> Store:
    """The run's output folder."""
    return Store(recipe.storage.root, recipe.storage.options)


def run_recipe(
    recipe: Recipe,
    address: str | None = None,
    profile: ProfiledSteps | None = None,
    rebuild: Collection[str] = (),
    until: str | None = None,
) -> dict[str, Manifest[Any]]:
    """Run every stage that is not done and return all manifests by stage name.

    address: of the Ray cluster to join; None starts one on this machine, if there is anything to run. profile: steps to
    trace of each train stage that runs. rebuild: names of stages to make again. until: the name of a stage or the kind
    of some, of which nothing but these and what they need is run; None: all. Raises UserError for what the user can
    mend; a stage that fails for another reason raises what it raised.
    """
    if recipe.storage.root.startswith("memory://"):
        raise UserError(f"{recipe.storage.root}: no other process sees this; set storage.root to a folder or a bucket")
    with lease(root_store(recipe)) as root:
        # What dead runs left, also of stages that the recipe no longer has. A driver that is asking for the lease just
        # now has a young file in the root.
        swept = root.at("stages").sweep_temporaries() + root.sweep_temporaries(deep=False, age=STALE_SECONDS)
        if swept:
            log.info("removed %d half-written files of dead runs", swept)
        stages = _checked_stages(recipe, root, rebuild, until)
        if recipe.storage.codes:  # which may not be there, or not be ours to write: told before hours of work end there
            codes = codes_store(recipe)
            with first_contact(codes.url):
                note_user(codes, root)
        return run_stages(plan(stages, root, rebuild), root, address, profile)


def run_stages(
    stages: Sequence[PlannedStage], root: Store, address: str | None = None, profile: ProfiledSteps | None = None
) -> dict[str, Manifest[Any]]:
    """The same for stages that are planned below `root`, which this process alone writes to."""
    for stage in stages:
        log.info("%-18s %-7s %s", stage.name, stage.status, "; ".join(stage.reasons + stage.notes))
    to_run = [stage.stage for stage in stages if stage.status != "done"]
    for unfinished in to_run:
        unfinished.check()
    if not to_run:
        return _run_all(stages)
    if rebuilds := {stage.name: stage.declaration.rebuild for stage in stages if stage.declaration.rebuild}:
        root.write_json(REBUILDS, {**(root.read_json(REBUILDS) or {}), **rebuilds})
    with ray_instance(address, needed_at_once(stage.resources() for stage in to_run)):
        return _run_all(stages, profile)


def _run_all(stages: Sequence[PlannedStage], profile: ProfiledSteps | None = None) -> dict[str, Manifest[Any]]:
    outputs: dict[str, StageOutput[Any]] = {}
    for stage in stages:
        if stage.status != "done":
            inputs = {name: outputs[name] for name in stage.stage.inputs}
            run_stage(stage, StageContext(stage.store, inputs, profile, stage.declaration.rebuild))
        manifest = read_manifest(stage.store, stage.stage.record)
        assert manifest is not None, stage.name
        outputs[stage.name] = StageOutput(stage.store, manifest)
    return {name: output.manifest for name, output in outputs.items()}


def run_stage(stage: PlannedStage, context: StageContext) -> None:
    """Run a planned stage and commit its manifest, last."""
    started = time.monotonic()
    if not stage.store.exists(STARTED):
        declared = {"format": FORMAT, **stage.declaration.to_json(), REQUEST: stage.request}
        stage.store.write_json(STARTED, declared)
    made = stage.stage.run(context)
    context.shared.sweep_temporaries()  # of workers that were killed meanwhile
    seconds = time.monotonic() - started
    manifest = Manifest(
        stage.declaration,
        made.record,
        made.quarantine,
        made.quarantined,
        stage.fingerprint,
        {name: place_in_run(output.store) for name, output in context.inputs.items()},
        made_by(stage.stage.libraries),
        round(seconds, 3),
        _now(),
    )
    stage.store.write_json(MANIFEST, manifest.to_json())
    log.info("%s: done in %.1f s", stage.name, seconds)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
