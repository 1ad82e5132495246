"""One bucket's client: requests that are repeated while their errors are transient.

In: a bucket and options. Out: answers to requests, or a `StoreError` in one sentence.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from storage.errors import UserError
from storage.object_store.errors import Request, StoreError
from storage.object_store.options import Settings, azure_settings, gcs_settings, s3_settings
from storage.retry import REQUEST, Backoff, retry

_ASKED_AGAIN_AFTER = timedelta(minutes=10)  # botocore gives no keys that are to expire sooner
FIRST_ATTEMPTS = 3
"""At a store that has not answered yet, and may not be there."""

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

    def context(self, url: str, doing: str) -> Request:
        """For the errors of a request."""
        return Request(url, doing, self.settings.endpoint, self.settings.secrets)

    def request(self, make: Callable[[Any, str], T], key: str) -> T:
        """Make a request once."""
        made = make(self.store, key)
        self._answered = True
        return made

    def ask(self, context: Request, make: Callable[[Any, str], T], key: str, backoff: Backoff | None = None) -> T:
        """Make a request, again and again while its errors are transient; with credentials looked up anew where those
        have expired.

        Raises FileNotFoundError where there is no such object or bucket, else StoreError; AlreadyExistsError passes.
        """
        attempts = 0
        error: Exception | None = None

        def attempt() -> T:
            nonlocal attempts, error
            attempts += 1
            if isinstance(error, StoreError) and error.kind == "expired":
                self.renew()
            try:
                return self.request(make, key)
            except obstore.exceptions.AlreadyExistsError:
                raise
            except (OSError, ValueError, obstore.exceptions.BaseError) as raised:
                error = context.error(raised, attempts)
                raise error from None

        what = f"{context.url}: cannot be {context.doing} just now"
        bounds = backoff or self._backoff()
        return retry(attempt, what, bounds, is_transient=self._may_succeed, topic=context.endpoint)

    def _backoff(self) -> Backoff:
        attempts = self.settings.attempts
        return replace(REQUEST, attempts=attempts if self._answered else min(FIRST_ATTEMPTS, attempts))

    def _may_succeed(self, error: Exception) -> bool:
        """Whether to ask again after an error."""
        kind = error.kind if isinstance(error, StoreError) else None
        return kind == "transient" or (kind == "expired" and self.settings.renewable)


_CLIENTS: dict[tuple[int, str, str, str], Client] = {}
_MAKING = threading.Lock()


def _connect(scheme: str, bucket: str, options: Mapping[str, Any]) -> tuple[Settings, Any]:
    look_up = {"s3": s3_settings, "gs": gcs_settings, "az": azure_settings}[scheme]
    store_class: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    settings = look_up(bucket, options)
    more: dict[str, Any] = {}
    if settings.keys:  # not as config, which would take a token from the environment with them
        more["credential_provider"] = partial(_credentials, settings)
    try:
        store = store_class(
            bucket,
            config=settings.config,
            client_options=settings.client,
            retry_config={"max_retries": settings.retries},
            **more,
        )
    except (obstore.exceptions.BaseError, ValueError, TypeError) as error:
        reason = " ".join(str(error).partition("Debug source:")[0].split())
        raise UserError(f"storage.options: no client of {scheme}://{bucket} can be made of them ({reason})") from None
    return settings, store


def _credentials(settings: Settings) -> dict[str, Any]:
    """As obstore asks for them: once, or, where they are short-lived, again and again."""
    keys = settings.current_keys()
    assert keys is not None
    expires = datetime.now(UTC) + _ASKED_AGAIN_AFTER if settings.present_keys else None
    return {"access_key_id": keys.key, "secret_access_key": keys.secret, "token": keys.token, "expires_at": expires}
