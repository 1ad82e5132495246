"""What the stages of a finished run have made, as later stages read it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pipelines.dag.manifest import PlainRecord, StageOutput, is_fingerprint, read_manifest
from pipelines.tokenize.record import TokenizedPartition, TokenizeRecord, read_partitions
from storage.store import Store
from tokenization.document import Document
from tokenization.shards.document_parquet import read_documents

R = TypeVar("R")


def only_folder(root: Store | Path, stage: str) -> Store:
    """The folder of a stage's only fingerprint, of a run in `root`."""
    history = (root if isinstance(root, Store) else Store(str(root))).at("stages", stage)
    (folder,) = filter(is_fingerprint, history.folders())
    return history.at(folder)


def output_of(store: Store, record: type[R]) -> StageOutput[R]:
    """The output of a stage that is done in a folder."""
    manifest = read_manifest(store, record)
    assert manifest is not None, f"{store.url} is not done"
    return StageOutput(store, manifest)


def only_output(root: Store | Path, stage: str, record: type[Any] = PlainRecord) -> StageOutput[Any]:
    """The output of a stage that is done, of a run in `root`, in which it has one fingerprint."""
    return output_of(only_folder(root, stage), record)


def documents_of(
    output: StageOutput[TokenizeRecord], partitions: Iterable[TokenizedPartition] | None = None
) -> dict[str, Document]:
    """The documents of partitions by key; None: of all that the tokenize stage made."""
    made: dict[str, Document] = {}
    for part in read_partitions(output) if partitions is None else partitions:
        with output.shared.open(part.file) as file:
            made |= {document.key: document for document in read_documents(file)}
    return made
