"""The pack stage of the data of one stage: its sources' documents to shards of packed sequences at its context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.progress import bar
from pipelines.dag.manifest import Manifest
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.pack.record import PackRecord
from pipelines.recipe import PackedData, Recipe, output_settings
from pipelines.report.numbers import count_of
from pipelines.tokenize.record import TokenizeRecord, read_partitions


@dataclass(frozen=True)
class PackStage(Stage[PackRecord]):
    """Packs the data of one stage, which the recipe trains or which is for others to train.

    train: the name of the stage that trains on it, if any.
    """

    kind = "pack"
    record = PackRecord
    output_version = 2
    libraries = ("safetensors", "numpy")
    inputs = ("tokenize",)

    recipe: Recipe
    stage: PackedData
    train: str | None = None

    @property
    def kept_for(self) -> tuple[str, ...]:
        """What is trained on it."""
        return (self.train,) if self.train else ()

    @staticmethod
    def named(stage: str) -> str:
        """The name of the stage that packs the data of a stage of this name."""
        return f"pack-{stage}"

    @property
    def name(self) -> str:
        """After the stage whose data it is."""
        return self.named(self.stage.name)

    def settings(self) -> Mapping[str, Any]:
        """How documents are chosen and packed; not in which ratio sources are mixed."""
        return {
            "pack": output_settings(self.recipe.pack),
            "context": self.stage.context,
            "objective": self.stage.objective,
            "sources": self.stage.source_names,
            "document_tokens": [self.stage.min_document_tokens, self.stage.max_document_tokens],
            "seed": self.recipe.seed,
        }

    def resources(self) -> Capacity:
        """One task."""
        return Capacity().plus(self.recipe.pack.pool, 1)

    def run(self, context: StageContext) -> Made[PackRecord]:
        """Pack every partition on the cluster."""
        from pipelines.pack.run import PackJob, cut_pack_partitions, pack_all
        from pipelines.tokenize.vocabulary import joint_vocabulary

        documents = context.input("tokenize", TokenizeRecord)
        job = PackJob(self.recipe.pack, self.stage, joint_vocabulary(self.recipe), self.recipe.seed)
        decides = {**self.settings(), "vocabulary": job.vocabulary.to_json()}
        decides |= {"output_version": self.output_version, "rebuild": context.rebuild}
        del decides["sources"]  # a partition is of one
        tokenized, limit = read_partitions(documents), self.recipe.pack.partition_tokens
        partitions = cut_pack_partitions(tokenized, self.stage.source_names, decides, limit)
        with bar(self.name, len(partitions), "part") as line:
            return Made(pack_all(job, partitions, documents, context.store, context.shared, line))

    def summary(self, manifest: Manifest[PackRecord]) -> tuple[str, ...]:
        """Sequences, and how full they are."""
        sets = [packed for splits in manifest.record.outputs.sets.values() for packed in splits.values()]
        filled, tokens = (sum(packed[key] for packed in sets) for key in ("n_filled", "n_tokens"))
        share = f"{100 * filled / max(tokens, 1):.1f}% filled"
        return (count_of(manifest.record.figures.sequences, "sequences"), share)
