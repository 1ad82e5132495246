"""One request to a web server: over its redirects, each within reach, from the address that was checked.

In: a URL, and who names it: a recipe, or a record within its `Reach`. Out: the answer at the end of the redirects. For
a record there are no proxies and no names and passwords of the environment, no cookies, and no connection to an address
that is not public, unless the record's file is on that host or its source allows it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from fsspec.asyn import get_loop, sync
from yarl import URL

from storage.errors import BadData
from storage.public_url import public_url
from storage.reach import Place, Reach, is_public
from storage.web_errors import WebFailure

HOST_RECORDS = 3
"""Records in a row for which a host is asked in vain, before it is left alone for the rest of their file. One that
serves between its failures is left alone where more than a third of them fail."""

_IDLE = aiohttp.ClientTimeout(total=None, sock_connect=15.0, sock_read=30.0)
_KEPT_SECONDS = 1.0  # of an idle connection: a list may name thousands of hosts, and a decoder has 256 open files
_REDIRECTS = 8
_MOVED = {301, 302, 303, 307, 308}
_NOT_PUBLIC = "its host has no public address"


@dataclass
class Route:
    """The way to an object. reach: of the records that name it; None: a recipe does. host: the last that was asked."""

    url: str
    reach: Reach | None = None
    host: str = ""

    @property
    def is_own(self) -> bool:
        """Whether the object is on the host of the file of records itself."""
        return self.reach is not None and _place(self.reach, _parsed(self.url)) == "own"

    def failed(self, reason: str) -> None:
        """Count a record for which the host was asked in vain."""
        if self.reach:
            _hosts.count(self.reach, self.host, 2, reason)

    def served(self) -> None:
        """Count a record for which the host served what was asked for."""
        if self.reach:
            _hosts.count(self.reach, self.host, -1)

    @contextlib.asynccontextmanager
    async def answer(self, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """What the server at the end of the redirects answers. Raises BadData, WebFailure, and what aiohttp raises."""
        url = _parsed(self.url)
        for _ in range(_REDIRECTS):
            self.host = f"{url.host}:{url.port}" if url.explicit_port else url.host or ""
            only_public = self.reach is not None and _place(self.reach, url) == "public"
            if self.reach:
                _hosts.check(self.reach, self.host, self.url)
            session = await _session(is_recipes=self.reach is None, only_public=only_public)
            try:
                response = await session.get(
                    url, headers={"Accept-Encoding": "identity", **headers}, allow_redirects=False
                )
            except aiohttp.ClientConnectorError as error:
                if _NOT_PUBLIC in str(error.os_error):
                    by = f" ({self.host}, to which it redirects)" if url != _parsed(self.url) else ""
                    reason = f"{_NOT_PUBLIC}{by}, and its source's media_from does not allow it"
                    raise BadData(f"{public_url(self.url)}: {reason}") from None
                raise
            async with response:
                if response.status not in _MOVED:
                    yield response
                    return
                url = _next(url, response.headers.get("Location", ""))
                response.close()
        raise WebFailure("refused", f"it redirects more than {_REDIRECTS} times")


class _Hosts:
    """Hosts that fail, while the records of one file are read: 2 for each failure less 1 for each success, and why."""

    def __init__(self) -> None:
        self._home = ""
        self._failures: dict[str, tuple[int, str]] = {}

    def check(self, reach: Reach, host: str, url: str) -> None:
        """Raises BadData where a host has failed for too many records."""
        count, reason = self._of(reach).get(host, (0, ""))
        if count >= 2 * HOST_RECORDS:
            raise BadData(f"{public_url(url)}: not asked for, since its host {host} keeps failing: {reason}")

    def count(self, reach: Reach, host: str, change: int, reason: str = "") -> None:
        """Count a failure or a success of a host. Hosts that do not fail cost nothing."""
        failures = self._of(reach)
        before, why = failures.get(host, (0, ""))
        failures[host] = max(0, before + change), reason or why
        if not failures[host][0]:
            del failures[host]

    def _of(self, reach: Reach) -> dict[str, tuple[int, str]]:
        if reach.home != self._home:
            self._home, self._failures = reach.home, {}
        return self._failures


_hosts = _Hosts()
_sessions: dict[tuple[int, int, bool, bool], aiohttp.ClientSession] = {}


def client_of(is_recipes: bool, only_public: bool, auto_decompress: bool) -> Callable[..., Any]:
    """What makes a session, in the form that fsspec takes."""

    async def client(**_: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                socket_factory=_public_socket if only_public else None, keepalive_timeout=_KEPT_SECONDS
            ),
            timeout=_IDLE,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=auto_decompress,
            trust_env=is_recipes,  # proxies, and the names and passwords of ~/.netrc
        )

    return client


async def _session(is_recipes: bool, only_public: bool) -> aiohttp.ClientSession:
    """The session of this process's event loop, whose connections are used again."""
    key = (os.getpid(), id(asyncio.get_running_loop()), is_recipes, only_public)
    if key not in _sessions:
        _sessions[key] = await client_of(is_recipes, only_public, auto_decompress=False)()
    return _sessions[key]


@atexit.register
def _close() -> None:
    for (process, *_), session in _sessions.items():
        if process == os.getpid():
            with contextlib.suppress(Exception):
                sync(get_loop(), session.close, timeout=1.0)


class _NotPublicError(OSError):
    """An address that may not be connected to."""


def _public_socket(address: Any) -> socket.socket:
    """A socket for an address that was resolved and is connected to next. Raises _NotPublicError."""
    family, kind, protocol, _, place = address
    if not is_public(str(place[0])):
        raise _NotPublicError(_NOT_PUBLIC)
    return socket.socket(family, kind, protocol)


def _next(url: URL, location: str) -> URL:
    """Where a redirect leads. A name and password go no further than the server that they are for."""
    if not location:
        raise WebFailure("refused", "it redirects to nowhere")
    target = url.join(_parsed(location))
    if target.scheme not in ("http", "https"):
        raise WebFailure("refused", f"it redirects to the scheme {target.scheme[:20]!r}")
    if not target.host:
        raise WebFailure("refused", "it redirects to nowhere")
    target = target.with_user(None)
    return target.with_user(url.user).with_password(url.password) if target.origin() == url.origin() else target


def _parsed(url: str) -> URL:
    try:
        return URL(url)
    except ValueError:
        raise WebFailure("refused", "not a URL that can be read") from None


def _place(reach: Reach, url: URL) -> Place:
    return reach.place_on_web(url.scheme, url.host or "", url.port, url.raw_path)
