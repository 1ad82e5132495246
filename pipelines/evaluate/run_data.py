"""What the stages of a run made that an evaluation reads beside the models: packed shards and raw held-out objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.codecs.record import CodecRecord
from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import StageOutput
from pipelines.evaluate.subject import TrainedSubject
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.recipe import Kind, Recipe
from pipelines.sources.listing import Listing, read_objects
from pipelines.sources.stage import SourcesStage
from pipelines.train.stage import TrainStage
from tokenization.vocabulary import JointVocabulary


@dataclass(frozen=True)
class RunData:
    """A recipe and what its stages made, by name; those that are not done are absent.

    listing: of the recipe's sources, where no stage has committed it.
    """

    recipe: Recipe
    vocabulary: JointVocabulary
    outputs: Mapping[str, StageOutput[Any]] = field(default_factory=dict)
    listing: Listing | None = None

    @property
    def last(self) -> str:
        """The name of the last training stage."""
        return self.recipe.curriculum[-1].name

    @property
    def codec(self) -> StageOutput[CodecRecord] | None:
        """The VQGAN; None where all is text."""
        return self.outputs.get(CodecStage.kind)

    def packed(self, stage: str) -> StageOutput[PackRecord] | None:
        """What was packed for a training stage."""
        return self.outputs.get(PackStage.named(stage))

    def trained(self, stage: str) -> TrainedSubject:
        """The model that a training stage left."""
        output = self.outputs[TrainStage.named(stage)]
        return TrainedSubject.of_stage(self.recipe, self.vocabulary, output, self.codec)

    def objects(self, kinds: tuple[Kind, ...], heldout: bool) -> Listing:
        """The raw objects of these kinds in one split, in the listing's order."""
        listing = self.listing
        if listing is None:
            listing = read_objects(self.outputs[SourcesStage.kind].store, self.recipe)
        return listing.of_split(heldout, kinds)
