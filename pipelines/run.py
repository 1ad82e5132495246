"""Runs a recipe's DAG to the end on Ray: what is done is passed over, what was interrupted carries on."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Sequence
from typing import Any

from pipelines.build import Manifest, StageRun, build_stages
from pipelines.cluster.capacity import needed_at_once
from pipelines.cluster.ray_cluster import ray_instance
from pipelines.dag.stage import MANIFEST, STARTED, PlannedStage, plan
from pipelines.recipe import Recipe
from pipelines.train.check_kernels import check_kernels
from pipelines.train.check_wandb import check_wandb
from pipelines.train.profiled_steps import ProfiledSteps
from storage.lease import STALE_SECONDS, lease
from storage.store import Store

log = logging.getLogger("ringworld")


def plan_recipe(recipe: Recipe) -> list[PlannedStage]:
    """The recipe's stages with what is done, what will run, and why."""
    return plan(build_stages(recipe), root_store(recipe))


def root_store(recipe: Recipe) -> Store:
    """The run's output folder."""
    return Store(recipe.storage.root, recipe.storage.options)


def run_recipe(recipe: Recipe, address: str | None = None, profile: ProfiledSteps | None = None) -> dict[str, Manifest]:
    """Run every stage that is not done and return all manifests by stage name.

    address: of the Ray cluster to join; None starts one on this machine, if there is anything to run. profile: steps to
    trace of each train stage that runs. Raises UserError for what the user can mend; a stage that fails for another
    reason raises what it raised.
    """
    check_wandb(recipe)
    check_kernels(recipe)
    with lease(root_store(recipe)) as root:
        _sweep(root)
        stages = plan(build_stages(recipe), root)
        for stage in stages:
            log.info("%-18s %-7s %s", stage.name, stage.status, "; ".join(stage.reasons))
        if all(stage.status == "done" for stage in stages):
            return {stage.name: _manifest(stage) for stage in stages}
        with ray_instance(address, needed_at_once(recipe)):
            return _run_all(stages, profile)


def _sweep(root: Store) -> None:
    """Remove what dead runs left, of stages that nobody asks for any more too, while the lease keeps others away.

    A driver that asks for the lease just now has a young file in the root.
    """
    swept = root.at("stages").sweep_temporaries() + root.sweep_temporaries(deep=False, age=STALE_SECONDS)
    if swept:
        log.info("removed %d half-written files of dead runs", swept)


def _run_all(stages: Sequence[PlannedStage], profile: ProfiledSteps | None = None) -> dict[str, Manifest]:
    manifests: dict[str, Manifest] = {}
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if stage.status != "done":
            inputs = {name: (by_name[name].store, manifests[name]) for name in stage.stage.inputs}
            _run_one(stage, StageRun(stage.store, inputs, profile))
        manifests[stage.name] = _manifest(stage)
    return manifests


def _run_one(stage: PlannedStage, context: StageRun) -> None:
    started = time.monotonic()
    if not stage.store.exists(STARTED):
        stage.store.write_json(STARTED, dict(stage.declaration))
    result = stage.stage.run(context)
    stage.store.sweep_temporaries()  # of workers that were killed meanwhile
    seconds = time.monotonic() - started
    manifest: dict[str, Any] = {
        **stage.declaration,
        "fingerprint": stage.fingerprint,
        "seconds": round(seconds, 3),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quarantine": [],
        **result,
    }
    stage.store.write_json(MANIFEST, manifest)
    log.info("%s: done in %.1f s", stage.name, seconds)


def _manifest(stage: PlannedStage) -> Manifest:
    manifest: Manifest | None = stage.store.read_json(MANIFEST)
    assert manifest is not None, stage.name
    return manifest
