"""Compare our loader with others, and with bare decoding as the limit: python -m data_pipeline.bench [--data.path FOLDER]

All read the same sample of the data, copied to a temporary folder, with the same crop and flip to uint8 images, and use
as many threads or processes as there are processors. Each runs in a process of its own. They take turns, round after
round; outside its turn a loader is stopped, with its children. So no loader works ahead in another's time, and a
machine that slows down slows them all. A loader's CPU time is that of its process and its children. There are as many
rounds as fit into --minutes. If the benchmark is broken off, it reports and keeps its measurements so far.
With --sources the contestants are our own loader, on the same images in each layout, and behind two S3 servers on loopback,
one of them as slow as a distant one, where others' loaders read the same images. A turn of a cold one is an epoch from the
making of the loader and an empty cache on; a turn of reading blocks alone is an epoch too.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipeline.bench.budget import MINUTES, reported, rounds_within
from data_pipeline.bench.object_store import REMOTE, serving_in_background
from data_pipeline.bench.peers import CONTESTANTS, Contestant, Task, copy_sample
from data_pipeline.bench.results import Row, summary, table, turns_of, write
from data_pipeline.bench.runner import Runner, Turn
from data_pipeline.bench.sources import SOURCES, write_sources
from data_pipeline.common.errors import UserError
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig

SAMPLE, ROUNDS, TURN = 4096, 9, 640  # images copied; turns of each; images in a turn


def measure(
    cfg: DataConfig,
    sizes_px: list[int],
    into: list[Row],
    *,
    rounds: int = ROUNDS,
    minutes: float = MINUTES,
    images: int = TURN,
    sample: int = SAMPLE,
    sources: bool = False,
) -> None:
    """Measure the contestants, or with `sources` our own in all layouts; append a row for each turn. Raises `UserError`."""
    deadline_s = time.monotonic() + 60 * minutes
    with progress("preparing"), TemporaryDirectory(prefix="sluice-bench-") as folder, ExitStack() as prepared:
        copy_sample(cfg, Path(folder, "folders") if sources else Path(folder), sample)
        stores = {}
        if sources:
            write_sources(Path(folder))
            stores = {
                server.name: prepared.enter_context(serving_in_background(Path(folder), server)) for server in REMOTE
            }
        contestants = SOURCES if sources else CONTESTANTS
        names = _installed(contestants)
        # Sizes share the time evenly; within a size the contestants take turns.
        for place, size_px in enumerate(sizes_px):
            now_s = time.monotonic()
            end_s = now_s + (deadline_s - now_s) / (
                len(sizes_px) - place
            )  # time that one size leaves is for the others
            task = Task(Path(folder), size_px, len(os.sched_getaffinity(0)), stores)
            turns = {name: 1 if contestants[name].whole_epochs else images for name in names}
            with ExitStack() as stack:
                runners = _start(names, task, stack)
                for _ in _take_turns(runners, turns):
                    pass  # not counted: it uses what was made before
                advance = stack.enter_context(progress(f"{size_px} px", rounds * len(runners), unit="turns"))
                for number in rounds_within(rounds, end_s):
                    for name, turn in _take_turns(runners, turns):
                        into.append((size_px, name, number, *turn))
                        advance(1)


def _take_turns(runners: list[Runner], images: Mapping[str, int]) -> Iterator[tuple[str, Turn]]:
    """Let each deliver its `images`; one that fails is printed with the reason, and taken from `runners`.

    Raises `UserError` where it is the first, with which the others are compared.
    """
    first = runners[0]
    for runner in [*runners]:
        try:
            turn = runner.turn(images[runner.name])
        except UserError as error:
            if runner is first:
                raise
            print(f"left out from here on: {error}", file=sys.stderr)
            runners.remove(runner)
        else:
            yield runner.name, turn


def _installed(contestants: Mapping[str, Contestant]) -> list[str]:
    """Names of the contestants; one whose package is missing is printed and left out."""
    needed = {name: contestant.needs for name, contestant in contestants.items() if contestant.needs}
    missing = {name: needs for name, needs in needed.items() if not importlib.util.find_spec(needs)}
    for name, needs in missing.items():
        print(f"{name} is left out: {needs} is not installed", file=sys.stderr)
    return [name for name in contestants if name not in missing]


def _start(names: list[str], task: Task, stack: ExitStack) -> list[Runner]:
    """Start the contestants; one that does not deliver is printed with the reason and left out."""
    ready = []
    for runner in [stack.enter_context(Runner(name, task)) for name in names]:
        try:
            runner.wait_until_ready()
            ready.append(runner)
        except UserError as error:
            if runner.name == names[0]:  # the others are compared with it
                raise
            print(f"left out: {error}", file=sys.stderr)
    return ready


def bench(cfg: DataConfig, sizes_px: list[int], out: Path | None, minutes: float, *, sources: bool = False) -> None:
    """Measure, print, and write to the folder `out` if given. Raises `UserError`."""
    rows: list[Row] = []
    with reported(lambda why: report(rows, out, why)):
        measure(cfg, sizes_px, rows, minutes=minutes, sources=sources)


def report(rows: list[Row], out: Path | None, why: str) -> None:
    """Write and print the measurements; `why` says why they were broken off."""
    if not rows:
        return
    turns = turns_of(rows)
    if out:  # written first: perhaps nobody reads what is printed
        write(turns, out)
    counts = turns.groupby(["size_px", "loader"])["round"].count()
    most, processors = counts.max(), len(os.sched_getaffinity(0))
    spread = f"{counts.min()} to {most}" if counts.min() < most else f"{most}"
    short = f"; {ROUNDS} did not fit: give more --minutes" if counts.min() < ROUNDS and not why else ""
    print(table(summary(turns)))
    print(f"medians and ranges of {spread} rounds of {TURN} images, {processors} processors{short}")
    print(why, end="\n" * bool(why), flush=True)
