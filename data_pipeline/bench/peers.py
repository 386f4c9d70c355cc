"""The contestants of `bench`: our loader and others, on the same images, with the same crop and flip."""

import importlib.util
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, read_file  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from data_pipeline import sampling
from data_pipeline.common.errors import require
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.dali import graph
from data_pipeline.loader import Cursor, Loader
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.image_headers import inspect

BATCH = 64
OURS, PLAIN, LIMIT = "sluice", "sluice, plain DALI", "decode only"
SPDL = "SPDL"
_SHARDS = 16
AUGMENT = AugmentConfig()
_AREA = (AUGMENT.min_area, AUGMENT.max_area)
_RATIO = (1 / AUGMENT.max_ratio, AUGMENT.max_ratio)


T = TypeVar("T")


class Task(NamedTuple):
    """Data and settings that every contestant gets."""

    folder: Path
    """Folder with train/CLASS/NUMBER.jpg, and the same images in shard-NUMBER.tar files."""
    size_px: int
    workers: int
    stores: Mapping[str, str] | None = None
    """Name -> address of the object stores that serve `folder` as a bucket, for the contestants that read from one."""


Delivery = Iterator[int]
"""Endless iterator: the number of images in each batch that a loader delivers."""


def _sluice(task: Task) -> Delivery:
    return ours(task, task.folder)


def ours(task: Task, path: Path | str, cache_gb: float = 50) -> Delivery:
    """Deliver the images in any of the layouts, or from an address."""
    cfg = config(task, path, cache_gb=cache_gb)
    loader = Loader(cfg, open_catalog(cfg, "train"), RankInfo(cores=task.workers), training=True, epochs=1 << 30)
    for epoch in range(1 << 30):
        loader.seek(Cursor(epoch))
        for batch in loader:
            yield batch.num_real


def config(task: Task, path: Path | str, *, cache_gb: float = 50, shuffle_shards: int = 0) -> DataConfig:
    """Options of our loader for images in a folder or at an address."""
    return DataConfig(
        path=str(path),
        cache_gb=cache_gb,
        shuffle_shards=shuffle_shards,
        batch=BATCH,
        size_px=task.size_px,
        threads=task.workers,
        augment=AUGMENT,
    )


def _plain_dali(task: Task) -> Delivery:
    graph.cpu_kernel = lambda: None  # type: ignore[assignment] # the process does nothing else
    return _sluice(task)


def _torchvision_pil(task: Task) -> Delivery:
    transform = v2.Compose([crop(task), v2.RandomHorizontalFlip(AUGMENT.flip), v2.PILToTensor()])
    return _torch_loader(ImageFolder(task.folder / "train", transform), task)


def _torchvision_decode_jpeg(task: Task) -> Delivery:
    transform = v2.Compose([crop(task), v2.RandomHorizontalFlip(AUGMENT.flip)])
    return _torch_loader(ImageFolder(task.folder / "train", transform, loader=_decode_file), task)


def _decode_file(path: str) -> torch.Tensor:
    return decode_image(path, ImageReadMode.RGB)  # by its decode_jpeg, for a JPEG


def _torch_loader(dataset: ImageFolder, task: Task) -> Delivery:
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=task.workers, persistent_workers=True)
    while True:
        for images, _ in loader:
            yield len(images)


def _webdataset(task: Task) -> Delivery:
    from webdataset import WebDataset, WebLoader

    transform = v2.Compose([crop(task), v2.RandomHorizontalFlip(AUGMENT.flip), v2.PILToTensor()])
    shards = sorted(str(path) for path in task.folder.glob("*.tar"))
    dataset = WebDataset(shards, resampled=True, shardshuffle=False).shuffle(256).decode("pil").to_tuple("jpg", "cls")
    batches = WebLoader(dataset.map_tuple(transform, int).batched(BATCH), batch_size=None, num_workers=task.workers)
    for images, _ in batches:
        yield len(images)


def _spdl(task: Task) -> Delivery:
    """Decode, crop and resize by FFmpeg's filters in threads, as SPDL does."""
    from spdl import io as spdl_io
    from spdl.pipeline import PipelineBuilder

    files = sorted((task.folder / "train").rglob("*.jpg"))
    rng = np.random.default_rng(0)

    def endless() -> Iterator[Path]:
        while True:
            yield from (files[at] for at in rng.permutation(len(files)))

    def decoded(file: Path) -> object:
        data = file.read_bytes()
        size = inspect(data)
        draws = np.random.default_rng().random((1, 32))
        top, left, bottom, right = (
            sampling.training_geometry(draws, np.array([size], np.int32), AUGMENT).roi[0].tolist()
        )
        window = f"crop={abs(right - left):.0f}:{bottom - top:.0f}:{min(left, right):.0f}:{top:.0f}"
        scale = f"scale={task.size_px}:{task.size_px}:flags=bilinear,format=pix_fmts=rgb24"
        packets = spdl_io.demux_image(data)
        return spdl_io.decode_packets(packets, filter_desc=f"{window},{'hflip,' * (left > right)}{scale}")

    decoded(files[0])  # where FFmpeg is missing this fails; the pipeline would only log it, for ever
    builder = PipelineBuilder().add_source(endless()).pipe(decoded, concurrency=task.workers).aggregate(BATCH)
    pipeline = builder.pipe(spdl_io.convert_frames).add_sink(2).build(num_threads=task.workers)
    with pipeline.auto_stop():
        for batch in pipeline:
            yield len(spdl_io.to_torch(batch))


def _ffcv(task: Task) -> Delivery:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.writer import DatasetWriter

    written = str(task.folder / f"ffcv-{task.size_px}.beton")
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(written, fields, num_workers=task.workers).from_indexed_dataset(ImageFolder(task.folder / "train"))
    crop = RandomResizedCropRGBImageDecoder((task.size_px, task.size_px), _AREA, _RATIO)
    loader = FfcvLoader(
        written,
        batch_size=BATCH,
        num_workers=task.workers,
        order=OrderOption.RANDOM,
        pipelines={
            "image": [crop, RandomHorizontalFlip(AUGMENT.flip), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    while True:
        for images, _ in loader:
            yield len(images)


def _decode_only(task: Task) -> Delivery:
    """Decode whole images from memory and drop them. No loader that decodes on a CPU can be faster."""
    streams = [read_file(str(path)) for path in sorted((task.folder / "train").rglob("*.jpg"))]
    decode = bare_decoder()
    with ThreadPoolExecutor(task.workers) as pool:
        while True:
            for at in range(0, len(streams), BATCH):
                yield sum(pool.map(decode, streams[at : at + BATCH]))


def bare_decoder() -> Callable[[torch.Tensor], int]:
    """Return simplejpeg's decoder, the thinnest wrapper around libjpeg-turbo, if it is installed."""
    if importlib.util.find_spec("simplejpeg"):
        from simplejpeg import decode_jpeg as decode_with_simplejpeg

        return lambda stream: len(decode_with_simplejpeg(stream.numpy(), "RGB")) > 0
    return lambda stream: len(decode_jpeg(stream, ImageReadMode.RGB)) > 0


class Contestant(NamedTuple):
    deliver: Callable[[Task], Delivery]
    needs: str = ""
    """Package that may be missing."""
    whole_epochs: bool = False
    """True where each delivery is an epoch, because its beginning differs from the rest."""


CONTESTANTS = {
    OURS: Contestant(_sluice),
    PLAIN: Contestant(_plain_dali),
    "torchvision, PIL": Contestant(_torchvision_pil),
    "torchvision, decode_jpeg": Contestant(_torchvision_decode_jpeg),
    "webdataset": Contestant(_webdataset, "webdataset"),
    SPDL: Contestant(_spdl, "spdl"),
    "FFCV": Contestant(_ffcv, "ffcv"),
    LIMIT: Contestant(_decode_only),
}


def crop(task: Task) -> v2.Transform:
    """Make torchvision's random resized crop, with the shares of ours."""
    return v2.RandomResizedCrop(task.size_px, _AREA, _RATIO, antialias=True)


def copy_sample(cfg: DataConfig, folder: Path, count: int) -> None:
    """Copy `count` JPEGs of the training data, evenly spread: as class folders and as tar shards. Raises `UserError`."""
    catalog = open_catalog(cfg, "train")
    streams = [(row, stream) for row in catalog.spread(count) if (stream := catalog.read(row)).startswith(b"\xff\xd8")]
    require(
        len(streams) >= BATCH,
        f"data.path: {cfg.path} has {len(streams)} JPEGs for training; give a dataset with {BATCH} or more",
    )
    folder.mkdir(exist_ok=True)
    np.random.default_rng(0).shuffle(streams)
    with ExitStack() as stack:
        shards = [stack.enter_context(tarfile.open(folder / f"shard-{n:02}.tar", "w")) for n in range(_SHARDS)]
        for number, (row, stream) in enumerate(streams):
            label = int(catalog.labels[row])
            path = folder / f"train/{label:05}/{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stream)
            for name, data in ((f"{number:06}.jpg", stream), (f"{number:06}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shards[number % _SHARDS].addfile(member, io.BytesIO(data))
