"""Byte ranges of an object in a bucket: every byte once and of one version, through cuts and refusals.

In: a bucket's client and a key. Out: pieces of bytes. A request that fails is repeated; one that is cut goes on at the
byte where it stopped, and what brought bytes starts the count of attempts anew. Later requests are for the version that
the first one found: an object that is replaced meanwhile is an error, not a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import obstore

from storage.object_store.client import Client
from storage.object_store.errors import past_end
from storage.retry import Backoff


class Answer(NamedTuple):
    """What a request brought, of which version; whole: up to the end of the range or of the object."""

    pieces: list[bytes]
    etag: str | None
    whole: bool

    @property
    def n_bytes(self) -> int:
        """Of all pieces."""
        return sum(len(piece) for piece in self.pieces)


class ObjectRanges:
    """An object's bytes. Raises FileNotFoundError where there is none, else StoreError."""

    def __init__(self, client: Client, key: str, url: str, backoff: Backoff | None = None) -> None:
        self._client, self._key, self._url, self._backoff = client, key, url, backoff

    def size(self) -> int:
        """Of the object, in bytes."""
        return int(self._ask(obstore.head)["size"])

    def first(self, n_bytes: int, piece_bytes: int) -> tuple[int, str | None, list[bytes]]:
        """Size and version of the object, and its first bytes."""

        def get(store: Any, key: str) -> tuple[int, str | None, list[bytes]]:
            try:
                got = obstore.get(store, key, options={"range": (0, n_bytes)})
            except obstore.exceptions.BaseError as error:
                if not past_end(error):  # of an empty object
                    raise
                meta = obstore.head(store, key)
                return meta["size"], meta["e_tag"], []
            return got.meta["size"], got.meta["e_tag"], list(got.stream(piece_bytes))

        return self._ask(get)

    def pieces(self, start: int, end: int, etag: str | None = None, piece_bytes: int = 1) -> Iterator[bytes]:
        """The bytes from `start` to `end`, fewer only where the object ends, in pieces of at least `piece_bytes`.

        A larger piece costs less, and more of it is asked for again after a cut. etag: of the version to read.
        """
        while start < end:
            answer = self._ask(lambda store, key: _get(store, key, start, end, etag, piece_bytes))  # noqa: B023
            yield from answer.pieces
            if answer.whole:
                return
            start, etag = start + answer.n_bytes, answer.etag

    def attempt(self, start: int, end: int, etag: str | None, piece_bytes: int) -> Answer:
        """What one request for these bytes brings, which is not repeated."""
        return self._client.request(lambda store, key: _get(store, key, start, end, etag, piece_bytes), self._key)

    def _ask(self, make: Any) -> Any:
        return self._client.ask(self._client.context(self._url, "read"), make, self._key, self._backoff)


def _get(store: Any, key: str, start: int, end: int, etag: str | None, piece_bytes: int) -> Answer:
    pieces: list[bytes] = []
    options: Any = {"range": (start, end)} | ({"if_match": etag} if etag else {})
    try:
        got = obstore.get(store, key, options=options)
        etag = got.meta["e_tag"]
        for piece in got.stream(piece_bytes):
            pieces.append(piece)
    except (OSError, ValueError, obstore.exceptions.BaseError) as raised:
        if past_end(raised):
            return Answer([], etag, True)
        if not pieces:
            raise
        return Answer(pieces, etag, False)
    return Answer(pieces, etag, True)
