"""Options as s3fs, gcsfs and adlfs name them, and the environment of AWS's tools, as settings of an `obstore` client.

In: a recipe's storage.options. Out: `Settings`. An option that cannot be used raises UserError, one that only tunes
those libraries is passed over, and so is another store's: one recipe may read from one and write to another.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from storage.errors import UserError
from storage.object_store.credentials import Keys, profile_keys, profile_settings

ATTEMPTS = 7
_QUICK_RETRIES = 4
"""Repeats within a second or two by the client itself, which cost neither a log line nor a whole upload."""
_READ_TIMEOUT = 120.0  # also of a part that is being sent: four at once pass at half a megabyte a second
_CONNECT_TIMEOUT = 10.0

_TUNING = {
    *("use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "asynchronous", "loop"),
    *("batch_size", "session", "default_block_size", "default_cache_type", "default_fill_cache", "cache_regions"),
    *("max_concurrency", "fixed_upload_size", "block_size", "cache_type", "cache_options"),
}
_S3 = {
    *("key", "secret", "token", "username", "password", "anon", "endpoint_url", "profile", "use_ssl"),
    *("requester_pays", "client_kwargs", "config_kwargs", "s3_additional_kwargs", "version_aware"),
}
_GCS = {"token", "anon", "endpoint_url", "project", "access", "consistency", "requester_pays"}
_AZURE = {
    *("account_name", "account_key", "sas_token", "credential", "anon", "tenant_id", "client_id", "client_secret"),
    *("account_host", "connection_string"),
}


@dataclass(frozen=True)
class Settings:
    """Of one client. config, client: obstore's. keys: None where the client finds its credentials by itself.

    present_keys: gives those of now, where keys are short-lived. renewable: whether the credentials may be others when
    they are looked up again. endpoint: for messages and requests of our own, without the bucket. attempts: of a
    request, with pauses between, after the client's own `retries`.
    """

    config: dict[str, Any]
    client: dict[str, Any] = field(default_factory=dict)
    keys: Keys | None = None
    present_keys: Callable[[], Keys] | None = None
    endpoint: str = ""
    renewable: bool = False
    attempts: int = ATTEMPTS
    retries: int = _QUICK_RETRIES

    def current_keys(self) -> Keys | None:
        """The keys to sign with now. Raises UserError where short-lived ones cannot be renewed."""
        return self.present_keys() if self.present_keys else self.keys

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may repeat."""
        held = (self.keys.secret, self.keys.token, self.keys.key) if self.keys else ()
        return tuple(one for one in held if one)


def s3_settings(bucket: str, options: Mapping[str, Any]) -> Settings:
    """Of an S3 bucket, as s3fs would have understood the options."""
    _check("s3", options, _S3)
    if options.get("version_aware"):
        raise UserError("storage.options.version_aware: versions of objects are not read; remove the option")
    client, tuned = _branch(options, "client_kwargs"), _branch(options, "config_kwargs")
    anon = bool(options.get("anon")) or tuned.get("signature_version") == "unsigned"
    keys, renewable = (None, False) if anon else _s3_keys(options)
    short_lived = keys if callable(keys) else None
    profile = profile_settings(options.get("profile"))
    endpoint = _endpoint(options, profile)
    region = _region(options, profile) or ("us-east-1" if endpoint else bucket_region(bucket))
    config: dict[str, Any] = {"region": region, **_s3_additional(options)}
    if anon:
        config["skip_signature"] = True
    if options.get("requester_pays"):
        config["request_payer"] = True
    if endpoint:
        config["endpoint"] = endpoint
    if tuned.get("s3", {}).get("addressing_style") == "virtual":
        config["virtual_hosted_style_request"] = True
        if endpoint:
            scheme, _, host = config["endpoint"].rpartition("://")
            config["endpoint"] = f"{scheme}://{bucket}.{host}"
    attempts = _attempts(tuned)
    return Settings(
        config=config,
        client=_client(endpoint, client, tuned),
        keys=keys() if callable(keys) else keys,
        present_keys=short_lived,
        endpoint=endpoint or f"https://s3.{region}.amazonaws.com",
        renewable=renewable,
        attempts=ATTEMPTS if attempts is None else max(1, attempts),
        retries=_QUICK_RETRIES if attempts is None else attempts,
    )


def gcs_settings(bucket: str, options: Mapping[str, Any]) -> Settings:
    """Of a bucket of Google Cloud Storage; without a token, the client's own search for credentials."""
    _check("gs", options, _GCS)
    config: dict[str, Any] = {}
    token = options.get("token")
    if options.get("anon") or token == "anon":
        config["skip_signature"] = True
    elif isinstance(token, str) and Path(token).expanduser().is_file():
        config["service_account"] = str(Path(token).expanduser())
    elif token not in (None, "google_default", "cloud", "cache"):
        raise UserError(
            "storage.options.token: for gs:// it is the path of a service account's JSON, google_default or anon"
        )
    endpoint = options.get("endpoint_url") or ""
    if endpoint:
        config["base_url"] = endpoint
    return Settings(config, _client(str(endpoint), {}, {}), endpoint=str(endpoint), renewable=True)


def azure_settings(container: str, options: Mapping[str, Any]) -> Settings:
    """Of a container of Azure Blob Storage; without a key, the client's own search for credentials."""
    _check("az", options, _AZURE)
    if options.get("connection_string") or not isinstance(options.get("credential", ""), str):
        raise UserError("storage.options: for az:// give account_name and account_key or sas_token")
    names = {"account_name": "account_name", "account_key": "account_key", "sas_token": "sas_key"}
    names |= {"tenant_id": "tenant_id", "client_id": "client_id", "client_secret": "client_secret"}
    config = {theirs: options[ours] for ours, theirs in names.items() if options.get(ours)}
    if options.get("credential"):
        config.setdefault("account_key", options["credential"])
    if options.get("anon"):
        config["skip_signature"] = True
    if options.get("account_host"):
        config["endpoint"] = f"https://{options['account_host']}"
    return Settings(config, _client("", {}, {}), endpoint=str(config.get("endpoint", "")), renewable=True)


@cache
def bucket_region(bucket: str, host: str = "https://s3.amazonaws.com") -> str:
    """Where AWS keeps a bucket, which it tells anyone; us-east-1 where it does not answer."""
    try:
        request = urllib.request.Request(f"{host}/{bucket}", method="HEAD")
        with urllib.request.urlopen(request, timeout=_CONNECT_TIMEOUT) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:  # told beside 403 and 301, too
        headers = error.headers
    except OSError:
        return "us-east-1"
    return str(headers.get("x-amz-bucket-region") or "us-east-1")


def _s3_keys(options: Mapping[str, Any]) -> tuple[Keys | Callable[[], Keys] | None, bool]:
    """The keys that are given, or what gives them, and whether looking again may give others."""
    client, profile = _branch(options, "client_kwargs"), options.get("profile")
    key = options.get("key") or options.get("username") or client.get("aws_access_key_id")
    secret = options.get("secret") or options.get("password") or client.get("aws_secret_access_key")
    if key and secret:
        return Keys(key, secret, options.get("token") or client.get("aws_session_token")), False
    if profile:
        return profile_keys(profile), True
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        token = os.environ.get("AWS_SESSION_TOKEN") or os.environ.get("AWS_SECURITY_TOKEN")
        return Keys(key, secret, token), False
    if os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return None, True
    return profile_keys(None), True


def _endpoint(options: Mapping[str, Any], profile: Mapping[str, str]) -> str:
    """Of a store that is not AWS's, else empty."""
    given = options.get("endpoint_url") or _branch(options, "client_kwargs").get("endpoint_url")
    given = given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = str(given or profile.get("endpoint_url") or "").rstrip("/")
    _check_url(endpoint)
    return endpoint


def _region(options: Mapping[str, Any], profile: Mapping[str, str]) -> str | None:
    given = _branch(options, "client_kwargs").get("region_name") or _branch(options, "config_kwargs").get("region_name")
    given = given or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return given or profile.get("region")


def _s3_additional(options: Mapping[str, Any]) -> dict[str, Any]:
    names = {"ServerSideEncryption": "server_side_encryption", "SSEKMSKeyId": "sse_kms_key_id"}
    names["BucketKeyEnabled"] = "sse_bucket_key_enabled"
    given = _branch(options, "s3_additional_kwargs")
    if unknown := sorted(given.keys() - names.keys()):
        raise UserError(
            f"storage.options.s3_additional_kwargs.{unknown[0]}: cannot be used; {', '.join(names)} can, set others on "
            f"the bucket"
        )
    return {names[name]: value for name, value in given.items()}


def _client(endpoint: str, client: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "timeout": timedelta(minutes=15),  # of a whole request; one that stalls ends by the read timeout
        "read_timeout": timedelta(seconds=float(tuned.get("read_timeout", _READ_TIMEOUT))),
        "connect_timeout": timedelta(seconds=float(tuned.get("connect_timeout", _CONNECT_TIMEOUT))),
    }
    if endpoint.startswith("http://"):
        made["allow_http"] = True
    verify = client.get("verify", os.environ.get("AWS_CA_BUNDLE"))
    if verify is False:
        made["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        try:
            made["root_certificate"] = Path(verify).read_bytes()
        except OSError as error:
            raise UserError(f"{verify}: the certificates cannot be read ({error.strerror})") from None
    proxies = tuned.get("proxies") or {}
    if proxy := proxies.get("https") or proxies.get("http"):
        made["proxy_url"] = proxy
    return made


def _attempts(tuned: Mapping[str, Any]) -> int | None:
    """botocore's retries.max_attempts, if it is given."""
    retries = tuned.get("retries") or {}
    given = retries.get("max_attempts", retries.get("total_max_attempts"))
    return None if given is None else int(given)


def _branch(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given = options.get(name) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"storage.options.{name}: this is a mapping of names to values")
    return given


def _check_url(endpoint: str) -> None:
    """obstore's client does not survive an endpoint that is no URL."""
    parts = urlsplit(endpoint)
    if endpoint and (parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:\[\]-]+", parts.netloc)):
        raise UserError(
            f"{endpoint.rpartition('@')[2]}: the endpoint of the object store (storage.options.endpoint_url, "
            f"AWS_ENDPOINT_URL) is no URL; give one such as https://s3.example.com"
        )


def _check(scheme: str, options: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(options.keys() - _TUNING - _S3 - _GCS - _AZURE)
    if unknown:
        raise UserError(
            f"storage.options.{unknown[0]}: cannot be used for {scheme}://; what can is {', '.join(sorted(known))}"
        )
