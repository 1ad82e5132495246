"""Bad objects and records as they turn up: whether their share can still be kept, and what the log says of them.

In: the record of each partition when it is done. Out: a UserError as soon as the share cannot be kept any more; at the
end a line for each kind of reason. The entries themselves go on to a `QuarantineList`.

How many objects and records there will be is not known before they are read. An image, a `.txt` or `.md` file, and a
video that is one document, is one. Of everything else the bytes that are still to be read are taken to hold as many a
byte as those of the same source that were, and twice as many to be safe; a source of which nothing could be read yet
may hold any number. Such an estimate ends a stage only once `FEWEST` are bad.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.tokenize.partition import Held
from pipelines.tokenize.quarantine_list import QuarantineList
from storage.errors import UserError

log = logging.getLogger("ringworld")

FEWEST = 20
"""Bad objects and records below which an estimate of the rest ends no stage."""
KINDS = 100
"""Kinds of reasons that are told apart; what comes after them is counted together."""
_REST = ""
_VARYING = re.compile(r"\S*/\S*|\b0x[0-9a-f]+\b|\d+(\.\d+)?")
"""What differs between reasons of one kind: paths and URLs, bytes, offsets and sizes."""


class Quarantine:
    """What is bad of all partitions of the stage. fraction: the most that may be. held: what each partition holds."""

    def __init__(self, fraction: float, held: Mapping[str, Held]) -> None:
        self.fraction, self.units = fraction, 0
        self.entries = QuarantineList(list(held))
        self._kinds: dict[str, _Kind] = {}
        self._held = held
        self._sources = {one.source: _Source() for one in held.values()}
        self._unread = len(held)
        self._left = sum(one.ones for one in held.values())
        for one in held.values():
            self._sources[one.source].left += one.size

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a partition that is done. Raises UserError where too much is bad, whatever the others hold."""
        held = self._held[record["partition"]]
        source = self._sources[held.source]
        if record["quarantine"]:
            self.entries.add(record["partition"], record["quarantine"])
            self._sort(record["quarantine"])
        self.units += record["units"]
        self._left -= held.ones
        self._unread -= 1
        source.left -= held.size
        if held.size:
            unreadable = sum(entry["record"] is None for entry in record["quarantine"])
            source.units += max(0, record["units"] - held.ones - unreadable)
            source.read += held.size
        if self.entries.count > self.fraction * self._most_units():
            raise self.error(" so far" if self._unread else "")

    def check(self) -> None:
        """Raise UserError where too much of all that there was is bad."""
        if self.entries.count > self.fraction * self.units:
            raise self.error()

    def error(self, so_far: str = "") -> UserError:
        """What ends the stage, in one sentence."""
        first = next(iter(self._kinds.values())).first
        return UserError(
            f"{self.entries.count} of {self.units} objects and records{so_far} are bad, over tokenize.max_bad_fraction "
            f"{self.fraction}: first {first['url']} ({first['reason']}); mend or remove them, or raise max_bad_fraction"
        )

    def report(self) -> None:
        """Log a line for each kind of reason, with how often it occurred and one example."""
        for kind in sorted(self._kinds.values(), key=lambda one: one.count, reverse=True):
            example = f"{kind.first['url']}: {kind.first['reason']}"
            if kind.count == 1:
                log.warning("tokenize: quarantined %s", example)
            else:
                log.warning("tokenize: quarantined %d for %s, such as %s", kind.count, kind.about, example)

    def _sort(self, entries: Iterable[dict[str, Any]]) -> None:
        """Count the entries by the kind of their reasons."""
        for entry in entries:
            name = _VARYING.sub("#", entry["reason"])
            if name not in self._kinds and len(self._kinds) >= KINDS:
                name = _REST
            self._kinds.setdefault(
                name, _Kind(entry, "other reasons" if name == _REST else "one kind of reason")
            ).count += 1

    def _most_units(self) -> float:
        """How many objects and records there may be in all."""
        exact = self.units + self._left
        estimated = sum(source.estimate() for source in self._sources.values())
        if not estimated or not self.fraction:
            return exact
        if self.entries.count < FEWEST or estimated == math.inf:
            return math.inf
        return exact + estimated + estimated  # twice the estimate, which is uncertain


@dataclass
class _Kind:
    """Entries whose reasons are of one kind: the first of them, what they have in common, and how many they are."""

    first: Mapping[str, Any]
    about: str
    count: int = 0


@dataclass
class _Source:
    """Bytes of one source that were read and are left, and the objects and records that were found in the former."""

    units: int = 0
    read: int = 0
    left: int = 0

    def estimate(self) -> float:
        if not self.left:
            return 0.0
        return self.left * self.units / self.read if self.units else math.inf
