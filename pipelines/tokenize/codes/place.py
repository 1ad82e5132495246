"""Where the codes of one encoding are, and the process that tells all tasks of a stage which files have an object's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.cluster.same_code import as_driver
from pipelines.dag.manifest import digest
from pipelines.tokenize.codes.index import CodesIndex, write_index
from storage.store import Store

ENCODING_VERSION = 1
"""Raised by hand when the same frames of a medium give other codes than before: by how they are decoded, or encoded."""
DESCRIPTION = "encoding.json"
_INDEX_RESTARTS = 20  # of its process in a stage, on the driver's own node


@dataclass(frozen=True)
class Encoding:
    """What decides codes beside the medium. codec: fingerprint of its weights. fps: samples of video a second."""

    codec: str
    precision: str
    resolution: int
    fps: float
    version: int = ENCODING_VERSION

    @property
    def folder(self) -> str:
        """Its folder in a store."""
        return digest(asdict(self))[:16]


@ray.remote(num_cpus=0)
class _IndexActor:
    """The index of one encoding, for all tasks of a stage. Its state may be lost: it is read again."""

    @as_driver
    def __init__(self, store: Store) -> None:
        self._store = store
        self._index: CodesIndex | None = None

    def find(self, objects: list[bytes]) -> list[list[str]]:
        return self._loaded().find(objects)

    def add(self, name: str, objects: list[bytes]) -> None:
        self._loaded().add(name, objects)

    def _loaded(self) -> CodesIndex:
        if self._index is None:
            self._index = CodesIndex(self._store)
            self._index.load()
        return self._index


@dataclass(frozen=True)
class CodesPlace:
    """Where the codes of one encoding are. store: its folder. index: answers `find` and takes `add`."""

    store: Store
    index: Any

    @property
    def encoding(self) -> str:
        """The folder's name."""
        return self.store.url.rpartition("/")[2]


@contextlib.contextmanager
def codes_place(store: Store, encoding: Encoding) -> Iterator[CodesPlace]:
    """The place of an encoding in a store of codes, with its index on the driver's node, while the block runs."""
    folder = store.at(encoding.folder)
    folder.create_json(DESCRIPTION, asdict(encoding))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"max_restarts": _INDEX_RESTARTS, "max_task_retries": _INDEX_RESTARTS, "scheduling_strategy": here}
    actor = _IndexActor.options(**options).remote(folder)  # type: ignore[attr-defined]
    try:
        yield CodesPlace(folder, actor)
        write_index(folder)
    finally:
        ray.kill(actor)
