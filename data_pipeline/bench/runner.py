"""A contestant of the benchmark in a process of its own, which works in its turns alone."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from data_pipeline.bench.peers import CONTESTANTS, Task
from data_pipeline.bench.sources import SOURCES
from data_pipeline.common.errors import UserError
from data_pipeline.common.processes import children

# Imported once by the process that the contestants are forked from, not by each of them.
_PRELOADED = ["pandas", "data_pipeline.common.cli", "data_pipeline.bench.peers"]
_READY_S, _END_S = 300, 10  # longest time that a loader may take for its first batch, and to end


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
    for child in children(pid):
        yield from _family(child)


def _cpu_s(pid: int) -> float:
    """CPU time of all threads of a process and of the children that it has waited for, ended ones included."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children_s = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")  # cutime and cstime of proc(5)
        # The number of a process's clock, computed as clock_getcpuclockid(3) does on Linux.
        return time.clock_gettime(~pid << 3 | 2) + children_s
    return 0.0
