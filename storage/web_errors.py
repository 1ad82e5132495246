"""What a failed request to a web server means: whether to repeat it, and whose fault it is.

In: an exception of aiohttp's, of fsspec's over it, or of `storage.web_client`; or the status of an answer. Out: a
`WebFailure`, and from it the errors that all code knows, FileNotFoundError and StoreError.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Literal

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from storage.object_store.errors import Request, StoreError
from storage.public_url import public_url

Cause = Literal["absent", "transient", "denied", "refused"]
"""absent: the server says that there is no such object. transient: the same request may succeed in a moment. denied:
not for whoever asks. refused: everything else, which will be the same the next time."""

_ABSENT = {404, 410}
_DENIED = {401, 402, 403, 407, 451}
_TRANSIENT = {408, 421, 425, 429}
_NEVER = {501, 505}  # of those from 500 on
_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


@dataclass(eq=False)  # an exception has a hash
class WebFailure(Exception):  # noqa: N818 - a StoreError is made of it where it leaves this room
    """A request that failed. reason: for a message. pause: seconds for which the server asks to be left alone."""

    cause: Cause
    reason: str
    pause: float = 0.0

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed in a moment."""
        return self.cause == "transient"

    def as_error(self, url: str, attempts: int = 1) -> FileNotFoundError | StoreError:
        """The error for who asked for what a recipe names."""
        if self.cause == "absent":
            return FileNotFoundError(public_url(url))
        shown = public_url(url)
        return Request(shown, "read", "/".join(shown.split("/", 3)[:3])).failure(self.reason, self.cause, attempts)


def web_error(url: str, error: BaseException) -> FileNotFoundError | StoreError | None:
    """What an exception raised in place of a web object means; None where it is no failed request.

    fsspec raises FileNotFoundError in place of any failure and keeps that as the cause.
    """
    failure = failure_of(error)
    return failure.as_error(url) if failure else None


def failure_of(error: BaseException) -> WebFailure | None:
    """The failed request that an exception stands for, if it is one."""
    if isinstance(error, WebFailure):
        return error
    if isinstance(error, FileNotFoundError):
        return (failure_of(error.__cause__) if error.__cause__ else None) or WebFailure("absent", "no such object")
    if isinstance(error, aiohttp.ClientResponseError) and not isinstance(error.__cause__, HttpProcessingError):
        return failure_of_status(error.status, error.headers.get("Retry-After") if error.headers else None)
    if isinstance(error, TimeoutError | asyncio.TimeoutError | aiohttp.ServerTimeoutError):
        return WebFailure("transient", "no answer in time")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        if getattr(error.os_error, "errno", None) in _NO_SUCH_NAME:
            return WebFailure("refused", "there is no host of this name")
        return WebFailure("transient", "the name of the host is not resolved")
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return WebFailure("refused", f"no secure connection: {_text(error)}")
    if isinstance(error, aiohttp.ClientConnectorError):
        return WebFailure("transient", _text(error.os_error))
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | ConnectionError):
        return WebFailure("transient", "the connection was cut")
    if isinstance(error, aiohttp.InvalidURL):
        return WebFailure("refused", "not a URL that can be read")
    if isinstance(error, aiohttp.TooManyRedirects):
        return WebFailure("refused", "it redirects without end")
    if isinstance(error, aiohttp.ClientError):
        return WebFailure("refused", "no answer that can be read")
    return None


def failure_of_status(status: int, retry_after: str | None = None) -> WebFailure:
    """What an answer that is no success means."""
    name = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown"
    reason = f"the server answers {status} {name}"
    if status in _ABSENT:
        return WebFailure("absent", reason)
    if status in _DENIED:
        return WebFailure("denied", reason)
    if status in _TRANSIENT or (status >= 500 and status not in _NEVER):
        return WebFailure("transient", reason, _seconds(retry_after))
    return WebFailure("refused", reason)


def _seconds(retry_after: str | None) -> float:
    """The pause that a server asks for, as a number or a date."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a time zone
        return 0.0


def _text(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__
