"""One bucket's client, and how patiently it asks.

In: a bucket and options. Out: answers to requests. Every request that may succeed in a moment is repeated, with pauses
that double, which is said in the log once; what does not pass is a `StoreError` in one sentence.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from storage.errors import UserError
from storage.object_store.errors import Kind, Request, StoreError
from storage.object_store.options import Settings, azure_settings, gcs_settings, s3_settings

log = logging.getLogger("ringworld")

PAUSE_SECONDS = 0.5
FIRST_ATTEMPTS = 3
"""At a store that has not answered yet, and may not be there."""
_LOG_EVERY_SECONDS = 60.0

T = TypeVar("T")


class Client:
    """One bucket: its settings and the `obstore` client, made anew when credentials are renewed. For many threads."""

    def __init__(self, scheme: str, bucket: str, options: Mapping[str, Any]) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._$-]+", bucket):  # obstore's client does not survive what makes no URL
            raise UserError(f"{scheme}://{bucket}: no bucket has this name, nor is one found by globs; mend the URL")
        self._scheme, self._bucket, self._options = scheme, bucket, options
        self._answered = False
        self.renew()

    @classmethod
    def of(cls, scheme: str, bucket: str, options: Mapping[str, Any]) -> Client:
        """The client of a bucket, one for all threads of the process."""
        wanted = (os.getpid(), scheme, bucket, json.dumps(options, sort_keys=True, default=repr))
        with _MAKING:
            if wanted not in _CLIENTS:
                _CLIENTS[wanted] = cls(scheme, bucket, options)
            return _CLIENTS[wanted]

    def renew(self) -> None:
        """Look the settings and credentials up again."""
        self.settings, self.store = _connect(self._scheme, self._bucket, self._options)

    def asked(self, url: str, doing: str) -> Request:
        """For the errors of a request."""
        return Request(url, doing, self.settings.endpoint, self.settings.secrets)

    @property
    def attempts(self) -> int:
        """Of a request: half a minute of them, if the store is known to be there."""
        return self.settings.attempts if self._answered else min(FIRST_ATTEMPTS, self.settings.attempts)

    def request(self, make: Callable[[Any, str], T], key: str) -> T:
        """Make a request once."""
        made = make(self.store, key)
        self._answered = True
        return made

    def ask(self, asked: Request, make: Callable[[Any, str], T], key: str) -> T:
        """Make a request, again and again while its errors pass.

        Raises FileNotFoundError where there is no such object or bucket, else StoreError; AlreadyExistsError passes.
        """
        for attempt in itertools.count(1):
            try:
                return self.request(make, key)
            except obstore.exceptions.AlreadyExistsError:
                raise
            except (OSError, ValueError, obstore.exceptions.BaseError) as raised:
                error = asked.error(raised)
                if not isinstance(error, StoreError) or not self.passes(error.kind):
                    raise error from None
                if attempt >= self.attempts:
                    raise asked.failure(error.reason, error.kind, attempt) from None
                self.wait(asked, error, attempt)
        raise AssertionError("unreachable")

    def passes(self, kind: Kind) -> bool:
        """Whether to ask again after an error of this kind."""
        return kind == "transient" or (kind == "expired" and self.settings.renewable)

    def wait(self, asked: Request, error: StoreError, attempt: int, first: float | None = None) -> None:
        """Pause before the next attempt, which is made with credentials looked up anew where those have expired."""
        pause(asked, error, attempt, first)
        if error.kind == "expired":
            self.renew()


_CLIENTS: dict[tuple[int, str, str, str], Client] = {}
_MAKING = threading.Lock()
_SAID: dict[str, float] = {}


def _connect(scheme: str, bucket: str, options: Mapping[str, Any]) -> tuple[Settings, Any]:
    look_up = {"s3": s3_settings, "gs": gcs_settings, "az": azure_settings}[scheme]
    store_class: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    settings = look_up(bucket, options)
    more: dict[str, Any] = {}
    if keys := settings.keys:  # not as config, which would take a token from the environment with them
        signed = {"access_key_id": keys.key, "secret_access_key": keys.secret, "token": keys.token, "expires_at": None}
        more["credential_provider"] = lambda: signed
    try:
        store = store_class(
            bucket,
            config=settings.config,
            client_options=settings.client,
            retry_config={"max_retries": settings.retries},
            **more,
        )
    except (obstore.exceptions.BaseError, ValueError, TypeError) as error:
        said = " ".join(str(error).partition("Debug source:")[0].split())
        raise UserError(f"storage.options: no client of {scheme}://{bucket} can be made of them ({said})") from None
    return settings, store


def pause(asked: Request, error: StoreError, attempt: int, first: float | None = None) -> None:
    """Wait before the next attempt, twice as long each time, and say why in the log: once a minute and store."""
    now = time.monotonic()
    if now - _SAID.get(asked.endpoint, -_LOG_EVERY_SECONDS) >= _LOG_EVERY_SECONDS:
        _SAID[asked.endpoint] = now
        log.warning("%s: cannot be %s just now (%s); trying again for a while", asked.url, asked.doing, error.reason)
    time.sleep((PAUSE_SECONDS if first is None else first) * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
