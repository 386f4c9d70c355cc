"""Credentials and endpoint of S3 from the files of the aws command; obstore itself reads the environment alone."""

import os
from configparser import ConfigParser, Error
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError

_ELSEWHERE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables that say where credentials come from, and go before the files."""


def s3_options() -> dict[str, Any]:
    """Options of obstore's S3Store that the environment alone does not give. Raises `UserError`."""
    profile = _profile()
    options: dict[str, Any] = {}
    if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")) and "region" in profile:
        options["region"] = profile["region"]
    if not (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")) and "endpoint_url" in profile:
        options["endpoint"] = profile["endpoint_url"]
    if any(os.environ.get(name) for name in _ELSEWHERE):
        return options
    if "aws_access_key_id" in profile and "aws_secret_access_key" in profile:
        options["access_key_id"] = profile["aws_access_key_id"]
        options["secret_access_key"] = profile["aws_secret_access_key"]
        if "aws_session_token" in profile:
            options["session_token"] = profile["aws_session_token"]
    elif {"sso_session", "sso_start_url", "role_arn", "credential_process"} & profile.keys():
        options["credential_provider"] = _by_boto3()
    return options


def _profile() -> dict[str, str]:
    """The profile that AWS_PROFILE names, or the default one; empty where there is none. Raises `UserError`."""
    name = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    for variable, file in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
        path = Path(os.environ.get(variable) or f"~/.aws/{file}").expanduser()
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except (Error, UnicodeDecodeError):  # its message would repeat lines of the file
            raise UserError(f"{path}: is no file of the aws command; mend it, or set {variable}") from None
        for section in (name, f"profile {name}"):
            if parser.has_section(section):
                found |= dict(parser[section])
    if not found and "AWS_PROFILE" in os.environ:
        raise UserError(f"AWS_PROFILE: {name} is in neither ~/.aws/config nor ~/.aws/credentials; give another profile")
    return found


def _by_boto3() -> Any:
    """Let boto3 find credentials of a kind that takes more than a key, such as a login. Raises `UserError`."""
    if not find_spec("boto3"):
        raise UserError("AWS_PROFILE: a profile with a login, a role or a command needs boto3; pip install boto3")
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider()
