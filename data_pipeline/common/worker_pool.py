"""Do the same work on many pieces in several processes, results in the order of the pieces; and show the progress."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from threading import Event, Thread
from typing import Any, Generic, Self, TypeVar

from data_pipeline.common.errors import UserError
from data_pipeline.common.launcher import launched_rank

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_AHEAD = 4  # pieces that a worker may be ahead of the next one: bounds the memory of results

_work: Callable[[Any], Any]


def check_workers(count: int | None) -> None:
    """Raise `UserError` for a number of processes that cannot be."""
    if count is not None and count < 1:
        raise UserError(f"--workers: {count} is not positive; leave it out to use the processors there are")


class Workers(Generic[Piece, Result]):
    """Processes that apply `work` to pieces. `work` is inherited, not pickled, so it may close over a whole catalog.

    `count` is the number of processes; None means the number of processors that this one may use. With `threads` they are
    threads of this process: for work whose libraries bear no fork, and release the interpreter.
    """

    def __init__(self, work: Callable[[Piece], Result], count: int | None, *, threads: bool = False) -> None:
        check_workers(count)
        self.count = count or len(os.sched_getaffinity(0))
        self._pool: Executor
        self._apply: Callable[[Piece], Result] = work if threads else _apply
        if threads:
            self._pool = ThreadPoolExecutor(self.count)
            return
        self._pool = ProcessPoolExecutor(self.count, get_context("fork"), initializer=_begin, initargs=(work,))
        self._pool.submit(os.getpid).result()  # forks all of them now, while this process has no other threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, pieces: Iterable[Piece]) -> Iterator[Result]:
        """Apply `work` to each piece, in order. Raises what `work` raises, and `UserError` where a process was killed."""
        pending: deque[Future[Result]] = deque()
        try:
            # Submit a bounded number ahead, so that results of fast workers do not fill the memory.
            for piece in pieces:
                pending.append(self._pool.submit(self._apply, piece))
                if len(pending) > _AHEAD * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"--workers: a process (of {self.count} in all) was ended from outside, as for want of memory; give fewer"
            ) from None


SILENT_S = 10.0
"""Longest time that a working command prints nothing."""


class Part:
    """A part of a command that takes time: its progress in words."""

    def __init__(self, label: str, total: int | None, done: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._before = self.done = done
        self._start_s = time.monotonic()

    def __str__(self) -> str:
        """Say `label: 20 of 100 images, eta 0:01:20`; without a total, or before anything is done, the time taken so far."""
        took_s = time.monotonic() - self._start_s
        if self.total is None:
            return f"{self.label}: {took_s:.0f} s so far"
        line = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}"
        if self.done <= self._before:
            return f"{line} after {took_s:.0f} s"
        left_s = max(self.total - self.done, 0) * took_s / (self.done - self._before)
        return f"{line}, eta {timedelta(seconds=round(left_s))}"


@contextmanager
def progress(
    label: str, total: int | None = None, done: int = 0, unit: str = "images"
) -> Iterator[Callable[[int], None]]:
    """Report on stderr the progress of a part of a command; call the result with each number of units finished.

    A terminal gets a bar, anything else a line every SILENT_S. An inner part speaks for the outer. Only rank 0 speaks.
    """
    part = Part(label, total, done, unit)

    def advance(count: int) -> None:
        part.done = min(part.done + count, total) if total is not None else part.done + count

    if launched_rank() > 0:
        yield advance
        return
    _open_parts.append(part)
    try:
        with nullcontext() if len(_open_parts) > 1 else _bar() if _on_terminal() else _lines():
            yield advance
    finally:
        _open_parts.remove(part)


_open_parts: list[Part] = []  # the innermost last


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _lines() -> Iterator[None]:
    """Start a thread that prints the innermost part's progress every SILENT_S."""
    closed, stream = Event(), sys.stderr

    def speak() -> None:
        with suppress(OSError, ValueError):  # nobody reads any more
            while not closed.wait(SILENT_S):
                print(_open_parts[-1], file=stream, flush=True)

    thread = Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


@contextmanager
def _bar() -> Iterator[None]:
    """Show a bar for the innermost part; other output appears above it, and the bar disappears at the end."""
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def drawn() -> Table:
        part = _open_parts[-1]
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(part.total, part.done, width=30, pulse=part.total is None), Text(str(part)))
        return row

    console = Console(stderr=True)
    with Live(get_renderable=drawn, console=console, transient=True, redirect_stdout=sys.stdout.isatty()):
        yield


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker with its parent: a killed parent closes no queue, so the worker would wait for pieces for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _apply(piece: Any) -> Any:
    return _work(piece)
