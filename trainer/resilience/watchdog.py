"""End a job that hangs: name the rank that the others wait for, leave everybody's stacks, and exit with STALLED.

The main thread records its position (`heartbeat`, `Phase`), which costs it less than a microsecond. Two threads beside it
do the rest: one tells the other ranks and hears of them, over a connection of its own to the store at which the ranks
have met, and one looks at the clock. They are two, because the first waits for ever if the store's host is suspended.

All ranks pass through the same positions in the same order. So the number of moves shows which rank is behind, and the
others wait for that one.
"""

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch.profiler import record_function

from data_pipeline.common.errors import printable
from trainer.distributed import DistContext

STALLED = 75
"""Exit code of a process that leaves a hanging job: EX_TEMPFAIL of sysexits.h, which invites to try again."""

FRESH = 3
"""Factor of `run.stall_s` for the beginning of an epoch or an evaluation: it builds pipelines, and may compile."""

COLLECTIVES = "collectives-"
"""Beginning of the names of files that `torchfrtrace` reads: a rank's latest collectives, from torch's flight recorder."""

_PERIOD_S = 5.0  # between two looks at the clock, at most
_REPORT_S = 10.0  # longest time for all reports at the end: the disk, the console or the network may be what hangs


class Position(NamedTuple):
    """Position of a rank's main thread."""

    moves: int = 0
    """Heartbeats so far."""
    phase: str = "start"
    step: int = 0
    """Optimizer steps that are complete."""
    fresh: bool = True

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})"


_position = Position()


def heartbeat(phase: str, step: int | None = None, *, fresh: bool | None = None) -> None:
    """Record that the main thread enters `phase`, after `step` steps and with `fresh` patience; each as before if not given.

    Every rank comes here in the same order, with the same phases.
    """
    global _position
    here = _position
    _position = Position(
        here.moves + 1, phase, here.step if step is None else step, here.fresh if fresh is None else fresh
    )


def position() -> Position:
    """Position of this process's main thread."""
    return _position


class Phase(record_function):
    """`with Phase("forward"):` records the phase, and is a range of that name in a profile."""

    def __enter__(self) -> Self:
        heartbeat(self.name)
        return super().__enter__()


_watches = count()  # of this process: a store, with all that it was told, outlives a training


class Watchdog:
    """Context manager of each rank's training: ends the process when no rank has moved for `stall_s` seconds; 0: never.

    Every rank that can writes the stacks of all its threads to `folder`/rank-R.txt, and its latest collectives beside it.
    The first of them names the cause in one line on stderr, and by `tell`; all of them exit with STALLED. A suspended rank
    cannot do so: the launcher must end it. Time in which the whole process was suspended does not count.
    """

    def __init__(self, stall_s: float, folder: Path, ctx: DistContext, tell: Callable[[str], None]) -> None:
        self.stall_s, self.folder, self.ctx, self.tell = stall_s, folder, ctx, tell
        self._period_s = min(_PERIOD_S, stall_s / 10)
        self._news: dict[int, tuple[int, Position]] = {}  # of each other rank: its latest beat
        self._exchanges = 0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._prefix = f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_watches)}"

    def __enter__(self) -> Self:
        # For what NCCL itself writes, after an error of its own.
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(self.folder.absolute() / COLLECTIVES))
        if self.stall_s:
            tasks = [self._watch, *([self._exchange] if self._meets else [])]
            self._threads = [threading.Thread(target=task, daemon=True) for task in tasks]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(_PERIOD_S)  # a thread that waits for a store that is gone is left behind

    @property
    def _meets(self) -> bool:
        return self.ctx.world > 1 and "MASTER_ADDR" in os.environ

    def _exchange(self) -> None:
        """Exchange positions with the other ranks until the end, or until the store is gone."""
        others = [rank for rank in range(self.ctx.world) if rank != self.ctx.rank]
        try:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                timeout=timedelta(seconds=max(self.stall_s, 30)),
                wait_for_workers=False,
            )
            for beat in count():
                store.set(f"{self._prefix}/{self.ctx.rank}", json.dumps([beat, *_position]))
                there = [rank for rank in others if rank in self._news or store.check([f"{self._prefix}/{rank}"])]
                told = store.multi_get([f"{self._prefix}/{rank}" for rank in there]) if there else []
                for rank, text in zip(there, told, strict=True):
                    number, *position = json.loads(text)
                    self._news[rank] = (number, Position(*position))
                self._exchanges = beat + 1
                if self._ended.wait(self._period_s):
                    return
        except RuntimeError:  # the rank that was its host has ended, and the launcher will end this one soon
            return

    def _watch(self) -> None:
        # Three things are known of each rank: when it was last heard (its beat went on), when any rank last moved (its position
        # changed), and when this one last exchanged positions at all, without which it cannot blame another.
        clock_s = moved_s = 0.0
        last: dict[int, tuple[int, Position]] = {}
        heard_s = dict.fromkeys(range(self.ctx.world), 0.0)
        exchanges, exchanged_s = 0, 0.0
        look_s = time.monotonic()
        while not self._ended.wait(self._period_s):
            before_s, look_s = look_s, time.monotonic()
            clock_s += min(
                look_s - before_s, 2 * self._period_s
            )  # more than that, and the process itself was suspended
            now = {**self._news, self.ctx.rank: (0, _position)}
            for rank, news in now.items():
                if rank == self.ctx.rank or news != last.get(rank):
                    heard_s[rank] = clock_s
                if rank not in last or news[1] != last[rank][1]:
                    moved_s = clock_s
            if self._exchanges != exchanges:
                exchanges, exchanged_s = self._exchanges, clock_s
            last = now
            fresh = any(position.fresh for _, position in now.values())
            if clock_s - moved_s > self.stall_s * (FRESH if fresh else 1):
                patience_s = self.stall_s / 2
                silent = {rank for rank, when_s in heard_s.items() if self._meets and clock_s - when_s > patience_s}
                met = not self._meets or clock_s - exchanged_s <= patience_s
                self._end({rank: position for rank, (_, position) in now.items()}, silent, met)

    def _end(self, positions: Mapping[int, Position], silent: set[int], met: bool) -> None:
        """Report, give the other ranks the time to do so, and leave. Does not return."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if not met and not agent:
            silent = {0}  # the ranks meet in rank 0's process, so nothing is known of the others
        first = min(set(range(self.ctx.world)) - silent)
        if not met and agent:
            why = f"torchrun at {os.environ['MASTER_ADDR']} does not answer, and this rank waits at {_position}"
        else:
            why = verdict(positions, silent)
        line = f"nothing has moved for run.stall_s {self.stall_s:g}: {why}; stacks in {self.folder}"

        def report() -> None:
            if self.ctx.rank == first or not met:
                print(f"error: {printable(line)}", file=sys.stderr, flush=True)
            self._write_stacks(line)
            self.tell(line)
            self._write_collectives()

        reporter = threading.Thread(target=report, daemon=True)
        reporter.start()
        reporter.join(_REPORT_S)
        time.sleep(3 * self._period_s)
        os._exit(STALLED)

    def _write_stacks(self, line: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self.ctx.rank}.txt").open("a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.ctx.rank} at {_position}: {line}", file=file)
            file.flush()
            faulthandler.dump_traceback(file)
            print(file=file)

    def _write_collectives(self) -> None:
        """Write what torch's flight recorder has of the process groups: the last 2,000 collectives and their states."""
        name = "_dump_nccl_trace" if self.ctx.device.type == "cuda" else "_dump_fr_trace"
        dump = getattr(torch._C._distributed_c10d, name, None)  # private, so another torch may lack it
        if dump is None or not dist.is_initialized():
            return
        # It asks the GPU, which may be what hangs, and keeps the interpreter's lock meanwhile: then only the kernel can end us.
        signal.alarm(math.ceil(_REPORT_S))
        try:
            content = dump()
        finally:
            signal.alarm(0)
        (self.folder / f"{COLLECTIVES}{self.ctx.rank}").write_bytes(content)


def verdict(positions: Mapping[int, Position], silent: set[int]) -> str:
    """Name the ranks that hold up the others: those that are `silent`, else those behind, by their last known positions."""
    behind = silent or {rank for rank in positions if positions[rank].moves == min(p.moves for p in positions.values())}
    waiting = [position for rank, position in positions.items() if rank not in behind]
    here = next((positions[rank] for rank in sorted(behind) if rank in positions), Position())
    if not waiting:
        return f"{_ranks(behind)} stopped at {here}" if len(behind) == 1 else f"all ranks wait at {here}"
    verb = ("does" if len(behind) == 1 else "do") + " not answer since" if silent else "stopped at"
    return f"{_ranks(behind)} {verb} {here}; the others wait at {max(waiting)}"


def _ranks(ranks: set[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"
