"""The contestants of `bench --sources` that read from object stores: our loader, and requests alone.

The stores are servers on this machine: one as fast as its processor, the other one as slow as a distant store over a line
that it shares with others.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from data_pipeline import sampling
from data_pipeline.bench.peers import BATCH, Contestant, Delivery, Task, config, ours
from data_pipeline.bench.range_server import RangeServer
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.storage.block_cache import BLOCK
from data_pipeline.sources.storage.objects import THREADS
from data_pipeline.sources.storage.store import read

PACK = "as pack"
"""Folder of the pack, below that of the sample."""
SHARD = 4_000_000
"""Bytes of a shard: an epoch has a dozen, so that what is bound to a window of them is a small part."""
_WINDOW = 2  # shards whose images are mixed
_AHEAD = 2  # batches of requests under way, as of the loader


class Server(NamedTuple):
    name: str
    delay_s: float = 0.0
    bytes_per_s: float = 0.0


LOOPBACK, DISTANT = Server("S3"), Server("distant S3", 0.02, 16e6)
"""Servers: the first one is bound by the processors that it shares, the second by its line."""


@contextmanager
def serving_in_background(folder: Path, server: Server) -> Iterator[str]:
    """Serve `folder` as a bucket, from a process of its own. Gives the server's address."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(folder.parent, server, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(root: Path, asked: Server, theirs: Connection) -> None:
    with RangeServer(root) as server:
        server.delay_s, server.bytes_per_s = asked.delay_s, asked.bytes_per_s
        theirs.send(server.url)
        server.serve_forever()


def point_to(task: Task, server: Server) -> str:
    """Point this process, which is a contestant's own, to the server. Returns its address."""
    assert task.stores
    url = task.stores[server.name]
    for name in [
        name for name in os.environ if name.startswith("AWS_")
    ]:  # whoever measures may have a store of his own
        del os.environ[name]
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_SKIP_SIGNATURE": "true"}
    return url


def the_pack(task: Task) -> Catalog:
    """Open the training images of the pack on the disk."""
    return open_catalog(DataConfig(str(task.folder / PACK)), "train")


def _address(task: Task, server: Server) -> str:
    """Address of the pack. This process is pointed to the server."""
    point_to(task, server)
    return f"s3://{task.folder.name}/{PACK}"


def _warm(task: Task) -> Delivery:
    os.environ["SLUICE_CACHE"] = str(task.folder / "cache")
    address = _address(task, LOOPBACK)
    catalog = open_catalog(DataConfig(address), "train")
    for row in range(len(catalog)):
        catalog.read(row)
    return ours(task, address)


def _cold(server: Server, window: int = 0) -> Callable[[Task], Delivery]:
    """Deliver whole epochs, each from the opening of the pack and an empty cache on."""

    def deliver(task: Task) -> Delivery:
        address = _address(task, server)
        for epoch in count():
            with TemporaryDirectory(dir=task.folder) as folder:
                os.environ["SLUICE_CACHE"] = folder
                loader = Loader(config(task, address, shuffle_shards=window), seed=epoch)
                yield sum(batch.num_real for batch in loader)

    return deliver


def _each_time(task: Task) -> Delivery:
    return ours(task, _address(task, LOOPBACK), cache_gb=0)


def _images_alone(task: Task) -> Delivery:
    """Read the images in the order of an epoch, as many at a time as the loader does, and drop them. Nothing is decoded."""
    catalog = open_catalog(DataConfig(_address(task, LOOPBACK), cache_gb=0), "train")
    under_way: deque[list[Future[bytes]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for epoch in count():
            order = sampling.order(0, epoch, len(catalog)).tolist()
            for start in range(0, len(order), BATCH):
                under_way.append([pool.submit(catalog.read, row) for row in order[start : start + BATCH]])
                if len(under_way) > _AHEAD:
                    yield len([image.result() for image in under_way.popleft()])


def _blocks_alone(server: Server) -> Callable[[Task], Delivery]:
    """Read all shards by blocks, as many at a time as the loader does, and drop them: the bound of a cold epoch."""

    def deliver(task: Task) -> Delivery:
        for _ in count():
            catalog = open_catalog(DataConfig(_address(task, server), cache_gb=0), "train")
            assert catalog.objects
            shards = zip(catalog.shards, catalog.objects.stats, strict=True)
            spans = [
                (catalog.objects.root / name, start, min(start + BLOCK, stat.size))
                for name, stat in shards
                for start in range(0, stat.size, BLOCK)
            ]
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda span: len(read(*span)), spans))
            yield len(catalog)

    return deliver


def _on(server: Server) -> dict[str, Contestant]:
    return {
        "pack, cold": Contestant(_cold(server), "obstore", whole_epochs=True),
        "pack, cold, by shards": Contestant(_cold(server, _WINDOW), "obstore", whole_epochs=True),
        "blocks alone": Contestant(_blocks_alone(server), "obstore", whole_epochs=True),
    }


REMOTE = {
    LOOPBACK: {
        "pack, cached": Contestant(_warm, "obstore"),
        **_on(LOOPBACK),
        "pack, not cached": Contestant(_each_time, "obstore"),
        "images alone": Contestant(_images_alone, "obstore"),
    },
    DISTANT: _on(DISTANT),
}
"""Server -> name -> contestant. `Task.folder` is a bucket with the folder PACK in it."""
