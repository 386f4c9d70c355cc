"""Our loader beside others, and beside bare decoding as the limit: python -m data_pipeline.bench [--data.path FOLDER]

All read the same sample of the data, copied to a temporary folder, with the same crop and flip to uint8 images, by as
many threads or processes as there are processors. Each lives in a process of its own. They take turns, round after
round, and whoever is not at its turn is stopped, with its children: no loader works ahead on another's time, and a
machine that slows down slows them all. What a loader burns is the CPU time of its process and its children.
"""

import importlib.util
import io
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, read_file  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from data_pipeline import graph
from data_pipeline.arguments import CHOOSING, command_line, parse
from data_pipeline.catalog import open_catalog
from data_pipeline.command import run_command
from data_pipeline.config import AugmentConfig, DataConfig, require
from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from data_pipeline.loader import Cursor, Loader

SIZES_PX = "224,128,64"
SAMPLE, BATCH = 4096, 64  # images copied; images a batch
ROUNDS, TURN = 9, 640  # turns of each; images a turn
OURS, PLAIN, LIMIT = "sluice", "sluice, plain DALI", "decode only"
_SHARDS = 16
_AUGMENT = AugmentConfig()
# Imported once by the process that the contestants are forked from, not by each of them.
_PRELOADED = ["pandas", "torchvision.transforms.v2", "data_pipeline.arguments", "data_pipeline.loader"]
_READY_S, _END_S = 300, 10  # longest time that a loader may take for its first batch, and to end


class Task(NamedTuple):
    """What every contestant is given."""

    folder: Path
    """train/CLASS/NUMBER.jpg, and the same images in the shard-NUMBER.tar files."""
    size_px: int
    workers: int


Delivery = Iterator[int]
"""Without end: the number of images in each batch that a loader delivers."""


def _sluice(task: Task) -> Delivery:
    cfg = DataConfig(path=str(task.folder), batch=BATCH, size_px=task.size_px, augment=_AUGMENT)
    loader = Loader(open_catalog(cfg, "train"), cfg, _Here(task.workers), training=True, epochs=1 << 30)
    for epoch in range(1 << 30):
        loader.seek(Cursor(epoch))
        for batch in loader:
            yield batch.valid


def _plain_dali(task: Task) -> Delivery:
    graph.cpu_kernel = lambda: None  # type: ignore[assignment] # in a process that does nothing else
    return _sluice(task)


def _torchvision_pil(task: Task) -> Delivery:
    transform = v2.Compose([_crop(task), v2.RandomHorizontalFlip(_AUGMENT.flip), v2.PILToTensor()])
    return _torch_loader(ImageFolder(task.folder / "train", transform), task)


def _torchvision_decode_jpeg(task: Task) -> Delivery:
    transform = v2.Compose([_crop(task), v2.RandomHorizontalFlip(_AUGMENT.flip)])
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

    transform = v2.Compose([_crop(task), v2.RandomHorizontalFlip(_AUGMENT.flip), v2.PILToTensor()])
    shards = sorted(str(path) for path in task.folder.glob("*.tar"))
    dataset = WebDataset(shards, resampled=True, shardshuffle=False).shuffle(256).decode("pil").to_tuple("jpg", "cls")
    batches = WebLoader(dataset.map_tuple(transform, int).batched(BATCH), batch_size=None, num_workers=task.workers)
    for images, _ in batches:
        yield len(images)


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
            "image": [crop, RandomHorizontalFlip(_AUGMENT.flip), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    while True:
        for images, _ in loader:
            yield len(images)


def _decode_only(task: Task) -> Delivery:
    """Whole images from memory, thrown away. Nothing that decodes on a CPU can be faster than this."""
    streams = [read_file(str(path)) for path in sorted((task.folder / "train").rglob("*.jpg"))]
    decode = _bare_decoder()
    with ThreadPoolExecutor(task.workers) as pool:
        while True:
            for at in range(0, len(streams), BATCH):
                yield sum(pool.map(decode, streams[at : at + BATCH]))


def _bare_decoder() -> Callable[[torch.Tensor], int]:
    """simplejpeg, the thinnest shell around libjpeg-turbo, where it is installed."""
    if importlib.util.find_spec("simplejpeg"):
        from simplejpeg import decode_jpeg as decode_with_simplejpeg

        return lambda stream: len(decode_with_simplejpeg(stream.numpy(), "RGB")) > 0
    return lambda stream: len(decode_jpeg(stream, ImageReadMode.RGB)) > 0


class Contestant(NamedTuple):
    deliver: Callable[[Task], Delivery]
    needs: str = ""
    """A package that may be missing."""


CONTESTANTS = {
    OURS: Contestant(_sluice),
    PLAIN: Contestant(_plain_dali),
    "torchvision, PIL": Contestant(_torchvision_pil),
    "torchvision, decode_jpeg": Contestant(_torchvision_decode_jpeg),
    "webdataset": Contestant(_webdataset, "webdataset"),
    "FFCV": Contestant(_ffcv, "ffcv"),
    LIMIT: Contestant(_decode_only),
}

_AREA = (_AUGMENT.min_area, _AUGMENT.max_area)
_RATIO = (1 / _AUGMENT.max_ratio, _AUGMENT.max_ratio)


def _crop(task: Task) -> v2.Transform:
    return v2.RandomResizedCrop(task.size_px, _AREA, _RATIO, antialias=True)


class _Here(NamedTuple):
    """The place of a loader in a single process without a GPU."""

    cores: int
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


# ---- processes that take turns --------------------------------------------------------------------------------------


class Turn(NamedTuple):
    images: int
    wall_s: float
    cpu_s: float


class Runner:
    """A contestant in a process group of its own, stopped but for its turns."""

    def __init__(self, name: str, task: Task) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.name = name
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, task, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        self._orders.close()  # which lets it end in order
        self._process.join(_END_S)
        self._signal(signal.SIGKILL)
        self._process.kill()  # should it not lead its group yet
        self._process.join()

    def wait_until_ready(self) -> None:
        """Until the first batch is there. Raises `UserError` with the reason why there is none."""
        failure = self._answer(_READY_S)
        if failure:
            raise UserError(f"{self.name}: {failure}")
        self._signal(signal.SIGSTOP)

    def turn(self, images: int) -> Turn:
        """Let it deliver `images` or a few more. Raises `UserError` if it fails."""
        before = self._cpu_s()
        self._signal(signal.SIGCONT)
        self._orders.send(images)
        answer = self._answer(None)
        self._signal(signal.SIGSTOP)
        if isinstance(answer, str):
            raise UserError(f"{self.name}: {answer}")
        delivered, wall_s = answer
        return Turn(delivered, wall_s, self._cpu_s() - before)

    def _answer(self, timeout_s: float | None) -> Any:
        with suppress(EOFError):
            return self._orders.recv() if self._orders.poll(timeout_s) else f"no batch within {timeout_s} s"
        self._process.join()
        return f"its process ended with exit code {self._process.exitcode}"

    def _cpu_s(self) -> float:
        return sum(_cpu_s(pid) for pid in _family(self._process.pid or 0))

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, number)


def _serve(name: str, task: Task, orders: Connection) -> None:
    """Deliver images when told to; the answer to an order is (images, seconds), or why there are none."""
    # With a group of its own it can be stopped whole; and the kernel ends a stopped group whose parent is gone.
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError):
        try:
            delivery = CONTESTANTS[name].deliver(task)
            next(delivery)
            orders.send(None)
            while True:
                wanted, start, seen = orders.recv(), time.perf_counter(), 0
                while seen < wanted:
                    seen += next(delivery)
                orders.send((seen, time.perf_counter() - start))
        except EOFError:
            raise
        except Exception as error:  # whatever another's library raises is no reason to stop the others
            orders.send(" ".join(f"{type(error).__name__}: {error}".split()))


def _family(pid: int) -> Iterator[int]:
    """The process and all below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from _family(int(child))


def _cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, those that ended included."""
    with suppress(OSError):
        return time.clock_gettime(~pid << 3 | 2)  # its clock's number, as clock_getcpuclockid(3) makes it on Linux
    return 0.0


# ---- the measurement ------------------------------------------------------------------------------------------------


def measure(
    cfg: DataConfig, sizes_px: list[int], *, rounds: int = ROUNDS, images: int = TURN, sample: int = SAMPLE
) -> pd.DataFrame:
    """One row a turn: size_px, loader, round, images, wall_s, cpu_s, images_per_s, cpu_ms an image. Raises `UserError`."""
    rows: list[tuple[object, ...]] = []
    names = _installed()
    with TemporaryDirectory(prefix="sluice-bench-") as folder:
        copy_sample(cfg, Path(folder), sample)
        for size_px in sizes_px:
            task = Task(Path(folder), size_px, len(os.sched_getaffinity(0)))
            with ExitStack() as stack:
                runners = _start(names, task, stack)
                for number in range(-1, rounds):  # the first does not count: it lives on what was made before
                    rows += [(size_px, runner.name, number, *runner.turn(images)) for runner in runners]
    turns = pd.DataFrame(rows, columns=["size_px", "loader", "round", *Turn._fields])
    turns["images_per_s"] = turns.images / turns.wall_s
    turns["cpu_ms"] = 1e3 * turns.cpu_s / turns.images
    return turns[turns["round"] >= 0]


def _installed() -> list[str]:
    """The contestants; one whose package is missing is named and left out."""
    missing = {name: needs for name, (_, needs) in CONTESTANTS.items() if needs and not importlib.util.find_spec(needs)}
    for name, needs in missing.items():
        print(f"{name} is left out: {needs} is not installed", file=sys.stderr)
    return [name for name in CONTESTANTS if name not in missing]


def _start(names: list[str], task: Task, stack: ExitStack) -> list[Runner]:
    """Those that deliver; each that does not is named, with the reason."""
    ready = []
    for runner in [stack.enter_context(Runner(name, task)) for name in names]:
        try:
            runner.wait_until_ready()
            ready.append(runner)
        except UserError as error:
            if runner.name == OURS:
                raise
            print(f"left out: {error}", file=sys.stderr)
    return ready


def copy_sample(cfg: DataConfig, folder: Path, count: int) -> None:
    """Copy `count` JPEGs of the training data, evenly spread: as class folders and as tar shards. Raises `UserError`."""
    catalog = open_catalog(cfg, "train")
    picked = np.unique(np.linspace(0, len(catalog) - 1, min(count, len(catalog))).astype(int)).tolist()
    streams = [(row, stream) for row in picked if (stream := catalog.read(row)).startswith(b"\xff\xd8")]
    require(
        len(streams) >= BATCH,
        f"data.path: {cfg.path} has {len(streams)} JPEGs for training; give a dataset with {BATCH} or more",
    )
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


# ---- the report -----------------------------------------------------------------------------------------------------


def summary(turns: pd.DataFrame) -> pd.DataFrame:
    """One row for each size and loader: medians and ranges, and its CPU time over ours, round by round."""
    ours = turns[turns.loader == OURS].set_index(["size_px", "round"]).cpu_ms.rename("ours")
    turns = turns.join(ours, on=["size_px", "round"])
    turns["ratio"] = turns.cpu_ms / turns.ours
    groups = turns.groupby(["size_px", "loader"], sort=False)
    return pd.DataFrame(
        {
            f"{column}_{name}": groups[column].agg(how)
            for column in ("images_per_s", "cpu_ms", "ratio")
            for name, how in (("median", "median"), ("min", "min"), ("max", "max"))
        }
    ).reset_index()


def table(summed: pd.DataFrame) -> str:
    """The summary for people."""

    def cells(column: str, digits: int) -> list[str]:
        values = zip(*(summed[f"{column}_{name}"] for name in ("median", "min", "max")), strict=True)
        return [f"{middle:.{digits}f}  ({low:.{digits}f} to {high:.{digits}f})" for middle, low, high in values]

    return pd.DataFrame(
        {
            "size": summed.size_px,
            "loader": summed.loader,
            "images/s": cells("images_per_s", 0),
            "CPU ms/image": cells("cpu_ms", 3),
            "CPU over ours": cells("ratio", 2),
        }
    ).to_string(index=False)


def plot(summed: pd.DataFrame) -> bytes:
    """The summary as a PNG: bars for each size, whiskers from the least to the most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    sizes = summed.size_px.unique()
    loaders = summed.loader.unique()
    for axes, column, label in zip(
        figure.subplots(1, 2), ("images_per_s", "cpu_ms"), ("images/s", "CPU ms per image"), strict=True
    ):
        for number, loader in enumerate(loaders):
            rows = summed[summed.loader == loader]
            middle = rows[f"{column}_median"]
            whiskers = [middle - rows[f"{column}_min"], rows[f"{column}_max"] - middle]
            places = [list(sizes).index(size) + 0.85 * ((number + 0.5) / len(loaders) - 0.5) for size in rows.size_px]
            axes.bar(places, middle, 0.8 / len(loaders), yerr=whiskers, label=loader, error_kw={"elinewidth": 0.8})
        axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
        axes.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=4)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def write(turns: pd.DataFrame, out: Path) -> None:
    """bench.csv, one line a turn, and bench.png where matplotlib is installed."""
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "bench.csv", turns.to_csv(index=False).encode())
    if importlib.util.find_spec("matplotlib"):
        replace_file(out / "bench.png", plot(summary(turns)))
    else:
        print("bench.png is left out: matplotlib is not installed", file=sys.stderr)


def sizes_of(text: str) -> list[int]:
    """Sides in pixels from "224,128,64". Raises `UserError`."""
    parts = text.split(",")
    require(
        all(part.isdecimal() and 8 <= int(part) <= 4096 for part in parts) and len(set(parts)) == len(parts),
        f"--sizes: {text} does not fit; give different sides of 8 to 4096 pixels, as {SIZES_PX}",
    )
    return [int(part) for part in parts]


def main() -> None:
    parser = command_line("python -m data_pipeline.bench", "Compare data loaders on this machine.", ("path", *CHOOSING))
    parser.add_argument("--sizes", default=SIZES_PX, help="Sides of the images in pixels, with commas between.")
    parser.add_argument("--out", help="A folder for bench.csv and bench.png; nothing is written if not given.")
    args = parse(parser, sys.argv[1:])
    sizes_px, out = sizes_of(args.sizes), Path(args.out) if args.out else None
    if out:
        for name in ("bench.csv", "bench.png"):
            require(not (out / name).exists(), f"--out: {out / name} exists; give another folder")
    turns = measure(DataConfig(**args.data), sizes_px)
    print(table(summary(turns)))
    print(f"medians and ranges of {ROUNDS} rounds of {TURN} images, {len(os.sched_getaffinity(0))} processors")
    if out:
        write(turns, out)


if __name__ == "__main__":
    run_command(main)
