"""The vqgan stage: the visual tokenizer's weights, imported from where the recipe says or trained on its frames.

The work is one Ray task, which alone imports what makes a VQGAN: the driver does without. Out: `weights/`, a diffusers
`VQModel` folder, and the fingerprint of all its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.heartbeat import start_watch
from pipelines.cluster.placement import PlacementWait, first_ready
from pipelines.cluster.progress import bar, following
from pipelines.cluster.ray_cluster import own_errors
from pipelines.cluster.same_code import as_driver
from pipelines.codecs.record import CodecRecord
from pipelines.dag.manifest import Manifest, url_digest
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.recipe import Recipe, Resources, VisualTokenizer, output_settings
from pipelines.report.numbers import count
from pipelines.sources.listing import MEDIA, Listing, read_objects
from pipelines.sources.stage import SourcesRecord
from storage.store import Store


@dataclass(frozen=True)
class CodecStage(Stage[CodecRecord]):
    """Makes the recipe's VQGAN, which it has to have."""

    kind = "vqgan"
    record = CodecRecord
    output_version = 1
    libraries = ("torch", "diffusers", "av", "pillow")
    keeps_its_data = "done"  # else one more video would make all codes anew

    recipe: Recipe

    @property
    def vqgan(self) -> VisualTokenizer:
        """The recipe's part."""
        assert self.recipe.vqgan is not None
        return self.recipe.vqgan

    @property
    def inputs(self) -> tuple[str, ...]:
        """Frames, where it is trained."""
        return ("sources",) if self.vqgan.train else ()

    def settings(self) -> Mapping[str, Any]:
        """Its sizes, and the weights' listing or how it is trained."""
        vqgan, options = self.vqgan, self.recipe.storage.options
        return {
            "config": vqgan.sizes.to_dict(),
            "weights": url_digest("vqgan.weights", vqgan.weights, options) if vqgan.weights else None,
            "train": output_settings(vqgan.train),
            "seed": self.recipe.seed,
        }

    def resources(self) -> Capacity:
        """The threads of its training."""
        return Capacity(cpus=self.vqgan.train.threads) if self.vqgan.train else Capacity()

    def run(self, context: StageContext) -> Made[CodecRecord]:
        """Import or train in one task of the cluster."""
        train = self.vqgan.train
        media = Listing.of([])
        if train:
            objects = read_objects(context.input("sources", SourcesRecord).store, self.recipe)
            media = objects.of_split(False, MEDIA)
        threads = train.threads if train else 1
        watch = start_watch()
        with bar(self.name, train.steps if train else None, "step") as line, following(line, watch), own_errors():
            task = _make.options(num_cpus=threads, max_retries=3, name="vqgan").remote(
                self.recipe, media, context.store, watch
            )
            return Made(ray.get(first_ready([task], PlacementWait("vqgan", Resources(cpus=threads)))))

    def summary(self, manifest: Manifest[CodecRecord]) -> tuple[str, ...]:
        """Steps and quality of its training."""
        figures = manifest.record.figures
        steps = f"{count(figures['steps'])} steps" if "steps" in figures else "imported"
        return (steps, *((f"{figures['psnr']:.1f} dB in training",) if "psnr" in figures else ()))


@ray.remote
@as_driver
def _make(recipe: Recipe, objects: Listing, store: Store, watch: Any) -> CodecRecord:
    from pipelines.codecs.vqgan import make_vqgan

    return make_vqgan(recipe, objects, store, watch)
