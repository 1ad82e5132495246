"""A recipe as a DAG: the list of its stages, every one after its inputs. A new stage is named here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

_NONE: Mapping[str, tuple[str, ...]] = {}


def build_stages(
    recipe: Recipe, objects: Sequence[SourceObject] | None = None, changes: Mapping[str, tuple[str, ...]] = _NONE
) -> list[Stage[Any]]:
    """The stages of a recipe; without `train` those of data alone, and the report.

    objects: the listing of its sources, made here where it is None. changes: of stages by kind, what differs from
    before, for the plan. Raises UserError where a source has no object.
    """
    objects = list_sources(recipe) if objects is None else Listing.of(objects)
    media = recipe.vqgan is not None and not {"text", "generated"}.issuperset(objects.distinct("kind"))
    codec = CodecStage(recipe) if media else None
    listed = {name: {**source} for name, source in recipe.public_json()["sources"].items()}
    for source in listed.values():
        del source["turns"]  # which lists nothing
    asked = {"data": recipe.storage.data, "sources": listed}
    sources = SourcesStage(objects, heldout_notes(recipe, objects), changes.get(SourcesStage.kind, ()), asked)
    stages: list[Stage[Any]] = [sources, *([codec] if codec else [])]
    packs = tuple(PackStage.named(data.name) for data in recipe.packed.values())
    estimate = changes.get(TokenizeStage.kind, ())
    stages.append(TokenizeStage(recipe, codec.name if codec else None, packs, estimate))
    if recipe.train is None:
        stages += [PackStage(recipe, data) for data in recipe.pack.stages]
    else:
        stages += [*_curriculum(recipe), EvaluateStage(recipe, codec.name if codec else None)]
    return [*stages, ReportStage(recipe, tuple(stages))]


def _curriculum(recipe: Recipe) -> Iterator[Stage[Any]]:
    """The stages that pack and train, each on the model of the one before."""
    previous: str | None = None
    for settings in recipe.curriculum:
        train = TrainStage(recipe, settings, previous)
        yield from (PackStage(recipe, settings, train.name), train)
        previous = train.name
