"""Bad objects and records as they turn up: whether their share can still be kept, and what the log says of them.

In: the record of each partition when it is done. Out: a UserError as soon as the share cannot be kept any more; at the
end a line for each kind of reason. The manifest has every entry.

How many objects and records there will be is not known before they are read. An image, a `.txt` or `.md` file, and a
video that is one document, is one. Of everything else the bytes that are still to be read are taken to hold as many a
byte as those of the same source that were, and twice as many to be safe; a source of which nothing could be read yet
may hold any number. Such an estimate ends a stage only once `FEWEST` are bad.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.tokenize.partition import Held
from storage.errors import UserError

log = logging.getLogger("ringworld")

FEWEST = 20
"""Bad objects and records below which an estimate of the rest ends no stage."""
_VARYING = re.compile(r"\S*/\S*|\b0x[0-9a-f]+\b|\d+(\.\d+)?")
"""What differs between reasons of one kind: paths and URLs, bytes, offsets and sizes."""


class Quarantine:
    """What is bad of all partitions of the stage. fraction: the most that may be. held: what each partition holds."""

    def __init__(self, fraction: float, held: Mapping[str, Held]) -> None:
        self.fraction, self.entries, self.units = fraction, list[dict[str, Any]](), 0
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
        self.entries += record["quarantine"]
        self.units += record["units"]
        self._left -= held.ones
        self._unread -= 1
        source.left -= held.size
        if held.size:
            unreadable = sum(entry["record"] is None for entry in record["quarantine"])
            source.units += max(0, record["units"] - held.ones - unreadable)
            source.read += held.size
        if len(self.entries) > self.fraction * self._most_units():
            raise self.error(" so far" if self._unread else "")

    def check(self) -> None:
        """Raise UserError where too much of all that there was is bad."""
        if len(self.entries) > self.fraction * self.units:
            raise self.error()

    def error(self, so_far: str = "") -> UserError:
        """What ends the stage, in one sentence."""
        first = self.entries[0]
        return UserError(
            f"{len(self.entries)} of {self.units} objects and records{so_far} are bad, over tokenize.max_bad_fraction "
            f"{self.fraction}: first {first['url']} ({first['reason']}); mend or remove them, or raise max_bad_fraction"
        )

    def report(self) -> None:
        """Log a line for each kind of reason, with how often it occurred and one example."""
        kinds: dict[str, list[dict[str, Any]]] = {}
        for entry in self.entries:
            kinds.setdefault(_VARYING.sub("#", entry["reason"]), []).append(entry)
        for entries in sorted(kinds.values(), key=len, reverse=True):
            example = f"{entries[0]['url']}: {entries[0]['reason']}"
            if len(entries) == 1:
                log.warning("tokenize: quarantined %s", example)
            else:
                log.warning("tokenize: quarantined %d for one kind of reason, such as %s", len(entries), example)

    def _most_units(self) -> float:
        """How many objects and records there may be in all."""
        exact = self.units + self._left
        estimated = sum(source.estimate() for source in self._sources.values())
        if not estimated or not self.fraction:
            return exact
        if len(self.entries) < FEWEST or estimated == math.inf:
            return math.inf
        return exact + estimated + estimated  # twice the estimate, which is uncertain


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
