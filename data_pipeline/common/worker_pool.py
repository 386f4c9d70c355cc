"""The same work on many pieces by several processes, results in the order of the pieces; and a bar to watch it by."""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import Any, Generic, Self, TypeVar

from data_pipeline.common.errors import UserError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_AHEAD = 4  # pieces a worker may be ahead of the one wanted next: bounds the memory that results take

_work: Callable[[Any], Any]


class Workers(Generic[Piece, Result]):
    """Processes that apply `work` to pieces. It is inherited, not pickled, so it may close over a whole catalog.

    `count` is the number of processes, that of the processors this one may use if None.
    """

    def __init__(self, work: Callable[[Piece], Result], count: int | None) -> None:
        if count is not None and count < 1:
            raise UserError(f"--workers: {count} is not positive; leave it out to use the processors there are")
        self.count = count or len(os.sched_getaffinity(0))
        self._pool = ProcessPoolExecutor(self.count, get_context("fork"), initializer=_begin, initargs=(work,))
        self._pool.submit(os.getpid).result()  # forks all of them now, while this process has no other threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, pieces: Iterable[Piece]) -> Iterator[Result]:
        """`work` of each piece, in order. Raises what `work` raises, and `UserError` where a process was ended."""
        pending: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                pending.append(self._pool.submit(_apply, piece))
                if len(pending) > _AHEAD * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"--workers: one of {self.count} processes was ended from outside, as for want of memory; give fewer"
            ) from None


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over `total` images, where that is a terminal; call what it gives with each number finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue: without this its workers would wait for pieces for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _apply(piece: Any) -> Any:
    return _work(piece)
