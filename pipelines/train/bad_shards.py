"""Which of a train stage's shards are not what was written, decided once, before the first step.

In: the shard sets of the stage and how many bad shards the recipe tolerates. Out: those to skip, found by re-hashing
every shard and committed to the stage's folder: all ranks, and a run that goes on, skip alike, since the number of
examples in a batch has to be the same on all, and the loss is on record. Without tolerance nothing is hashed here: the
loader checks every sequence that it reads, and the first that is corrupt ends the stage.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypedDict

import ray

from pipelines.cluster.same_code import as_driver
from storage.errors import UserError
from storage.store import Store
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import hash_file

log = logging.getLogger("ringworld")

RECORD = "bad_shards.json"
_SHARDS_PER_TASK = 16


class BadShard(TypedDict):
    """reason: one phrase. sequences, tokens: what the shard holds and a pass over the data loses."""

    name: str
    reason: str
    sequences: int
    tokens: int


def bad_shards(shards: Store, sets: Sequence[ShardSet], tolerated: int, stage: Store, label: str) -> list[BadShard]:
    """The stage's bad shards, from its record or, at its first start, by re-hashing all; none where none is tolerated.

    stage: the folder of the train stage, where the record is committed. label: what the stage is called in messages.
    Raises UserError naming the shards where there are more than `tolerated`.
    """
    if not tolerated:
        return []
    found: list[BadShard] | None = stage.read_json(RECORD)
    if found is None:
        stats = {name: stats for one in sets for name, stats in zip(one.names, one.stats)}
        hashes = [(name, shard.sha256) for name, shard in stats.items()]
        parts = [hashes[start : start + _SHARDS_PER_TASK] for start in range(0, len(hashes), _SHARDS_PER_TASK)]
        found = [
            {"name": name, "reason": why, "sequences": stats[name].n_sequences, "tokens": stats[name].n_tokens}
            for part in ray.get([_check.remote(shards, part) for part in parts])
            for name, why in part
        ]
    if len(found) > tolerated:
        named = "; ".join(f"{shard['name']}: {shard['reason']}" for shard in found[:5])
        raise UserError(
            f"{label}: {len(found)} shards in {shards.path()} are not what was written, past train.max_bad_shards "
            f"{tolerated} ({named}{'; ...' if len(found) > 5 else ''}); delete that folder to pack again"
        )
    stage.write_json(RECORD, found)
    for shard in found:
        log.warning(
            "%s: %s is skipped (%s): %d sequences, %d tokens lost to every pass",
            *(label, shard["name"], shard["reason"], shard["sequences"], shard["tokens"]),
        )
    return found


@ray.remote
@as_driver
def _check(shards: Store, part: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, reason) of the bad shards of these (name, sha256). Raises UserError where the store does not answer."""
    bad = []
    for name, sha256 in part:
        try:
            with shards.open_ranged(name) as file:
                found = hash_file(file)
        except FileNotFoundError:
            bad.append((name, "missing"))
        else:
            if found != sha256:
                bad.append((name, f"sha256 is {found}, the manifest says {sha256}"))
    return bad
