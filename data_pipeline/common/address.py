"""Addresses in object stores: s3://bucket/folder, gs://bucket/folder, https://host/folder."""

from pathlib import Path, PosixPath
from urllib.parse import urlsplit

from data_pipeline.common.errors import require

SCHEMES = ("s3", "gs", "https", "http")


class Address(PosixPath):
    """Folder or object in a store.

    It is a path, so that what only names files needs to know no second kind; on this machine's disk nothing is found there.
    It holds no credentials, so it may be printed and saved.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return f"{self.parts[0]}//{'/'.join(self.parts[1:])}"

    @property
    def scheme(self) -> str:
        return self.parts[0].removesuffix(":")

    @property
    def host(self) -> str:
        """Bucket; for https and http the host, with its port if it has one."""
        return self.parts[1]

    @property
    def key(self) -> str:
        """Path within the bucket; empty for all of it."""
        return "/".join(self.parts[2:])

    @property
    def can_list(self) -> bool:
        """True for a store that lists its objects; a plain web server does not."""
        return self.scheme in ("s3", "gs")


def is_address(text: str) -> bool:
    scheme, colon, _ = text.partition("://")
    return bool(colon) and scheme in SCHEMES


def parse_address(text: str, option: str) -> Address:
    """Parse an address. Raises `UserError` naming the `option`, which repeats no secret that the address may hold."""
    scheme, _, rest = text.partition("://")
    web = scheme in ("http", "https")
    host = rest.partition("/")[0]
    require(
        "@" not in host and not (web and ("?" in rest or "#" in rest)),
        f"{option}: this {scheme}:// address holds a password or a signature, which a run would save with its options; give "
        "the plain address, and credentials by the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, …)",
    )
    require(
        host != "",
        f"{option}: {text} names no {'host' if web else 'bucket'}; give an address such as {scheme}://NAME/FOLDER",
    )
    path = urlsplit(text).path if web else rest.partition("/")[2]
    address = Address(f"{scheme}:", host, *filter(None, path.split("/")))
    require(
        ".." not in address.parts,
        f"{option}: {text} has a part .., which no store resolves; give the folder's own address",
    )
    return address


def place(text: str, option: str = "data.path") -> Path:
    """Return the address, or else the path, that a text means. Raises `UserError`."""
    return parse_address(text, option) if is_address(text) else Path(text)
