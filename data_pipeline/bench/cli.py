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
import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Self

import pandas as pd
import torch

from data_pipeline.bench.budget import MINUTES, reported, rounds_within
from data_pipeline.bench.object_store import REMOTE, serving_in_background
from data_pipeline.bench.peers import CONTESTANTS, OURS, Contestant, Task, copy_sample
from data_pipeline.bench.sources import SOURCES, write_sources
from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig

SAMPLE, ROUNDS, TURN = 4096, 9, 640  # images copied; turns of each; images in a turn
# Imported once by the process that the contestants are forked from, not by each of them.
_PRELOADED = ["pandas", "data_pipeline.common.cli", "data_pipeline.bench.peers"]
_READY_S, _END_S = 300, 10  # longest time that a loader may take for its first batch, and to end


# ---- processes that take turns --------------------------------------------------------------------------------------


class Turn(NamedTuple):
    images: int
    wall_s: float
    cpu_s: float


class Runner:
    """A contestant in a process group of its own, stopped outside its turns."""

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
        self._orders.close()  # so that it ends by itself
        self._process.join(_END_S)
        self._signal(signal.SIGKILL)
        self._process.kill()  # in case it does not lead its group yet
        self._process.join()

    def wait_until_ready(self) -> None:
        """Wait until the first batch is there. Raises `UserError` with the reason if there is none."""
        failure = self._answer(_READY_S)
        if failure:
            raise UserError(f"{self.name}: {failure}")
        self._signal(signal.SIGSTOP)

    def turn(self, images: int) -> Turn:
        """Let it deliver `images` or a few more. Raises `UserError` if it fails."""
        before = self._cpu_s()
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # its process is gone; the answer says how
            self._orders.send(images)
        answer = self._answer(None)
        self._signal(signal.SIGSTOP)
        if isinstance(answer, str):
            raise UserError(f"{self.name}: {answer}")
        delivered, wall_s = answer
        return Turn(delivered, wall_s, self._cpu_s() - before)

    def _answer(self, timeout_s: float | None) -> Any:
        with suppress(EOFError, ConnectionResetError):
            return self._orders.recv() if self._orders.poll(timeout_s) else f"no batch within {timeout_s} s"
        self._process.join()
        return f"its process ended with exit code {self._process.exitcode}"

    def _cpu_s(self) -> float:
        return sum(_cpu_s(pid) for pid in _family(self._process.pid or 0))

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, number)


def _serve(name: str, task: Task, orders: Connection) -> None:
    """Deliver images when asked; an answer is (images, seconds), or an error message."""
    # As a group of its own it can be stopped as a whole; and the kernel ends a stopped group whose parent is gone.
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError):
        try:
            delivery = (CONTESTANTS | SOURCES)[name].deliver(task)
            next(delivery)  # now, so that no start-up falls into a turn
            orders.send(None)
            while True:
                wanted, start, seen = orders.recv(), time.perf_counter(), 0
                while seen < wanted:
                    seen += next(delivery)
                orders.send((seen, time.perf_counter() - start))
        except EOFError:
            raise
        except Exception as error:  # an error in another library must not stop the other contestants
            orders.send(" ".join(f"{type(error).__name__}: {error}".split()))


def _family(pid: int) -> Iterator[int]:
    """Yield the process and all its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from _family(int(child))


def _cpu_s(pid: int) -> float:
    """CPU time of all threads of a process and of the children that it has waited for, ended ones included."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children_s = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")  # cutime and cstime of proc(5)
        # The number of a process's clock, computed as clock_getcpuclockid(3) does on Linux.
        return time.clock_gettime(~pid << 3 | 2) + children_s
    return 0.0


# ---- the measurement ------------------------------------------------------------------------------------------------


Row = tuple[object, ...]
"""size_px, loader, round and the fields of `Turn`."""


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


def turns_of(rows: list[Row]) -> pd.DataFrame:
    """Make a table of the rows, with images_per_s and cpu_ms for each image."""
    turns = pd.DataFrame(rows, columns=["size_px", "loader", "round", *Turn._fields])
    turns["images_per_s"] = turns.images / turns.wall_s
    turns["cpu_ms"] = 1e3 * turns.cpu_s / turns.images
    return turns


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


# ---- the report -----------------------------------------------------------------------------------------------------


def summary(turns: pd.DataFrame) -> pd.DataFrame:
    """Make a row for each size and loader: medians and ranges, and its CPU time over the first one's, round by round."""
    ours = turns[turns.loader == turns.loader.iloc[0]].set_index(["size_px", "round"]).cpu_ms.rename("ours")
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
    """Format the summary for people."""

    def cells(column: str, digits: int) -> list[str]:
        values = zip(*(summed[f"{column}_{name}"] for name in ("median", "min", "max")), strict=True)
        return [f"{middle:.{digits}f}  ({low:.{digits}f} to {high:.{digits}f})" for middle, low, high in values]

    return pd.DataFrame(
        {
            "size": summed.size_px,
            "loader": summed.loader,
            "images/s": cells("images_per_s", 0),
            "CPU ms/image": cells("cpu_ms", 3),
            f"CPU over {'ours' if summed.loader[0] == OURS else summed.loader[0]}": cells("ratio", 2),
        }
    ).to_string(index=False)


def plot(summed: pd.DataFrame) -> bytes:
    """Plot the summary as a PNG: bars for each size, whiskers from the least to the most."""
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
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def write(turns: pd.DataFrame, out: Path) -> None:
    """Write bench.csv, one line for each turn, and bench.png."""
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "bench.csv", turns.to_csv(index=False).encode())
    replace_file(out / "bench.png", plot(summary(turns)))


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
