"""The sources stage: commits the listing of raw objects as `objects.parquet`, one `SourceObject` a row, sorted.

Every plan lists anew, so that a changed, added or removed object changes the fingerprint of what depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.dag.manifest import Manifest
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.report.numbers import count, count_of
from pipelines.sources.listing import OBJECTS, Listing, listing_digest, write_objects


@dataclass(frozen=True)
class SourcesOutputs:
    """objects: the listing's file. files: sha256 by name."""

    objects: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class SourcesRecord:
    """figures: of each source how many objects and bytes there are, and the digest of its listing."""

    outputs: SourcesOutputs
    figures: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class SourcesStage(Stage[SourcesRecord]):
    """objects: the listing, made when the DAG is built. heldout: what each pattern holds out, a sentence each. changes:
    what is new, changed or gone since the listing that was committed last. asked: the sources as the recipe has them.
    """

    kind = "sources"
    record = SourcesRecord
    output_version = 3
    inputs = ()

    objects: Listing
    heldout: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> Mapping[str, Any]:
        """Counts and a hash by source."""
        return listing_digest(self.objects)

    def requested(self) -> Mapping[str, Any]:
        """The sources as the recipe has them."""
        return self.asked

    @property
    def kept_for(self) -> tuple[str, ...]:
        """Documents: where they are kept, so is the listing that they are of."""
        return ("tokenize",)

    def notes(self, figures: Mapping[str, Any] | None) -> tuple[str, ...]:
        """What is not as it was committed last, and what is held out."""
        return self.changes + self.heldout

    def run(self, context: StageContext) -> Made[SourcesRecord]:
        """Commit the listing."""
        write_objects(context.store, self.objects)
        outputs = SourcesOutputs(OBJECTS, {OBJECTS: context.store.sha256(OBJECTS)})
        return Made(SourcesRecord(outputs, listing_digest(self.objects)))

    def summary(self, manifest: Manifest[SourcesRecord]) -> tuple[str, ...]:
        """Objects and bytes."""
        sources = manifest.record.figures.values()
        total = sum(source["bytes"] for source in sources)
        return (count_of(sum(source["objects"] for source in sources), "objects"), f"{count(total)}B")
