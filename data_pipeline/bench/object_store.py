"""The contestants of `bench --sources` that read from an object store on loopback: our loader, and requests alone."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipeline import sampling
from data_pipeline.bench.peers import BATCH, Contestant, Delivery, Task, config, ours
from data_pipeline.bench.range_server import RangeServer
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.pack_format import Pack
from data_pipeline.sources.storage.objects import THREADS

PACK = "as pack"
"""Folder of the pack, below that of the sample."""
_AHEAD = 2  # batches of requests under way, as of the loader


def images_of_pack(folder: Path) -> int:
    """Count the images of an epoch."""
    images: int = Pack.open(folder / PACK).manifest["splits"]["train"]["images"]
    return images


@contextmanager
def serving_in_background(folder: Path) -> Iterator[str]:
    """Serve `folder` as a bucket, from a process of its own. Gives the server's address."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(folder.parent, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(root: Path, theirs: Connection) -> None:
    with RangeServer(root) as server:
        theirs.send(server.url)
        server.serve_forever()


def _warm(task: Task) -> Delivery:
    os.environ["SLUICE_CACHE"] = str(task.folder / "cache")
    catalog = _opened(task, cache_gb=50)
    for row in range(len(catalog)):
        catalog.read(row)
    return ours(task, _address(task))


def _cold(task: Task) -> Delivery:
    """Begin each epoch with nothing in the cache, from the opening of the pack on."""
    for epoch in count():
        with TemporaryDirectory(dir=task.folder) as folder:
            os.environ["SLUICE_CACHE"] = folder
            for batch in Loader(config(task, _address(task)), seed=epoch):
                yield batch.num_real


def _each_time(task: Task) -> Delivery:
    return ours(task, _address(task), cache_gb=0)


def _requests_alone(task: Task) -> Delivery:
    """Read the images in the order of an epoch, as many at a time as the loader does, and drop them. Nothing is decoded."""
    catalog = _opened(task, cache_gb=0)
    under_way: deque[list[Future[bytes]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for epoch in count():
            order = sampling.order(0, epoch, len(catalog)).tolist()
            for start in range(0, len(order), BATCH):
                under_way.append([pool.submit(catalog.read, row) for row in order[start : start + BATCH]])
                if len(under_way) > _AHEAD:
                    yield len([image.result() for image in under_way.popleft()])


def _opened(task: Task, cache_gb: float) -> Catalog:
    return open_catalog(DataConfig(_address(task), cache_gb=cache_gb), "train")


def _address(task: Task) -> str:
    """Address of the pack. This process, which is a contestant's own, is pointed to the server."""
    os.environ |= {"AWS_ENDPOINT_URL": task.store_url, "AWS_REGION": "us-east-1", "AWS_SKIP_SIGNATURE": "true"}
    return f"s3://{task.folder.name}/{PACK}"


REMOTE = {
    "pack in S3, cached": Contestant(_warm, "obstore"),
    "pack in S3, cold": Contestant(_cold, "obstore", whole_epochs=True),
    "pack in S3, not cached": Contestant(_each_time, "obstore"),
    "range reads alone": Contestant(_requests_alone, "obstore"),
}
"""Name -> contestant. `Task.folder` is a bucket with the folder PACK in it."""
