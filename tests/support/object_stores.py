"""Object stores on loopback: moto, which speaks all of S3, and a server of ranges whose faults can be chosen."""

import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.bench.range_server import RangeServer, serving
from data_pipeline.common.address import parse_address
from data_pipeline.sources.storage import store

SECRET = "never-shown-anywhere"


@contextmanager
def environment(endpoint: str) -> Iterator[pytest.MonkeyPatch]:
    """Credentials and endpoint as a user sets them, and none of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
        store.forget_connections()
        yield patch
    store.forget_connections()


@contextmanager
def moto(bucket: str) -> Iterator[str]:
    """Start an S3 server with an empty bucket. Yields the bucket's address."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with environment(f"http://{host}:{port}"):
            urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/{bucket}", method="PUT"))
            yield f"s3://{bucket}"
    finally:
        server.stop()


@contextmanager
def faulty(root: Path) -> Iterator[RangeServer]:
    """Serve the buckets in `root`."""
    with serving(root) as server, environment(server.url):
        yield server


def upload(folder: Path, address: str) -> str:
    """Copy a folder to an address. Returns it."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            store.write(parse_address(address, "address") / file.relative_to(folder).as_posix(), file.read_bytes())
    return address
