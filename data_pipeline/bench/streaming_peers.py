"""Others' loaders for object stores, as contestants of `bench --sources`: MosaicML Streaming, LitData, webdataset.

They read the images of the pack, in its order, in shards of the same size, from the same server: cold, an epoch from the making
of the loader and an empty cache on, or from a cache that holds everything. Each shuffles as it usually does, by shards and
within a window, and decodes in worker processes by torchvision's decode_jpeg, the faster one of its two.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from data_pipeline.bench.object_store import LOOPBACK, PACK, SHARD, Server, point_to, the_pack
from data_pipeline.bench.peers import AUGMENT, BATCH, Contestant, Delivery, Task, crop
from data_pipeline.sources.catalog import Catalog

_MOSAICML, _LITDATA = "mds", "litdata"  # folders
_KEY = {"aws_access_key_id": "anybody", "aws_secret_access_key": "anything"}  # nosec B105 # boto3 asks for one

Loading = Callable[[Task, str, str], Any]
"""Makes a loader of batches (images, labels) from a task, a server's address and a folder for its cache."""


def write_for_mosaicml(pack: Catalog, folder: Path) -> None:
    """Write the images as shards of MosaicML Streaming."""
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(folder / _MOSAICML), columns=columns, size_limit=SHARD) as writer:
        for row in range(len(pack)):
            writer.write({"image": pack.read(row), "label": int(pack.labels[row])})


def write_for_litdata(pack: Catalog, folder: Path) -> None:
    """Write the images as LitData's chunks."""
    from litdata.streaming.cache import Cache

    (folder / _LITDATA).mkdir()
    with redirect_stdout(io.StringIO()):
        cache = Cache(str(folder / _LITDATA), chunk_bytes=SHARD)
        for row in range(len(pack)):
            cache[row] = {"image": pack.read(row), "label": int(pack.labels[row])}
        cache.done()
        cache.merge()


def _mosaicml(task: Task, url: str, cache: str) -> Any:
    from streaming import StreamingDataset

    decode = _decoding(task)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return decode(sample["image"]), sample["label"]

    images = Images(remote=f"s3://{task.folder.name}/{_MOSAICML}", local=cache, shuffle=True, batch_size=BATCH)
    return DataLoader(images, BATCH, num_workers=task.workers, multiprocessing_context="fork")


def _litdata(task: Task, url: str, cache: str) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # otherwise it talks by https alone

    decode = _decoding(task)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return decode(sample["image"]), sample["label"]

    options = {"endpoint_url": url, "region_name": "us-east-1", **_KEY}
    images = Images(
        f"s3://{task.folder.name}/{_LITDATA}", cache_dir=cache, shuffle=True, drop_last=False, storage_options=options
    )
    return StreamingDataLoader(images, batch_size=BATCH, num_workers=task.workers, multiprocessing_context="fork")


def _webdataset(task: Task, url: str, cache: str) -> Any:
    from webdataset import WebDataset, WebLoader

    shards = [f"{url}/{task.folder.name}/{quote(PACK)}/train/{name}" for name in the_pack(task).shards]
    dataset = WebDataset(shards, shardshuffle=len(shards), cache_dir=cache or None).shuffle(256).to_tuple("jpg", "cls")
    batches = dataset.map_tuple(_decoding(task), int).batched(BATCH)
    return WebLoader(batches, batch_size=None, num_workers=task.workers, multiprocessing_context="fork")


def _decoding(task: Task) -> Callable[[bytes], torch.Tensor]:
    change = v2.Compose([crop(task), v2.RandomHorizontalFlip(AUGMENT.flip)])

    def decode(data: bytes) -> torch.Tensor:
        stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return change(decode_jpeg(stream, ImageReadMode.RGB))

    return decode


def _cold(loading: Loading, server: Server) -> Callable[[Task], Delivery]:
    """Deliver whole epochs, each from an empty cache on."""

    def deliver(task: Task) -> Delivery:
        for _ in count():
            with TemporaryDirectory(dir=task.folder) as cache:
                yield sum(len(images) for images, _ in loading(task, _reachable(task, server), cache))

    return deliver


def _cached(loading: Loading) -> Callable[[Task], Delivery]:
    """Deliver epochs without end, out of the cache from the second one on."""

    def deliver(task: Task) -> Delivery:
        with TemporaryDirectory(dir=task.folder) as cache:
            loader = loading(task, _reachable(task, LOOPBACK), cache)
            for epoch in count():
                sizes = (len(images) for images, _ in loader)
                yield from sizes if epoch else [sum(sizes)]

    return deliver


def _reachable(task: Task, server: Server) -> str:
    url = point_to(task, server)
    os.environ |= {name.upper(): value for name, value in _KEY.items()}
    os.environ |= {"S3_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    return url


_LOADERS: dict[str, tuple[Loading, str]] = {
    "MosaicML": (_mosaicml, "streaming"),
    "LitData": (_litdata, "litdata"),
    "webdataset": (_webdataset, "webdataset"),
}


def contestants(server: Server) -> Iterator[tuple[str, Contestant]]:
    """Yield the name and contestant of each loader on this server: cold, and on loopback cached too."""
    for name, (loading, package) in _LOADERS.items():
        if server == LOOPBACK:
            yield f"{name}, cached", Contestant(_cached(loading), package)
        if (
            loading != _mosaicml
        ):  # its 0.13 failed here, for a cause not found: "Relative sample index … is not present"
            yield f"{name}, cold", Contestant(_cold(loading, server), package, whole_epochs=True)
