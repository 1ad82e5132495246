"""Credentials of the AWS profile that a user's files hold, in the way of AWS's own tools.

In: a profile's name, the files `~/.aws/credentials` and `~/.aws/config` (or where AWS_SHARED_CREDENTIALS_FILE and
AWS_CONFIG_FILE point). Out: what they say of it. `obstore` itself reads the environment and asks the machine it runs
on (web identity, containers, instances), but opens no file. Files are read anew when credentials have expired.
Profiles that get their credentials by a role or by single sign-on are followed by `botocore`, which is an extra.
"""

from __future__ import annotations

import configparser
import json
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.errors import UserError

_PROCESS_SECONDS = 60
_SIGN_ON = ("sso_session", "sso_start_url", "login_session")


@dataclass(frozen=True)
class Keys:
    """What signs a request."""

    key: str
    secret: str
    token: str | None = None


def profile_settings(name: str | None) -> dict[str, str]:
    """What the files say of a profile; None is AWS_PROFILE's, else `default`. Raises UserError where a named one is
    in none.
    """
    chosen = name or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    profile = chosen or "default"
    found: dict[str, str] = {}
    for variable, file, sections in (
        ("AWS_CONFIG_FILE", "config", (profile, f"profile {profile}")),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", (profile,)),
    ):
        path = Path(os.environ.get(variable) or Path.home() / ".aws" / file).expanduser()
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            raise UserError(f"{path}: not a file of AWS profiles; mend it") from None
        for section in sections:
            if parser.has_section(section):
                found |= parser.items(section)
    if chosen and not found:
        raise UserError(f"the AWS profile {chosen!r} is in neither ~/.aws/credentials nor ~/.aws/config; add it there")
    return found


def profile_keys(name: str | None) -> Keys | Callable[[], Keys] | None:
    """The keys of a profile, from the files or from the program that it names; where they are short-lived, what gives
    the present ones. None where it has none. Raises UserError where they cannot be had.
    """
    settings = profile_settings(name)
    if "role_arn" in settings:
        return _from_botocore(name, "role_arn")
    if "aws_access_key_id" in settings and "aws_secret_access_key" in settings:
        token = settings.get("aws_session_token")
        return Keys(settings["aws_access_key_id"], settings["aws_secret_access_key"], token)
    if program := settings.get("credential_process"):
        return _from_process(program)
    way = next((way for way in _SIGN_ON if way in settings), None)
    return _from_botocore(name, way) if way else None


def _from_botocore(name: str | None, way: str) -> Callable[[], Keys]:
    """What gives the present keys, which botocore renews in time."""
    profile = name or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    described = f"the AWS profile {profile!r} gets its credentials by {way}"
    try:
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session
    except ImportError:
        raise UserError(f"{described}, which needs botocore; pip install 'ringworld[aws]'") from None

    def keys() -> Keys:
        try:
            present = credentials.get_frozen_credentials()
        except (BotoCoreError, ClientError, OSError) as error:
            raise _unfollowed(described, profile, error) from None
        return Keys(present.access_key, present.secret_key, present.token)

    try:
        credentials = Session(profile=profile).get_credentials()
        if credentials is None:
            raise BotoCoreError
    except (BotoCoreError, ClientError, OSError) as error:
        raise _unfollowed(described, profile, error) from None
    return keys


def _unfollowed(described: str, profile: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{described}, and gets none ({reason}); run `aws sso login --profile {profile}` if they have expired, or mend "
        f"the profile"
    )


def _from_process(program: str) -> Keys:
    try:
        done = subprocess.run(
            shlex.split(program), capture_output=True, text=True, check=True, timeout=_PROCESS_SECONDS
        )
        answer = json.loads(done.stdout)
        return Keys(answer["AccessKeyId"], answer["SecretAccessKey"], answer.get("SessionToken"))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise UserError(
            f"the credential_process of the AWS profile gave no credentials ({type(error).__name__}); run it by hand"
        ) from None
