"""python -m tests.stress.stalls: how long training stands still for a checkpoint, and how long for a place to go on from.

ResNet-50 for 1,000 classes with momentum and an average of its weights is trained by the engine on one batch of 64 px, in
turns without and with a checkpoint being written beside. A checkpoint costs the training the check of the weights and their
copy, which it waits for, and by how much the updates during the writing are longer than the median of those before. One
processor is left to the writing thread, as it is where a GPU trains.

A place in the order is sought in a training set of ImageNet's size, up to the first batch from there: the order of its
epoch is drawn, and DALI's pipeline is built. Exits with 1 where the stall is above 1 % of 30 s, or a seek takes longer than
a second.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.common.cli import parse_plain
from data_pipeline.common.entry_point import run_command
from data_pipeline.loader import Batch, Cursor, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from trainer.checkpoint.async_writer import Saver
from trainer.checkpoint.manifest import Stamp
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store
from trainer.config import Config, load
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.base import Engine
from trainer.resilience.sanity_checks import find_nonfinite
from trainer.setup.parts import build_engine

INTERVAL_S, SHARE = 30.0, 0.01
SAVES, QUIET = 5, 10
SEEKS, EPOCHS, IMAGES = 8, 90, 1_281_167
CLASSES, BATCH = 1000, 4
OPTIONS = ["--model.name=resnet50", f"--data.batch={BATCH}", "--data.size_px=64", "--optim.ema_decay=0.999"]


class Save(NamedTuple):
    copy_s: float
    """Of the check and the copy, which training waits for: perf/ckpt_save_s."""
    write_s: float
    """From then on until the checkpoint is complete: perf/ckpt_write_s."""
    busy_s: float
    """Processor time of the thread that packs, hashes and writes."""
    updates: int
    """While it was written."""
    update_s: float
    """Median of the updates before."""
    longer_s: float
    """Sum of what the updates during the writing took beyond that."""

    @property
    def stall_s(self) -> float:
        return self.copy_s + self.longer_s


def timed_updates(engine: Engine, batch: Batch, saver: Saver | None = None) -> list[float]:
    """Seconds of each of some updates, or of those until `saver` is done."""
    seconds: list[float] = []
    while len(seconds) < QUIET if saver is None else not _written(saver):
        start = time.perf_counter()
        engine.step([batch], lr=0.01)
        seconds.append(time.perf_counter() - start)
    return seconds


def _written(saver: Saver) -> bool:
    assert saver._save is not None
    return saver._save.done()


def timed_save(engine: Engine, batch: Batch, saver: Saver, ctx: DistContext, step: int) -> Save:
    """A checkpoint beside the training, as `Session.save` has it."""
    update_s = median(timed_updates(engine, batch))
    busy: list[float] = []

    start = time.perf_counter()
    find_nonfinite(engine.module, ctx)
    write = engine.capture_state({})

    def write_timed(folder: Path) -> dict[str, Stamp]:
        begin = time.thread_time()
        stamps = write(folder)
        busy.append(time.thread_time() - begin)
        return stamps

    saver.start(Progress(step), write_timed, best=False)
    copy_s = time.perf_counter() - start
    during = timed_updates(engine, batch, saver)
    failure = saver.wait()
    if failure:
        raise failure
    write_s = saver.take_scalars()["perf/ckpt_write_s"]
    return Save(copy_s, write_s, busy[0], len(during), update_s, sum(during) - len(during) * update_s)


def timed_saves(cfg: Config, ctx: DistContext) -> list[Save]:
    torch.set_num_threads(max(ctx.cores - 1, 1))
    engine = build_engine(cfg, CLASSES, ctx)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 64, 64, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    batch = Batch(images.to(ctx.device), labels.to(ctx.device), torch.arange(BATCH), BATCH, BATCH)
    timed_updates(engine, batch)
    engine.capture_state({})  # as `Session` does before it trains
    with tempfile.TemporaryDirectory(prefix="sluice-stalls-") as run:
        saver = Saver(Store(Path(run)), ctx, Progress(), print)
        return [timed_save(engine, batch, saver, ctx, step) for step in range(1, SAVES + 1)]


def large_catalog(cfg: Config) -> Catalog:
    """As many samples as ImageNet has, which are the built-in images again and again."""
    catalog = open_catalog(cfg.data, "train")
    return catalog.part([row % len(catalog) for row in range(IMAGES)])


def timed_seeks(cfg: Config, ctx: DistContext) -> list[tuple[float, float]]:
    """Seconds, and seconds of processor time, from `seek` to the first batch from there."""
    draw = random.Random(0)
    loader = Loader(replace(cfg.data, batch=64), large_catalog(cfg), ctx, training=True, epochs=EPOCHS)
    seconds = []
    for _ in range(SEEKS):
        cursor = Cursor(draw.randrange(EPOCHS), 64 * draw.randrange(IMAGES // 64))
        start, busy = time.perf_counter(), time.process_time()
        loader.seek(cursor)
        next(iter(loader))
        seconds.append((time.perf_counter() - start, time.process_time() - busy))
    return seconds


def table_of(saves: list[Save]) -> Table:
    columns = ("save", "copy ms", "written in s", "of it busy s", "updates", "update ms", "longer by ms", "stall ms")
    table = Table(*columns, "of 30 s", box=None, pad_edge=False)
    for number, save in enumerate(saves, start=1):
        figures = (1e3 * save.copy_s, save.write_s, save.busy_s, save.updates, 1e3 * save.update_s)
        stall = (1e3 * save.longer_s, 1e3 * save.stall_s, 100 * save.stall_s / INTERVAL_S)
        table.add_row(str(number), *(f"{figure:.3g}" for figure in figures), *(f"{figure:.3g}" for figure in stall))
    for column in table.columns:
        column.justify = "right"
    return table


def spread(seconds: list[float]) -> str:
    """Median and range in ms."""
    low, middle, high = (1e3 * value for value in (min(seconds), median(seconds), max(seconds)))
    return f"{middle:.0f} ms ({low:.0f} to {high:.0f})"


def main() -> None:
    parse_plain(argparse.ArgumentParser(prog="python -m tests.stress.stalls", exit_on_error=False), sys.argv[1:])
    cfg = load(OPTIONS)
    with open_dist_context() as ctx:
        saves, seeks = timed_saves(cfg, ctx), timed_seeks(cfg, ctx)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table_of(saves))
    stall_s = median(save.stall_s for save in saves)
    print(f"copy {spread([save.copy_s for save in saves])}, stall {spread([save.stall_s for save in saves])}")
    print(f"that is {stall_s / INTERVAL_S:.2%} of {INTERVAL_S:.0f} s")
    print(f"seek {spread([wall for wall, _ in seeks])}, processor time {spread([busy for _, busy in seeks])}")
    sys.exit(int(stall_s > SHARE * INTERVAL_S or median(wall for wall, _ in seeks) > 1))


if __name__ == "__main__":
    run_command(main)
