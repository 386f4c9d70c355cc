"""Mishaps that befall a run on the cluster of slurm/dev/cluster.sh: each is inflicted, and waited for until all is well again."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

from launch.slurm.slow_nodes import slow_ranks
from tests.end_to_end.test_faults import fill
from tests.stress.restarts import rank_on
from tests.support.cluster import Cluster
from trainer.checkpoint.snapshot_home import read_token

T = TypeVar("T")

NODES = [f"127.0.1.{number}" for number in (1, 2, 3)]
MISHAPS = {
    "rank killed": True,
    "rank suspended": True,
    "node lost": True,
    "preempted": True,
    "requeued": True,
    "rank slowed": False,
    "mirror full": False,
    "mirror full, rank killed": True,
}
"""Mishap -> True where it interrupts the training."""
SAVED = r"asked to stop: saved step \d+ on "
FULL = "not mirrored: No space left on device"
MAY_TAKE_S = 600.0  # for a mishap to be told, and for training to go on


class Trouble:
    """Inflicts mishaps on a run whose mirror is on `disk`, and waits until its logs tell of them and the training goes on."""

    def __init__(self, cluster: Cluster, run: Path, disk: Path, draw: random.Random) -> None:
        self.cluster, self.run, self.disk, self.draw = cluster, run, disk, draw
        self._read: dict[Path, int] = {}  # length of each log at the last mark
        self._mark_s = 0.0

    def inflict(self, mishap: str) -> tuple[str, str, dict[str, Any]]:
        """Returns what was done, the line of the logs with its cause, and the row that tells what it has cost, if any.

        Raises AssertionError where the run does not tell it, or does not go on.
        """
        self.mark()
        done, cause = getattr(self, mishap.replace(" ", "_").replace(",", ""))()
        line = self.expect(cause)
        return done, line, self.await_training() if MISHAPS[mishap] else {}

    def mark(self) -> None:
        """Look from here on only at what is new."""
        self._read, self._mark_s = {log: log.stat().st_size for log in self._logs()}, time.time()

    # ---- each returns what was done, and how the log tells of it -----------------------------------------------------

    def rank_killed(self) -> tuple[str, str]:
        node, pid = self._some_rank()
        os.kill(pid, signal.SIGKILL)
        return f"rank on {node} killed", rf"rank \d on {node} was ended by SIGKILL"

    def rank_suspended(self) -> tuple[str, str]:
        node, pid = self._some_rank()
        os.kill(pid, signal.SIGSTOP)
        return f"rank on {node} suspended", rf"found that nothing moves, and rank {rank_of(pid)} did not end"

    def node_lost(self) -> tuple[str, str]:
        node, _ = self._some_rank()
        self.cluster.script("kill-node", node)
        if token := read_token(self.run):  # what it had in memory is lost
            shutil.rmtree(f"{token}-{node}", ignore_errors=True)
        time.sleep(self.draw.uniform(0, 25))  # SLURM notices after some ten seconds
        self.cluster.script("start-node", node)
        return f"node {node} lost, and back", rf"node {node} is lost|the first node, {node}, is lost"

    def preempted(self) -> tuple[str, str]:
        self.cluster.run("srun", "--partition=high", f"--nodes={len(NODES)}", "--exclusive", "true")
        return "preempted", SAVED + "SIGUSR2"

    def requeued(self) -> tuple[str, str]:
        self.cluster.run("scontrol", "requeue", self.cluster.job(self.run))
        return "requeued", SAVED + "SIGTERM"

    def rank_slowed(self) -> tuple[str, str]:
        node, pid = self._some_rank(besides={one["rank"] for one in slow_ranks(tail(self.run))})
        cause = rf"slow rank: rank {rank_of(pid)} on {node}"
        with slowed(pid):
            self.expect(cause)
        return f"rank on {node} slowed", cause

    def mirror_full(self) -> tuple[str, str]:
        with self._full_mirror():
            time.sleep(self.draw.uniform(0, 20))
        self.expect("mirrored again to")
        return "mirror full, and emptied", FULL

    def mirror_full_rank_killed(self) -> tuple[str, str]:
        with self._full_mirror():
            done, cause = self.rank_killed()
            self.await_training()
        return f"mirror full, {done}", cause

    @contextmanager
    def _full_mirror(self) -> Iterator[None]:
        def told() -> str | None:
            fill(self.disk)  # again, as the mirror may have removed a checkpoint meanwhile
            return self._line(FULL)

        try:
            self._until(told, f"the log does not say {FULL!r}")
            yield
        finally:
            (self.disk / "filler").unlink()

    # ---- looking -----------------------------------------------------------------------------------------------------

    def expect(self, cause: str) -> str:
        """Line of the logs since the mark in which `cause` is found."""
        return self._until(lambda: self._line(cause), f"the log does not say {cause!r}")

    def await_training(self) -> dict[str, Any]:
        """First row since the mark by ranks that were started again: it tells what that has cost."""
        return self._until(self._interruption, "it does not go on")

    def _until(self, look: Callable[[], T | None], otherwise: str) -> T:
        end_s = time.monotonic() + MAY_TAKE_S
        while (found := look()) is None:
            assert time.monotonic() < end_s, f"{otherwise}\n{self.cluster.state(self.run)}\n{self._news()[-5000:]}"
            time.sleep(0.2)
        return found

    def _line(self, cause: str) -> str | None:
        return next((line for line in self._news().splitlines() if re.search(cause, line)), None)

    def _interruption(self) -> dict[str, Any] | None:
        return next((row for row in tail(self.run) if "perf/lost_s" in row and row["time"] > self._mark_s), None)

    def _news(self) -> str:
        return "\n".join(log.read_bytes()[self._read.get(log, 0) :].decode(errors="replace") for log in self._logs())

    def _logs(self) -> list[Path]:
        return sorted(self.run.glob("slurm/*/*.log"))

    def _some_rank(self, besides: Collection[int] = ()) -> tuple[str, int]:
        """Node and process of one of the run's ranks."""
        found = []
        for node in NODES:
            with suppress(LookupError):
                found.append((node, rank_on(node, self.run)))
        return self.draw.choice([(node, pid) for node, pid in found if rank_of(pid) not in besides])


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(one for one in variables if one.startswith(b"RANK=")).removeprefix(b"RANK="))


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Let a process work a fifth of the time."""
    over = Event()

    def work() -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.04)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.01)

    worker = Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        over.set()
        worker.join()


def tail(run: Path) -> list[dict[str, Any]]:
    """The last rows and alerts of metrics.jsonl: all of it takes long to read after an hour."""
    found = []
    with suppress(FileNotFoundError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
        for line in file:
            with suppress(ValueError):  # cut off, or not yet whole
                found.append(json.loads(line))
    return found
