"""A recipe as a DAG: the list of its stages, every one after its inputs. A new stage is named here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.codecs.stage import CodecStage
from pipelines.dag.stage import Stage
from pipelines.evaluate.stage import EvaluateStage
from pipelines.pack.stage import PackStage
from pipelines.recipe import Recipe
from pipelines.report.stage import ReportStage
from pipelines.sources.heldout import heldout_notes
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import Listing, SourceObject
from pipelines.sources.stage import SourcesStage
from pipelines.tokenize.stage import TokenizeStage
from pipelines.train.stage import TrainStage


def build_stages(
    recipe: Recipe, objects: Sequence[SourceObject] | None = None, changes: tuple[str, ...] = ()
) -> list[Stage[Any]]:
    """The stages of a recipe.

    objects: the listing of its sources, made here where it is None. changes: what differs from the one before, for the
    plan. Raises UserError where a source has no object.
    """
    objects = list_sources(recipe) if objects is None else Listing.of(objects)
    media = recipe.vqgan is not None and any(kind != "text" for kind in objects.distinct("kind"))
    codec = CodecStage(recipe) if media else None
    stages: list[Stage[Any]] = [
        SourcesStage(objects, heldout_notes(recipe, objects), changes),
        *([codec] if codec else []),
    ]
    stages.append(TokenizeStage(recipe, codec.name if codec else None))
    previous: str | None = None
    for settings in recipe.train.stages:
        train = TrainStage(recipe, settings, previous)
        stages += [PackStage(recipe, settings), train]
        previous = train.name
    stages.append(EvaluateStage(recipe, codec.name if codec else None))
    return [*stages, ReportStage(recipe, tuple(stages))]
