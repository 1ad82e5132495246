"""What of a listing is new, changed or gone since the newest one that the run has committed.

In: the folder of all that the sources stage has made, and the listing of today. Out: the rows that differ, found by
columns, and a sentence for the plan.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.dag.manifest import MANIFEST, is_fingerprint
from pipelines.sources.listing import OBJECTS, Listing, listing_digest
from storage.store import Store

_COMPARED = ["key", "identity"]


@dataclass(frozen=True)
class ListingChanges:
    """new: objects whose keys the old listing does not have. changed: of its keys, but other in anything that decides
    their documents. gone: how many of its objects have keys that the new listing does not have.
    """

    new: Listing
    changed: Listing
    gone: int

    def sentence(self, objects: int, finished: str) -> str:
        """For the plan. objects: in the new listing. finished: when the old one was committed."""
        differs = f"{len(self.new):,} of {objects:,} objects new, {len(self.changed):,} changed, {self.gone:,} gone"
        return f"{differs} since the listing of {finished}"


def listing_changes(old: pa.Table, new: Listing) -> ListingChanges:
    """What differs. old: the columns `key` and `identity` of a listing, as `compared_columns` reads them.

    Linear in both; memory holds the 16-byte identities of both, and the keys of the rows that differ.
    """
    identities = new.column("identity")
    differs = new.where(pc.invert(pc.is_in(identities, value_set=old["identity"])))
    before = old.filter(pc.invert(pc.is_in(old["identity"], value_set=identities)))["key"].combine_chunks()
    is_changed = pc.is_in(differs.column("key"), value_set=before)
    gone = len(before) - pc.sum(pc.is_in(before, value_set=differs.column("key"))).as_py() if len(before) else 0
    return ListingChanges(differs.where(pc.invert(is_changed)), differs.where(is_changed), gone)


def compared_columns(store: Store) -> pa.Table:
    """The columns of a committed listing by which it is compared."""
    with store.open(OBJECTS) as file:
        return pq.read_table(file, columns=_COMPARED)


def changes_since(history: Store, new: Listing) -> tuple[ListingChanges, str] | None:
    """What changed since the newest listing in a run, and when that was committed.

    None where it is the same, or there is none that can be read. history: the folder of all that the run's sources
    stage has made.
    """
    made: list[tuple[str, str, Any]] = []
    for folder in filter(is_fingerprint, history.folders()):
        tree = history.at(folder).read_json(MANIFEST) or {}
        if OBJECTS in tree.get("outputs", {}).get("files", {}):
            made.append((tree.get("finished", ""), folder, tree.get("figures")))
    if not made:
        return None
    finished, folder, figures = max(made, key=lambda one: one[:2])
    if figures == listing_digest(new):
        return None
    with contextlib.suppress(OSError, pa.ArrowException):  # the note is worth no failure where that listing is damaged
        return listing_changes(compared_columns(history.at(folder)), new), finished
    return None
