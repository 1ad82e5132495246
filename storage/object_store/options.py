"""Options as s3fs, gcsfs and adlfs name them, and the environment of AWS's tools, as settings of an `obstore` client.

In: a recipe's storage.options. Out: `Settings`. An option that cannot be used raises UserError. Options that only tune
those libraries are ignored, and so are those of another store: one recipe may read from one and write to another.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from storage.errors import UserError
from storage.object_store.credentials import Keys, Profile

_Options = Mapping[str, Any]
_READ_TIMEOUT = 120.0  # also of a part that is being sent: four at once pass at half a megabyte a second
_CONNECT_TIMEOUT = 10.0

_OPTIONS = {
    "s3": {
        *("key", "secret", "token", "username", "password", "anon", "endpoint_url", "profile", "use_ssl"),
        *("requester_pays", "client_kwargs", "config_kwargs", "s3_additional_kwargs", "version_aware"),
    },
    "gs": {"token", "anon", "endpoint_url", "project", "access", "consistency", "requester_pays"},
    "az": {
        *("account_name", "account_key", "sas_token", "credential", "anon", "tenant_id", "client_id", "client_secret"),
        *("account_host", "connection_string"),
    },
}
_IGNORED = {
    *("use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "asynchronous", "loop"),
    *("batch_size", "session", "default_block_size", "default_cache_type", "default_fill_cache", "cache_regions"),
    *("max_concurrency", "fixed_upload_size", "block_size", "cache_type", "cache_options"),
}
_S3_ADDITIONAL = {
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
    "BucketKeyEnabled": "sse_bucket_key_enabled",
}


@dataclass(frozen=True)
class Settings:
    """Of one client."""

    config: dict[str, Any]  # obstore's
    client: dict[str, Any]  # obstore's client options
    keys: Keys | None = None  # None: the client finds its credentials by itself
    current_keys: Callable[[], Keys] | None = None  # returns the keys of now, others where `keys` are short-lived
    renewable: bool = True  # whether a new look-up may find other credentials
    endpoint: str = ""  # for messages and requests of our own, without the bucket
    max_attempts: int | None = None  # botocore's, where it is given


def s3_settings(bucket: str, options: Mapping[str, Any]) -> Settings:
    """Of an S3 bucket, as s3fs would have understood the options."""
    _check("s3", options)
    if options.get("version_aware"):
        raise UserError("storage.options.version_aware: versions of objects are not read; remove the option")
    client, tuned = _mapping(options, "client_kwargs"), _mapping(options, "config_kwargs")
    profile = Profile.read(options.get("profile"))
    anon = bool(options.get("anon")) or tuned.get("signature_version") == "unsigned"
    current_keys, renewable = (None, False) if anon else _s3_keys(options, client, profile)
    endpoint = options.get("endpoint_url") or client.get("endpoint_url")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = _checked_endpoint(endpoint or profile.settings.get("endpoint_url"))
    region = client.get("region_name") or tuned.get("region_name")
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = region or profile.settings.get("region") or ("us-east-1" if endpoint else bucket_region(bucket))
    additional = _mapping(options, "s3_additional_kwargs")
    if unknown := sorted(additional.keys() - _S3_ADDITIONAL.keys()):
        raise UserError(
            f"storage.options.s3_additional_kwargs.{unknown[0]}: cannot be used; {', '.join(_S3_ADDITIONAL)} can, set "
            f"others on the bucket"
        )
    retries = tuned.get("retries") or {}
    is_virtual = tuned.get("s3", {}).get("addressing_style") == "virtual"
    config = _given(
        region=region,
        skip_signature=anon,
        request_payer=bool(options.get("requester_pays")),
        endpoint=endpoint.replace("://", f"://{bucket}.", 1) if is_virtual else endpoint,
        virtual_hosted_style_request=is_virtual,
    )
    return Settings(
        config=config | {_S3_ADDITIONAL[name]: value for name, value in additional.items()},
        client=_client(endpoint, client, tuned),
        keys=current_keys() if current_keys else None,
        current_keys=current_keys,
        endpoint=endpoint or f"https://s3.{region}.amazonaws.com",
        renewable=renewable,
        max_attempts=retries.get("max_attempts", retries.get("total_max_attempts")),
    )


def gcs_settings(bucket: str, options: Mapping[str, Any]) -> Settings:
    """Of a bucket of Google Cloud Storage; without a token, the client's own search for credentials."""
    _check("gs", options)
    token, endpoint = options.get("token"), _checked_endpoint(options.get("endpoint_url"))
    anon = bool(options.get("anon")) or token == "anon"
    account = str(Path(token).expanduser()) if isinstance(token, str) and not anon else ""
    account = account if os.path.isfile(account) else ""
    if not (anon or account or token in (None, "google_default", "cloud", "cache")):
        raise UserError(
            "storage.options.token: for gs:// it is the path of a service account's JSON, google_default or anon"
        )
    config = _given(skip_signature=anon, service_account=account, base_url=endpoint)
    return Settings(config, _client(endpoint), endpoint=endpoint)


def azure_settings(container: str, options: Mapping[str, Any]) -> Settings:
    """Of a container of Azure Blob Storage; without a key, the client's own search for credentials."""
    _check("az", options)
    if options.get("connection_string") or not isinstance(options.get("credential", ""), str):
        raise UserError("storage.options: for az:// give account_name and account_key or sas_token")
    host = str(options.get("account_host") or "")
    endpoint = _checked_endpoint(host if not host or "://" in host else f"https://{host}")
    config = _given(
        account_name=options.get("account_name"),
        account_key=options.get("account_key") or options.get("credential"),
        sas_key=options.get("sas_token"),
        tenant_id=options.get("tenant_id"),
        client_id=options.get("client_id"),
        client_secret=options.get("client_secret"),
        skip_signature=bool(options.get("anon")),
        endpoint=endpoint,
    )
    return Settings(config, _client(endpoint), endpoint=endpoint)


@cache
def bucket_region(bucket: str, host: str = "https://s3.amazonaws.com") -> str:
    """Where AWS keeps a bucket, which it answers without credentials; us-east-1 where it does not answer."""
    try:
        request = urllib.request.Request(f"{host}/{bucket}", method="HEAD")
        with urllib.request.urlopen(request, timeout=_CONNECT_TIMEOUT) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:  # 403 and 301 have the header too
        headers = error.headers
    except OSError:
        return "us-east-1"
    return str(headers.get("x-amz-bucket-region") or "us-east-1")


def _s3_keys(options: _Options, client: _Options, profile: Profile) -> tuple[Callable[[], Keys] | None, bool]:
    """A function that returns the present keys, and whether a new look-up may find others."""
    key = options.get("key") or options.get("username") or client.get("aws_access_key_id")
    secret = options.get("secret") or options.get("password") or client.get("aws_secret_access_key")
    if key and secret:
        return partial(Keys, key, secret, options.get("token") or client.get("aws_session_token")), False
    if not options.get("profile"):
        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if key and secret:
            token = os.environ.get("AWS_SESSION_TOKEN") or os.environ.get("AWS_SECURITY_TOKEN")
            return partial(Keys, key, secret, token), False
        if os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
            return None, True
    return profile.keys(), True


def _checked_endpoint(given: object) -> str:
    """The endpoint of a store that is not AWS's, else "". obstore's client panics on one that is no URL."""
    endpoint = str(given or "").rstrip("/")
    parts = urlsplit(endpoint)
    if endpoint and (parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:\[\]-]+", parts.netloc)):
        raise UserError(
            f"{endpoint.rpartition('@')[2]}: the endpoint of the object store (storage.options.endpoint_url, "
            f"AWS_ENDPOINT_URL) is no URL; give one such as https://s3.example.com"
        )
    return endpoint


def _client(endpoint: str = "", client: _Options | None = None, tuned: _Options | None = None) -> dict[str, Any]:
    """obstore's client options. client, tuned: botocore's client_kwargs and config_kwargs."""
    client, tuned = client or {}, tuned or {}
    verify = client.get("verify", os.environ.get("AWS_CA_BUNDLE"))
    try:
        certificate = Path(verify).read_bytes() if isinstance(verify, str) else None
    except OSError as error:
        raise UserError(f"{verify}: the certificates cannot be read ({error.strerror})") from None
    proxies = tuned.get("proxies") or {}
    return _given(
        timeout=timedelta(minutes=15),  # of a whole request; one that stalls ends by the read timeout
        read_timeout=timedelta(seconds=float(tuned.get("read_timeout", _READ_TIMEOUT))),
        connect_timeout=timedelta(seconds=float(tuned.get("connect_timeout", _CONNECT_TIMEOUT))),
        allow_http=endpoint.startswith("http://"),
        allow_invalid_certificates=verify is False,
        root_certificate=certificate,
        proxy_url=proxies.get("https") or proxies.get("http"),
    )


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value not in (None, False, "")}


def _mapping(options: _Options, name: str) -> _Options:
    given = options.get(name) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"storage.options.{name}: this is a mapping of names to values")
    return given


def _check(scheme: str, options: _Options) -> None:
    if unknown := sorted(options.keys() - _IGNORED.union(*_OPTIONS.values())):
        usable = ", ".join(sorted(_OPTIONS[scheme]))
        raise UserError(f"storage.options.{unknown[0]}: cannot be used for {scheme}://; what can is {usable}")
