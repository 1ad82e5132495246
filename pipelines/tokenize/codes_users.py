"""Which runs use a store of codes: each notes its root there, so that nothing is removed that another may need.

`CODES/runs/*.json` names a run each, created once and without credentials. A folder of a machine is named with the
machine: the same path is another folder elsewhere.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pipelines.dag.manifest import digest
from storage.public_url import public_url
from storage.store import Store
from storage.urls import canonical_url

RUNS = "runs"


@dataclass(frozen=True)
class Place:
    """What a folder is called, whoever names it and however. host: of the machine whose folder it is; "": no one's."""

    url: str
    host: str = ""

    @classmethod
    def of(cls, store: Store) -> Place:
        """That of a store."""
        if store.is_local:
            return cls(os.path.realpath(store.path()), socket.gethostname())
        return cls(public_url(canonical_url(store.path(), store.options)).rstrip("/"))

    @property
    def is_here(self) -> bool:
        """Whether it can be looked at from this machine."""
        return self.host in ("", socket.gethostname())

    def __str__(self) -> str:
        return self.url if self.is_here else f"{self.url} of {self.host}"


def note_user(codes: Store, root: Store) -> None:
    """Note in a store of codes that the run at `root` uses it."""
    place = Place.of(root)
    codes.create_json(f"{RUNS}/{digest(asdict(place))[:16]}.json", {"root": place.url, "host": place.host})


def users(codes: Store) -> Iterator[Place]:
    """The roots of the runs that have used a store of codes."""
    for name in codes.names(RUNS):
        if noted := codes.read_json(name):
            yield Place(noted["root"], noted["host"])
