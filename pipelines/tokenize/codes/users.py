"""Which runs use a store of codes: each notes its root there, so that nothing is removed that another may need.

`CODES/runs/*.json` names a run each, created once and without credentials. A folder of a machine is named with the
machine and the folder's inode: the same path may be another folder elsewhere, or the same on a disk that is shared.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipelines.dag.manifest import digest
from storage.public_url import public_url
from storage.store import Store
from storage.urls import canonical_url

RUNS = "runs"


@dataclass(frozen=True)
class Place:
    """What a folder is called, whoever names it and however.

    host: of the machine that named it, if its path means something only there, else "". inode: of the folder there.
    """

    url: str
    host: str = ""
    inode: int = field(default=0, compare=False)

    @classmethod
    def of(cls, store: Store) -> Place:
        """That of a store."""
        if not store.is_local:
            return cls(public_url(canonical_url(store.path(), store.options)).rstrip("/"))
        path = os.path.realpath(store.path())
        return cls(path, socket.gethostname(), os.stat(path).st_ino if os.path.exists(path) else 0)

    @property
    def is_here(self) -> bool:
        """Whether it can be looked at from this machine."""
        return self.host in ("", socket.gethostname())

    def is_same(self, other: Place) -> bool:
        """Whether it is certainly the same folder."""
        return self == other or (self.url == other.url and 0 != self.inode == other.inode)

    def __str__(self) -> str:
        return self.url if self.is_here else f"{self.url} of {self.host}"


def note_user(codes: Store, root: Store) -> None:
    """Note in a store of codes that the run at `root` uses it."""
    place = Place.of(root)
    name = f"{RUNS}/{digest([place.url, place.inode])[:16]}.json"
    codes.create_json(name, {"root": place.url, "host": place.host, "inode": place.inode})


def users(codes: Store) -> Iterator[Place]:
    """The roots of the runs that have used a store of codes."""
    for name in codes.names(RUNS):
        if noted := codes.read_json(name):
            yield Place(noted["root"], noted["host"], noted["inode"])
