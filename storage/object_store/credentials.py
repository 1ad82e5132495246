"""Credentials of the AWS profile that a user's files hold, in the way of AWS's own tools.

In: a profile's name, the files `~/.aws/credentials` and `~/.aws/config` (or where AWS_SHARED_CREDENTIALS_FILE and
AWS_CONFIG_FILE point). Out: what they say of it. `obstore` itself reads the environment and asks the machine it runs
on (web identity, containers, instances), but opens no file. Files are read anew when credentials have expired.
"""

from __future__ import annotations

import configparser
import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from storage.errors import UserError

_PROCESS_SECONDS = 60


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


def profile_keys(name: str | None) -> Keys | None:
    """The keys of a profile, from the files or from the program that it names; None where it has none."""
    settings = profile_settings(name)
    if "aws_access_key_id" in settings and "aws_secret_access_key" in settings:
        token = settings.get("aws_session_token")
        return Keys(settings["aws_access_key_id"], settings["aws_secret_access_key"], token)
    if program := settings.get("credential_process"):
        return _from_process(program)
    ways = {"role_arn", "sso_session", "sso_start_url", "login_session"} & settings.keys()
    if ways:
        raise UserError(
            f"the AWS profile {name or os.environ.get('AWS_PROFILE') or 'default'!r} gets its credentials by "
            f"{min(ways)}, which is not done here; make another whose credential_process is `aws configure "
            f"export-credentials --profile ...`, and name that one"
        )
    return None


def _from_process(program: str) -> Keys:
    try:
        done = subprocess.run(
            shlex.split(program), capture_output=True, text=True, check=True, timeout=_PROCESS_SECONDS
        )
        said = json.loads(done.stdout)
        return Keys(said["AccessKeyId"], said["SecretAccessKey"], said.get("SessionToken"))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise UserError(
            f"the credential_process of the AWS profile gave no credentials ({type(error).__name__}); run it by hand"
        ) from None
