"""python -m tests.stress.chaos [--kills 100] [--seed 0] [--out DIR]: kill training runs again and again, and see what they lost.

A run of some dozen updates is trained undisturbed. Then others of the same options are killed at random moments, in four ways
by turns, and started anew by the same command until they are finished. Two series have so many kills each:

same ranks    the last checkpoint must have the bytes of the undisturbed run's
other ranks   each start has one to three ranks and reads from class folders or from a pack: order, crops and draws must be
              the undisturbed run's, and no image of an epoch may be read twice or left out

A start is what torchrun does, an agent and a process for each rank, but forked from this process, which
has imported what they need: it takes one or two seconds and not eight. Exits with 1 where anything was lost.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from rich.console import Console
from rich.table import Table
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.launcher.api import elastic_launch

from data_pipeline.common.cli import parse_plain
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import require
from data_pipeline.config import DataConfig
from data_pipeline.dali import graph
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources.builtin import builtin_dataset
from tests.support.elastic import this_machine
from tests.support.recorded import (
    EPOCHS,
    faults_of_losses,
    faults_of_order,
    faults_of_weights,
    records,
    starts,
    train_recorded,
)
from tests.support.runs import QUICK, descendants, dotted, state_of
from trainer.checkpoint.store import PARTIAL, Store

PER_CLASS = {"train": 25, "val": 6}  # of the built-in images
BATCH = 24  # the last update of an epoch is not full
RANKS, LAYOUTS = 2, ("folders", "pack")
KINDS = ("one rank", "all ranks", "while saving", "asked to stop")
PHASES = ("start-up", "training", "evaluation", "saving")
KILLS_A_RUN = 8
START_UP = 0.2  # share of the kills before the first update, but for those while saving
PATIENCE_S = 600.0  # for a run to come to its next updates, or to its end

OPTIONS = QUICK | {
    "data.size_px": "32",
    "data.batch": str(BATCH),
    "data.augment.rotate_deg": "10",
    "data.augment.policy": "trivialaugment",
    "data.augment.mixup": "0.2",
    "run.epochs": str(EPOCHS),
    "run.save_every": "4",
}


class Start:
    """One start of a run: an agent and its ranks, which write down in `folder` what they read. To be opened by `with`."""

    def __init__(self, run: Path, ranks: int, data: Path) -> None:
        self.run, self.ranks, self.step = run, ranks, Store(run).progress().step
        self.folder = run.with_name(f"{run.name} starts") / f"{len(starts(run)):03d} {ranks}"
        self.folder.mkdir(parents=True)
        self.code: int | None = None
        self.agent = os.fork()
        if self.agent == 0:
            code = 1
            try:
                self._launch(dotted(OPTIONS | {"data.path": str(data), "run.dir": str(run)}))
                code = 0
            except BaseException:  # of a rank that was killed, too
                traceback.print_exc()
            finally:
                os._exit(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended:
            self.kill([self.agent, *descendants(self.agent)])

    def _launch(self, arguments: list[str]) -> None:
        with (self.folder / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        config = this_machine(self.ranks)
        config.start_method, config.logs_specs = "fork", DefaultLogsSpecs(log_dir=str(self.folder))
        elastic_launch(config, train_recorded)(self.folder, arguments)

    @property
    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.agent, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> int:
        """Exit code. Raises `TimeoutError`."""
        wait_until(lambda: self.ended, f"{self.folder} does not end")
        assert self.code is not None
        return self.code

    def updates(self) -> int:
        """That rank 0 has begun. Asked for all the time, so it reads no more than it must."""
        file = self.folder / "0.jsonl"
        text = file.read_bytes() if file.exists() else b""
        return text.count(b"\n") - text.count(b"[]\n")

    def phase(self) -> str:
        """Phase of the run, now or when it was killed."""
        read = records(self.folder / "0.jsonl")
        if not read:
            return "start-up"
        if saving(self.run):
            return "saving"
        return "training" if read[-1] else "evaluation"

    def kill(self, pids: list[int]) -> None:
        """SIGKILL; returns once none of them can write any more."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: all(state_of(pid) in "ZX" for pid in pids), f"{self.folder}: SIGKILL ends nothing")


def saving(run: Path) -> bool:
    """Return True where a checkpoint is begun and not completed."""
    return any((run / "checkpoints").glob(f"{PARTIAL}-*"))


def wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    """Raises `TimeoutError` with the words `otherwise` where it takes too long."""
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end_s:
            raise TimeoutError(otherwise)
        time.sleep(0.005)


# ---- killing -----------------------------------------------------------------------------------------------------------


class Kill(NamedTuple):
    kind: str
    phase: str
    """Phase of the run."""
    step: int
    """Updates of the run that were begun."""


def strike(start: Start, kind: str, draw: random.Random) -> Kill | None:
    """Kill a run some updates after its start; None where it is finished before."""
    updates = 0 if kind != "while saving" and draw.random() < START_UP else draw.randint(1, 12)
    wait_until(lambda: start.ended or start.updates() >= updates, f"{start.folder} hangs")
    if kind == "while saving":
        wait_until(lambda: start.ended or saving(start.run), f"{start.folder} does not save")
    time.sleep(draw.uniform(0, 0.3 if updates else 3))
    if start.ended:
        return None
    ranks = list(descendants(start.agent))
    if kind == "asked to stop":
        phase = start.phase()
        for pid in (start.agent, *ranks):  # as SLURM ends a job; the agent sends its ranks another
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    else:
        start.kill(draw.sample(ranks, 1) if kind == "one rank" and ranks else [start.agent, *ranks])
        phase = start.phase()
    return Kill(kind, phase, start.step + start.updates())


class Outcome(NamedTuple):
    """A run that was started until it was finished."""

    kills: list[Kill]
    starts: int
    faults: list[str]


def train_through(run: Path, data: Path, kills: int, draw: random.Random, *, elastic: bool) -> Outcome:
    """Train to the end through at most so many kills. `elastic`: each start has other ranks and another layout."""
    suffered: list[Kill] = []
    faults: list[str] = []
    kill: Kill | None = None
    while not faults:
        ranks, layout = (draw.randint(1, 3), draw.choice(LAYOUTS)) if elastic else (RANKS, LAYOUTS[0])
        try:
            with Start(run, ranks, data / layout) as start:
                kill = strike(start, KINDS[len(suffered) % len(KINDS)], draw) if len(suffered) < kills else None
                code = start.wait()
        except TimeoutError as hanging:
            faults.append(str(hanging))
            continue
        if kill:
            suffered.append(kill)
        elif code == 0 and Store(run).progress().finished:
            break
        else:
            faults.append(f"it ended with {code}, see {start.folder / 'log'}")
    return Outcome(suffered, len(starts(run)), faults)


# ---- the command -------------------------------------------------------------------------------------------------------


def lay_out(folder: Path) -> Path:
    """Some of the built-in images as class folders and as a pack of the same files, below `folder`."""
    for split, count in PER_CLASS.items():
        for name in (builtin_dataset() / split).iterdir():
            (folder / "folders" / split / name.name).mkdir(parents=True)
            for image in sorted(name.iterdir())[:count]:
                shutil.copy(image, folder / "folders" / split / name.name)
    pack(DataConfig(str(folder / "folders")), folder / "pack", PackConfig(), workers=1)
    return folder


def trained_series(out: Path, data: Path, whole: Path, kills: int, seed: int, *, elastic: bool) -> list[Outcome]:
    """Runs until they have suffered so many kills together, or one has lost something."""
    draw, outcomes, left = random.Random(seed), list[Outcome](), kills
    while left and not any(outcome.faults for outcome in outcomes):
        run = out / f"{'other' if elastic else 'same'} ranks {len(outcomes)}"
        outcome = train_through(run, data, min(left, KILLS_A_RUN), draw, elastic=elastic)
        if not outcome.faults:
            outcome.faults.extend(faults_of_order(run, whole))
            outcome.faults.extend([] if elastic else faults_of_losses(run, whole) + faults_of_weights(run, whole))
        for line in outcome.faults or [f"{len(outcome.kills)} kills, {outcome.starts} starts, as undisturbed"]:
            print(f"{run}: {line}", flush=True)
        if not outcome.faults:
            shutil.rmtree(run)
        outcomes.append(outcome)
        left -= len(outcome.kills)
    return outcomes


def table_of(series: dict[str, list[Outcome]]) -> Table:
    columns = ("", "kills", *PHASES, "at steps", "runs", "starts", "as undisturbed")
    table = Table(*columns, box=None, pad_edge=False)
    for name, outcomes in series.items():
        kills = [kill for outcome in outcomes for kill in outcome.kills]
        for kind in KINDS:
            table.add_row(f"  {kind}", *_cells([kill for kill in kills if kill.kind == kind]))
        whole = sum(not outcome.faults for outcome in outcomes)
        total = (len(outcomes), sum(outcome.starts for outcome in outcomes), f"{whole} of {len(outcomes)}")
        table.add_row(name, *_cells(kills), *map(str, total), end_section=True)
    return table


def _cells(kills: list[Kill]) -> list[str]:
    phases, steps = Counter(kill.phase for kill in kills), [kill.step for kill in kills]
    return [
        str(len(kills)),
        *(str(phases[phase]) for phase in PHASES),
        f"{min(steps)} to {max(steps)}" if steps else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100, help="Kills in each of the two series.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of their moments.")
    parser.add_argument("--out", type=Path, help="New folder for the runs, kept; a temporary one if not given.")
    args = parse_plain(parser, sys.argv[1:])
    require(args.kills > 0, f"--kills: {args.kills} is not positive; give a number such as 100")
    require(args.out is None or not args.out.exists(), f"--out: {args.out} exists; give a new folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started
    with tempfile.TemporaryDirectory(prefix="sluice-chaos-") as temporary:
        sys.exit(torment(args.out or Path(temporary), args.kills, args.seed))


def torment(out: Path, kills: int, seed: int) -> int:
    """Both series; prints the table. Exit code."""
    begin_s = time.monotonic()
    data, whole = lay_out(out / "data"), out / "undisturbed"
    graph.cpu_kernel()  # compiled or loaded once, for all that are forked
    undisturbed = train_through(whole, data, 0, random.Random(seed), elastic=False)
    faults = undisturbed.faults or faults_of_order(whole, whole)
    if faults:
        print(f"{whole}, which nobody killed:", *faults, sep="\n")
        return 1
    series = {
        f"{RANKS} ranks": trained_series(out, data, whole, kills, seed, elastic=False),
        "1 to 3 ranks": trained_series(out, data, whole, kills, seed, elastic=True),
    }
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table_of(series))
    print(f"seed {seed}, {(time.monotonic() - begin_s) / 60:.1f} min")
    return int(any(outcome.faults for outcomes in series.values() for outcome in outcomes))


if __name__ == "__main__":
    run_command(main)
