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
from typing import Any, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from storage.errors import UserError, is_transient
from storage.object_store.errors import Request, StoreError
from storage.object_store.options import azure_settings, gcs_settings, s3_settings
from storage.public_url import public_url
from storage.retry import REQUEST, Backoff, retry

_FIRST_ATTEMPTS = 3  # at a store that has not answered yet, and may not exist
_QUICK_RETRIES = 4  # by obstore itself within a second or two, which cost neither a log line nor a whole upload
_KEYS_REFRESH = timedelta(minutes=10)  # botocore gives no keys that expire sooner

T = TypeVar("T")


class Client:
    """One bucket: its settings and the `obstore` client, made anew when credentials are renewed. For many threads."""

    def __init__(self, scheme: str, bucket: str, options: Mapping[str, Any]) -> None:
        self._url = f"{scheme}://{bucket}"
        if not re.fullmatch(r"[A-Za-z0-9._$-]+", bucket):  # obstore's client panics on what makes no URL
            shown = public_url(self._url)
            raise UserError(f"{shown}: no bucket has this name, nor is one found by globs; mend the URL")
        self._scheme, self._bucket, self._options = scheme, bucket, options
        self._answered = False
        self.renew()

    @classmethod
    def of(cls, scheme: str, bucket: str, options: Mapping[str, Any]) -> Client:
        """The client of a bucket, one for all threads of the process."""
        key = (os.getpid(), scheme, bucket, json.dumps(options, sort_keys=True, default=repr))
        with _CLIENTS_LOCK:
            if key not in _CLIENTS:
                _CLIENTS[key] = cls(scheme, bucket, options)
            return _CLIENTS[key]

    def renew(self) -> None:
        """Look up the settings and credentials again."""
        store_class: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[self._scheme]
        look_up = {"s3": s3_settings, "gs": gcs_settings, "az": azure_settings}[self._scheme]
        settings = look_up(self._bucket, self._options)
        max_attempts = settings.max_attempts
        provider: dict[str, Any] = {}
        if current_keys := settings.current_keys:

            def credentials() -> dict[str, Any]:
                key, secret, token = current_keys()
                expires = datetime.now(UTC) + _KEYS_REFRESH
                return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": expires}

            # Not in `config`, where obstore would combine the keys with a token from the environment.
            provider = {"credential_provider": credentials}
        try:
            self.store = store_class(
                self._bucket,
                config=settings.config,
                client_options=settings.client,
                retry_config={"max_retries": _QUICK_RETRIES if max_attempts is None else int(max_attempts)},
                **provider,
            )
        except (obstore.exceptions.BaseError, ValueError, TypeError) as error:
            reason = " ".join(str(error).partition("Debug source:")[0].split())
            raise UserError(f"storage.options: no client of {self._url} can be made of them ({reason})") from None
        self.settings = settings

    def ask(self, doing: str, make: Callable[[Any, str], T], key: str, backoff: Backoff | None = None) -> T:
        """The result of `make(store, key)`, repeated while its errors are transient; if expired, with new credentials.

        doing: read, written, listed or removed, for messages. Raises FileNotFoundError where there is no such object or
        bucket, else StoreError; AlreadyExistsError passes.
        """
        url = f"{self._url}/{key}" if key else self._url
        # The longest first: one may be a part of another.
        secrets = tuple(sorted(filter(None, self.settings.keys or ()), key=len, reverse=True))
        context = Request(url, doing, self.settings.endpoint, secrets)
        attempts, is_expired = 0, False

        def attempt() -> T:
            nonlocal attempts, is_expired
            attempts += 1
            if is_expired:
                is_expired = False  # what renewing raises is not repeated: it may ask a person
                self.renew()
            try:
                made = make(self.store, key)
            except obstore.exceptions.AlreadyExistsError:
                raise
            except (OSError, ValueError, obstore.exceptions.BaseError) as raised:
                error = context.error(raised, attempts)
                is_expired = isinstance(error, StoreError) and error.kind == "expired"
                raise error from None
            self._answered = True
            return made

        if backoff is None:
            given = self.settings.max_attempts
            most = REQUEST.attempts if given is None else max(1, int(given))
            backoff = replace(REQUEST, attempts=most if self._answered else min(_FIRST_ATTEMPTS, most))
        return retry(
            attempt,
            f"{url}: cannot be {doing} just now",
            backoff,
            is_transient=lambda error: is_transient(error) or (is_expired and self.settings.renewable),
            topic=self.settings.endpoint,
        )


_CLIENTS: dict[tuple[int, str, str, str], Client] = {}
_CLIENTS_LOCK = threading.Lock()
