"""Draws some of what a stage of a run made, and reads that alone: listed objects, documents or packed sequences.

In: a finished stage, how many, a seed. Out: as many different ones, in the order in which they lie; all where there are
no more. Which there are is known from the stage's record: of documents only their row groups are read, of sequences
their own bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.dag.manifest import MANIFEST, StageOutput, is_fingerprint
from pipelines.pack.record import PackRecord
from pipelines.sources.listing import SourceObject, read_objects
from pipelines.sources.stage import SourcesRecord
from pipelines.tokenize.record import TokenizedPartition, TokenizeRecord, read_partitions
from storage.errors import UserError
from storage.store import Store
from storage.urls import first_contact
from tokenization.document import Document, PackedSequence
from tokenization.shards.document_parquet import read_documents
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import read_sequence


def last_output(run: Store, stage: str) -> Store:
    """The folder of the output of a stage that was finished last. Raises UserError where a run has none."""
    with first_contact(run.url):
        names = run.folders("stages")
    if stage not in names:
        there = f"its stages are {', '.join(names)}" if names else "it is no run's root, where the folder stages is"
        raise UserError(f"{run.path()}: there is no stage {stage}; {there}")
    history = run.at("stages", stage)
    manifests = {name: history.at(name).read_json(MANIFEST) for name in history.folders() if is_fingerprint(name)}
    finished = {name: tree.get("finished", "") for name, tree in manifests.items() if tree}
    if not finished:
        raise UserError(f"{history.path()}: the stage is not done; run the recipe, at least with --until {stage}")
    return history.at(max(finished, key=finished.__getitem__))


def some_objects(output: StageOutput[SourcesRecord], number: int, seed: int) -> Iterator[SourceObject]:
    """Listed objects."""
    objects = read_objects(output.store)
    for _, places in _drawn([len(objects)], number, seed):
        yield from (objects[place] for place in places)


def some_documents(
    output: StageOutput[TokenizeRecord], number: int, seed: int
) -> Iterator[tuple[TokenizedPartition, Document]]:
    """Documents, each with its partition."""
    partitions = read_partitions(output)
    for index, rows in _drawn([part.documents for part in partitions], number, seed):
        with output.shared.open(partitions[index].file) as file:
            for document in read_documents(file, rows):
                yield partitions[index], document


def some_sequences(
    output: StageOutput[PackRecord], number: int, seed: int
) -> Iterator[tuple[ShardSet, str, PackedSequence]]:
    """Packed sequences, each with its set and the name of its shard."""
    sets = [(source, split, entry) for source, of in output.record.outputs.sets.items() for split, entry in of.items()]
    for index, numbers in _drawn([entry["n_sequences"] for *_, entry in sets], number, seed):
        source, split, _ = sets[index]
        shard_set = output.record.read_set(output.shared, source, split)
        assert shard_set is not None
        for place in numbers:
            name, _, entry = shard_set.locate(place)
            with output.shared.open_ranged(name) as file:
                yield shard_set, name, read_sequence(file, entry)


def _drawn(counts: Sequence[int], number: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Of things that lie so many in each place: the places of those that are drawn, and their numbers there, sorted."""
    ends = np.cumsum([0, *counts], dtype=np.int64)
    drawn = np.sort(np.random.default_rng(seed).choice(ends[-1], min(number, int(ends[-1])), replace=False))
    places = np.searchsorted(ends, drawn, side="right") - 1
    for place in np.unique(places).tolist():
        yield place, (drawn[places == place] - ends[place]).tolist()
