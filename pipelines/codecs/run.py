"""The work of the vqgan stage as one Ray task, which alone imports what makes a VQGAN: the driver does without.

Out: `weights/`, a diffusers `VQModel` folder, and the fingerprint of all its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from pipelines.cluster.heartbeat import start_watch
from pipelines.cluster.placement import PlacementWait, first_ready
from pipelines.cluster.progress import Bar, following
from pipelines.cluster.ray_cluster import own_errors
from pipelines.cluster.same_code import as_driver
from pipelines.codecs.record import CodecRecord
from pipelines.recipe import Resources, VisualTokenizer
from pipelines.sources.listing import SourceObject
from storage.store import Store


def make_codec(
    recipe: VisualTokenizer, objects: Sequence[SourceObject], seed: int, store: Store, line: Bar
) -> CodecRecord:
    """Make the weights on the cluster, in the stage's folder."""
    threads = recipe.train.threads if recipe.train else 1
    media = [found for found in objects if found.kind != "text" and not found.heldout]
    watch = start_watch()
    with following(line, watch), own_errors():
        make = _make.options(num_cpus=threads, max_retries=3, name="vqgan")
        task = make.remote(recipe, media, seed, store, watch)
        record: CodecRecord = ray.get(first_ready([task], PlacementWait("vqgan", Resources(cpus=threads))))
    return record


@ray.remote
@as_driver
def _make(recipe: VisualTokenizer, objects: list[SourceObject], seed: int, store: Store, reports: Any) -> CodecRecord:
    from pipelines.codecs.vqgan import make_vqgan

    return make_vqgan(recipe, objects, seed, store, reports)
