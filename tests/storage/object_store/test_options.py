"""Options of s3fs, gcsfs and adlfs, the environment and profiles: what becomes of each, and what cannot be used."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from storage.errors import UserError
from storage.object_store.client import Client
from storage.object_store.credentials import Keys
from storage.object_store.errors import Request, StoreError
from storage.object_store.options import azure_settings, bucket_region, gcs_settings, s3_settings
from storage.retry import Backoff
from storage.urls import list_objects
from testing.http_server import http_server

KEYS = {"key": "k", "secret": "s"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of this machine's user."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")


@pytest.mark.parametrize(
    ("options", "config", "keys"),
    [
        ({**KEYS, "token": "t"}, {}, Keys("k", "s", "t")),
        ({"username": "k", "password": "s"}, {}, Keys("k", "s")),
        ({"client_kwargs": {"aws_access_key_id": "k", "aws_secret_access_key": "s"}}, {}, Keys("k", "s")),
        ({**KEYS, "anon": True}, {"skip_signature": True}, None),
        ({**KEYS, "endpoint_url": "http://h:1/"}, {"endpoint": "http://h:1"}, Keys("k", "s")),
        ({**KEYS, "client_kwargs": {"endpoint_url": "http://h:1"}}, {"endpoint": "http://h:1"}, Keys("k", "s")),
        ({**KEYS, "client_kwargs": {"region_name": "us-west-2"}}, {"region": "us-west-2"}, Keys("k", "s")),
        ({**KEYS, "requester_pays": True}, {"request_payer": True}, Keys("k", "s")),
        (
            {**KEYS, "endpoint_url": "http://h:1", "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
            {"endpoint": "http://bucket.h:1", "virtual_hosted_style_request": True},
            Keys("k", "s"),
        ),
        (
            {**KEYS, "s3_additional_kwargs": {"ServerSideEncryption": "AES256"}},
            {"server_side_encryption": "AES256"},
            Keys("k", "s"),
        ),
        ({**KEYS, "use_listings_cache": False, "account_name": "another store's"}, {}, Keys("k", "s")),
    ],
)
def test_options_of_s3fs_mean_what_they_meant(
    options: dict[str, Any], config: dict[str, Any], keys: Keys | None
) -> None:
    settings = s3_settings("bucket", options)
    assert settings.config == {"region": "eu-west-1", **config}
    assert settings.keys == keys
    assert not settings.renewable or keys is None
    Client("s3", "bucket", options)  # which obstore takes


def test_the_environment_gives_what_options_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ek")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "es")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "et")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:2")
    settings = s3_settings("bucket", {})
    assert settings.keys == Keys("ek", "es", "et")
    assert settings.config == {"region": "eu-west-1", "endpoint": "http://h:2"}
    assert settings.client["allow_http"] is True
    assert s3_settings("bucket", KEYS).keys == Keys("k", "s"), "no token of other keys"


def test_a_profile_gives_keys_and_is_looked_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id=dk\naws_secret_access_key=ds\n[p]\naws_access_key_id=a\n")
    (tmp_path / "config").write_text("[profile p]\nregion = us-west-1\n[profile sso]\nsso_session = x\n")
    assert s3_settings("bucket", {}).keys == Keys("dk", "ds")
    file.write_text(file.read_text() + "aws_secret_access_key=b\naws_session_token=c\n")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    for settings in (s3_settings("bucket", {"profile": "p"}), _by_name(monkeypatch, "p")):
        assert settings.keys == Keys("a", "b", "c")
        assert settings.renewable
        assert settings.config["region"] == "us-west-1"
    with pytest.raises(UserError, match="the AWS profile 'sso' gets its credentials by sso_session"):
        s3_settings("bucket", {"profile": "sso"})
    assert s3_settings("bucket", {"profile": "sso", "anon": True}).keys is None
    with pytest.raises(UserError, match="the AWS profile 'none' is in neither"):
        s3_settings("bucket", {"profile": "none"})


def _by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    monkeypatch.setenv("AWS_PROFILE", name)
    try:
        return s3_settings("bucket", {})
    finally:
        monkeypatch.delenv("AWS_PROFILE")


def test_a_profile_may_name_a_program_that_gives_keys(tmp_path: Path) -> None:
    said = json.dumps({"Version": 1, "AccessKeyId": "pk", "SecretAccessKey": "ps", "SessionToken": "pt"})
    (tmp_path / "said").write_text(said)
    config = tmp_path / "config"
    config.write_text(f"[profile p]\ncredential_process = cat {tmp_path / 'said'}\n")
    assert s3_settings("bucket", {"profile": "p"}).keys == Keys("pk", "ps", "pt")
    config.write_text(f"[profile p]\ncredential_process = {sys.executable} -c 'print(1/0)'\n")
    with pytest.raises(UserError, match="credential_process of the AWS profile gave no credentials"):
        s3_settings("bucket", {"profile": "p"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"endpont_url": "x"},
            "options.endpont_url: cannot be used for s3://; what can is anon, client_kwargs",
        ),
        ({"version_aware": True}, "version_aware: versions of objects are not read"),
        ({"s3_additional_kwargs": {"ACL": "public-read"}}, "s3_additional_kwargs.ACL: cannot be used"),
        ({"endpoint_url": "host:9000"}, "^host:9000: the endpoint of the object store .* is no URL"),
        ({"endpoint_url": "http://a b"}, "^http://a b: the endpoint of the object store .* is no URL"),
        ({"client_kwargs": "x"}, "storage.options.client_kwargs: this is a mapping"),
        ({"client_kwargs": {"verify": "/none.pem"}}, "/none.pem: the certificates cannot be read"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")) as caught:
        s3_settings("bucket", {**KEYS, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bucket", ["", "a b", "da*", "x%2Fy", "ü"])
def test_what_can_be_no_bucket_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match="no bucket has this name, nor is one found by globs"):
        list_objects(f"s3://{bucket}/x", KEYS)


def test_options_of_the_other_stores(tmp_path: Path) -> None:
    (tmp_path / "account.json").write_text("{}")
    assert gcs_settings("b", {"token": str(tmp_path / "account.json")}).config == {
        "service_account": str(tmp_path / "account.json")
    }
    assert gcs_settings("b", {"token": "anon", "project": "p"}).config == {"skip_signature": True}
    for token in ("google_default", "cloud", "cache"):
        assert gcs_settings("b", {"token": token}).config == {}
    with pytest.raises(UserError, match="token: for gs:// it is the path"):
        gcs_settings("b", {"token": "oops"})
    assert azure_settings("c", {"account_name": "a", "sas_token": "t"}).config == {"account_name": "a", "sas_key": "t"}
    for scheme, options in (("gs", {"anon": True}), ("az", {"account_name": "a", "account_key": "YQ=="})):
        Client(scheme, "b", options)
    with pytest.raises(UserError, match=r"no client of az://c can be made of them") as caught:
        Client("az", "c", {"account_name": "a", "account_key": "not base64!"})
    assert "base64!" not in str(caught.value)


def test_the_region_of_a_bucket_is_asked_where_none_is_set() -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(301)
            self.send_header("x-amz-bucket-region", f"of{self.path}".replace("/", "-"))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http_server(Answer) as store:
        assert bucket_region("mine", store) == "of-mine"
    assert bucket_region("mine", "http://127.0.0.1:9") == "us-east-1"


def test_no_message_repeats_a_credential() -> None:
    asked = Request("s3://b/k", "read", "http://h", ("AKIAKEY", "topsecret"))
    raised = OSError(
        "Error performing GET http://h/b/k in 1ms - Server returned non-2xx status code: 403 Forbidden: "
        "<Error><Code>InvalidAccessKeyId</Code><Message>AKIAKEY is not known, topsecret</Message></Error>"
        "\n\nDebug source:\nX"
    )
    assert str(asked.error(raised)) == (
        "s3://b/k: cannot be read from the store at http://h (403 InvalidAccessKeyId: ... is not known, ...); check "
        "the credentials and what they allow, and run again to carry on"
    )


def client_that_gets(message: str) -> tuple[Client, Callable[[], None]]:
    """A client whose requests fail with a message of the store, and such a request."""
    client = Client("s3", "b", {"key": "minio", "secret": "minio123", "endpoint_url": "http://127.0.0.1:9"})

    def refuse(store: Any, key: str) -> None:
        raise OSError(f"Server returned non-2xx status code: 400 Bad Request: <Error>{message}</Error>")

    return client, lambda: client.ask("read", refuse, "k", Backoff(attempts=3, pause=0.0))


def test_no_rest_of_a_secret_is_left_that_begins_with_the_key() -> None:
    _, ask = client_that_gets("<Code>SignatureDoesNotMatch</Code><Message>signed by minio123</Message>")
    with pytest.raises(StoreError, match=r"signed by \.\.\.") as caught:
        ask()
    assert "123" not in str(caught.value)


def test_credentials_that_cannot_be_renewed_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client, ask = client_that_gets("<Code>ExpiredToken</Code>")
    client.settings = replace(client.settings, renewable=True)
    renewals = []

    def renew() -> None:
        renewals.append(1)
        raise UserError("log in again")

    monkeypatch.setattr(client, "renew", renew)
    with pytest.raises(UserError, match=r"^log in again$"):
        ask()
    assert len(renewals) == 1


class AwsServices:
    """STS and the portal of single sign-on, on loopback: temporary keys that name how they were got."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.seconds = 3600  # for which keys last
        services = self

        class Answer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                services.requests.append(f"{query['Action'][0]} {query['RoleArn'][0]}")
                self._answer(services.assumed(f"role-{len(services.requests)}"), "text/xml")

            def do_GET(self) -> None:
                url, token = urlsplit(self.path), self.headers["x-amz-sso_bearer_token"]
                role = parse_qs(url.query)["role_name"][0]
                services.requests.append(f"{url.path} {role} {token}")
                keys = {"accessKeyId": f"sso-{role}", "secretAccessKey": "s", "sessionToken": "t"}
                keys["expiration"] = int((time.time() + services.seconds) * 1000)  # type: ignore[assignment]
                self._answer(json.dumps({"roleCredentials": keys}), "application/json")

            def _answer(self, body: str, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.handler = Answer

    def assumed(self, key: str) -> str:
        until = (datetime.now(UTC) + timedelta(seconds=self.seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return (
            '<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>'
            f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
            f"<Expiration>{until}</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
        )


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AwsServices]:
    services = AwsServices()
    monkeypatch.setenv("HOME", str(tmp_path))  # where tokens of single sign-on are cached
    with http_server(services.handler) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        monkeypatch.setenv("AWS_ENDPOINT_URL_SSO", url)
        yield services


ROLE = """
[profile base]
aws_access_key_id = b
aws_secret_access_key = s
[profile role]
role_arn = arn:aws:iam::123456789012:role/reader
source_profile = base
"""
SIGN_ON = """
[profile sso]
sso_session = work
sso_account_id = 123456789012
sso_role_name = reader
[sso-session work]
sso_region = eu-west-1
sso_start_url = https://example.com/start
"""


def test_a_profile_with_a_role_gets_keys_of_the_role_and_new_ones_before_they_expire(
    services: AwsServices, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(ROLE)
    settings = s3_settings("bucket", {"profile": "role"})
    assert settings.keys == Keys("role-1", "s", "t")
    assert settings.current_keys() == settings.keys, "not asked for again while they last"
    assert services.requests == ["AssumeRole arn:aws:iam::123456789012:role/reader"]
    services.seconds = 60
    short = s3_settings("bucket", {"profile": "role"})
    assert short.current_keys() != short.current_keys()


def test_a_profile_with_single_sign_on_gets_keys_for_the_token_of_its_session(
    services: AwsServices, tmp_path: Path
) -> None:
    script = (
        "from storage.errors import UserError\n"
        "from storage.object_store.client import Client\n"
        "try:\n"
        "    print(Client('s3', 'bucket', {'profile': 'sso'}).settings.keys.key)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )

    def key() -> str:  # in a new process, as botocore settles where tokens are when it is imported
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "config").write_text(SIGN_ON)
    said = key()
    assert said.startswith("the AWS profile 'sso' gets its credentials by sso_session, and gets none (Error loading")
    assert "run `aws sso login --profile sso`" in said
    assert "\n" not in said
    cache = tmp_path / ".aws" / "sso" / "cache"
    cache.mkdir(parents=True)
    until = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    token = {"startUrl": "https://example.com/start", "region": "eu-west-1", "accessToken": "mine", "expiresAt": until}
    (cache / f"{hashlib.sha1(b'work').hexdigest()}.json").write_text(json.dumps(token))
    assert key() == "sso-reader"
    assert services.requests == ["/federation/credentials reader mine"]


def test_without_botocore_only_such_profiles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(ROLE + SIGN_ON)
    script = (
        "import sys; sys.modules['botocore'] = sys.modules['boto3'] = None\n"
        "from storage.errors import UserError\n"
        "from storage.object_store.options import s3_settings\n"
        "print(s3_settings('bucket', {'profile': 'base'}).keys.key)\n"
        "for profile in ('role', 'sso'):\n"
        "    try:\n"
        "        s3_settings('bucket', {'profile': profile})\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    by = "the AWS profile '{}' gets its credentials by {}, which needs botocore; pip install 'ringworld[aws]'"
    assert done.stdout.splitlines() == ["b", by.format("role", "role_arn"), by.format("sso", "sso_session")]
