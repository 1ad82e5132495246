"""Credentials of an AWS profile in a user's files, found in the way of AWS's own tools.

In: a profile's name, the files `~/.aws/credentials` and `~/.aws/config` (or those that AWS_SHARED_CREDENTIALS_FILE and
AWS_CONFIG_FILE name), which `obstore` does not read. Out: the profile's settings and keys. `botocore`, which is an
extra, gets the keys of profiles with a role or single sign-on.
"""

from __future__ import annotations

import configparser
import json
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from storage.errors import UserError

_SIGN_ON = ("sso_session", "sso_start_url", "login_session")


class Keys(NamedTuple):
    """What signs a request."""

    key: str
    secret: str
    token: str | None = None


@dataclass(frozen=True)
class Profile:
    """A profile, with its settings from both files."""

    name: str
    settings: dict[str, str]

    @classmethod
    def read(cls, name: str | None) -> Profile:
        """The profile of this name; None: of AWS_PROFILE, else `default`. UserError where a named one is in no file."""
        named = name or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
        profile = cls(named or "default", {})
        for variable, file, sections in (
            ("AWS_CONFIG_FILE", "config", (profile.name, f"profile {profile.name}")),
            ("AWS_SHARED_CREDENTIALS_FILE", "credentials", (profile.name,)),
        ):
            path = Path(os.environ.get(variable) or Path.home() / ".aws" / file).expanduser()
            parser = configparser.RawConfigParser(strict=False)
            try:
                parser.read(path, encoding="utf-8")
            except (configparser.Error, UnicodeDecodeError):
                raise UserError(f"{path}: not a file of AWS profiles; mend it") from None
            for section in filter(parser.has_section, sections):
                profile.settings.update(parser.items(section))
        if named and not profile.settings:
            raise UserError(
                f"the AWS profile {named!r} is in neither ~/.aws/credentials nor ~/.aws/config; add it there"
            )
        return profile

    def keys(self) -> Callable[[], Keys] | None:
        """A function that returns the present keys, or raises UserError; None where the profile has none."""
        if "role_arn" in self.settings:
            return self._botocore_keys("role_arn")
        key, secret = self.settings.get("aws_access_key_id"), self.settings.get("aws_secret_access_key")
        if key is not None and secret is not None:
            return partial(Keys, key, secret, self.settings.get("aws_session_token"))
        if program := self.settings.get("credential_process"):
            return cache(partial(_process_keys, program))  # which may ask the user for a code
        sign_on = next((setting for setting in _SIGN_ON if setting in self.settings), None)
        return self._botocore_keys(sign_on) if sign_on else None

    def _botocore_keys(self, setting: str) -> Callable[[], Keys]:
        """A function that returns the present keys, which botocore renews in time."""
        described = f"the AWS profile {self.name!r} gets its credentials by {setting}"
        try:
            from botocore.exceptions import BotoCoreError, ClientError
            from botocore.session import Session
        except ImportError:
            raise UserError(f"{described}, which needs botocore; pip install 'ringworld[aws]'") from None
        credentials: Any = None

        def keys() -> Keys:
            nonlocal credentials
            try:
                credentials = credentials or Session(profile=self.name).get_credentials()
                if credentials is None:
                    raise BotoCoreError
                present = credentials.get_frozen_credentials()
            except (BotoCoreError, ClientError, OSError) as error:
                raise UserError(
                    f"{described}, and gets none ({' '.join(str(error).split())}); run `aws sso login --profile "
                    f"{self.name}` if they have expired, or mend the profile"
                ) from None
            return Keys(present.access_key, present.secret_key, present.token)

        return keys


def _process_keys(program: str) -> Keys:
    try:
        done = subprocess.run(shlex.split(program), capture_output=True, text=True, check=True, timeout=60)
        answer = json.loads(done.stdout)
        return Keys(answer["AccessKeyId"], answer["SecretAccessKey"], answer.get("SessionToken"))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise UserError(
            f"the credential_process of the AWS profile gave no credentials ({type(error).__name__}); run it by hand"
        ) from None
