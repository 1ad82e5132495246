"""The files of a shard set: a small JSON of what is known of each shard, and beside it the index of all sequences.

In: a set, or its parts as they come. Out: `NAME.json` with the facts of each shard in columns, and `NAME.npy` with an
entry of 24 bytes a sequence, in order; later the set again. The entries are mapped from the file into memory, so that
all processes of a node share those which they touch: the file itself on a local disk, else one copy a node, which one
of its processes fetches. Sets of earlier versions, whose JSON has it all, are read as well.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import UserError
from storage.store import Store
from tokenization.shards.index import ENTRY, ShardSet, ShardStats, totals
from tokenization.vocabulary import JointVocabulary


def write_set(store: Store, name: str, shard_set: ShardSet) -> dict[str, Any]:
    """Commit a set under `name`, which ends in `.json`; returns its totals."""
    shards = [{"name": shard, **stats.to_json()} for shard, stats in zip(shard_set.names, shard_set.stats)]
    entries = (stats.index.entries for stats in shard_set.stats)
    settings = (shard_set.context, shard_set.vocabulary, shard_set.objective)
    return write_set_of(store, name, *settings, shards, entries)


def write_set_of(
    store: Store,
    name: str,
    context: int,
    vocabulary: JointVocabulary,
    objective: str,
    shards: Sequence[Mapping[str, Any]],
    entries: Iterable[np.ndarray],
) -> dict[str, Any]:
    """Commit a set whose entries are in memory a part at a time; returns its totals.

    name: of the JSON. shards: the name of each and what `ShardStats.to_json` says of it. entries: arrays of `ENTRY`,
    which follow each other. Raises ValueError where they are not as many as the shards' sequences.
    """
    sums = totals(shards, vocabulary)
    index = f"{name.removesuffix('.json')}.npy"
    digest = write_entries(store, index, entries, sums["n_sequences"])
    plain = {
        "context": context,
        "vocabulary": vocabulary.to_json(),
        "objective": objective,
        "totals": sums,
        "index": {"file": index, "sha256": digest},
        # In columns, since ten thousand objects with the same fields would take several times as much to read.
        "shards": {field: [shard[field] for shard in shards] for field in (shards[0] if shards else ())},
    }
    store.write_json(name, plain)
    return sums


def write_entries(store: Store, name: str, entries: Iterable[np.ndarray], count: int) -> str:
    """Commit arrays of `ENTRY`, `count` entries in all, end to end as one `.npy`; returns its sha256 in hex.

    Raises ValueError where they are more or fewer.
    """
    with store.writing(name) as file:
        header = {"descr": np.lib.format.dtype_to_descr(ENTRY), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in entries:
            file.write(part.tobytes())
            count -= len(part)
        if count:
            raise ValueError(f"{store.path(name)}: {abs(count)} entries {'missing' if count > 0 else 'too many'}")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_entries(store: Store, name: str) -> np.ndarray:
    """The array of `ENTRY` of a small `.npy`, in memory. Raises FileNotFoundError when absent."""
    with store.open(name) as file:
        return _entries_only(np.load(io.BytesIO(file.read()), allow_pickle=False))


def read_set(store: Store, name: str, sha256: str | None = None) -> ShardSet:
    """The set that was committed under a name, also by an earlier version.

    sha256: of the JSON where it is known, so that of a remote one only one process of a node fetches it. Raises
    UserError where a file is not what was written, KeyError, TypeError or ValueError where it is no set at all.
    """
    plain = (json.loads(store.node_copy(name, sha256).read_bytes()) if sha256 else store.read_json(name)) or {}
    index = plain.get("index")
    entries = _mapped(store.node_copy(index["file"], index["sha256"])) if index else np.zeros(0, ENTRY)
    names, stats, start = [], [], 0
    for shard in _shards(plain["shards"]):
        end = start + shard["n_sequences"]
        names.append(shard["name"])
        stats.append(ShardStats.from_json(shard, entries[start:end]))
        start = end
    return ShardSet(
        context=plain["context"],
        vocabulary=JointVocabulary.from_json(plain["vocabulary"]),
        objective=plain["objective"],
        names=tuple(names),
        stats=tuple(stats),
        entries=entries if index else None,
    )


def _shards(plain: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The facts of each shard, from columns or, as earlier versions wrote them, from a list."""
    if isinstance(plain, Mapping):
        return (dict(zip(plain, values)) for values in zip(*plain.values(), strict=True))
    return plain


def _mapped(path: Path) -> np.ndarray:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: the index of a shard set cannot be read ({str(error).splitlines()[0]}); delete the folder of the "
            f"stage that made it and run again"
        ) from None
    return _entries_only(mapped.view(np.ndarray))  # whose slices are cheaper than those of a `memmap`


def _entries_only(array: np.ndarray) -> np.ndarray:
    if array.dtype != ENTRY:
        raise ValueError(f"an index of {array.dtype}, not of {ENTRY}")
    return array
