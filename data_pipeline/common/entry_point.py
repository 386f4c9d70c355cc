"""Begin and end of a command; the end is silent, or one line that names the user's mistake."""

import atexit
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from data_pipeline.common.errors import UserError, printable
from data_pipeline.common.launcher import launched_rank, leaves_alone

LEAVE_S = 10.0
"""Longest time that a process takes to end which leaves others behind."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run an entry point: a `UserError` becomes one line on stderr, printed once, and exit code 2."""
    _mend_streams()
    _spin_briefly()
    try:
        main()
        code = 0
    except UserError as error:
        _tell(error)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader has closed the pipe
        code = 128 + signal.SIGPIPE
    except Exception:
        if not leaves_alone():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        _flush()
    if leaves_alone():
        _leave(code)
    sys.exit(code)


def _spin_briefly() -> None:
    """Let threads of torch that wait for others leave their core after half a millisecond, not ten, unless the user has chosen.

    libgomp reads the number of turns in its loop when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _tell(error: UserError) -> None:
    """Print a mistake: rank 0 does for all ranks, or the one that has met it alone."""
    rank = launched_rank()
    if rank == 0 or leaves_alone():
        whose = f"rank {rank}: " if rank and not str(error).startswith("rank ") else ""
        with suppress(OSError):  # perhaps nobody reads it
            print("error:", whose + printable(" ".join(str(error).split())), file=sys.stderr, flush=True)
    else:
        time.sleep(10)  # a launcher ends all ranks when one has ended: let rank 0 print first


def _leave(code: int) -> NoReturn:
    """End this process without its groups of processes, whose end may wait for other ranks for ever."""
    last = threading.Timer(LEAVE_S, os._exit, (code,))
    last.daemon = True
    last.start()
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    """Flush what was printed; where nobody reads it, keep the interpreter from complaining at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def keep_printing() -> Iterator[None]:
    """Let no print fail: a reader may leave, a terminal may close, a log's disk may be full."""
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = map(_forgiving, before)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _forgiving(stream: Any) -> Any:
    """Open another stream to the same place, whose writes never fail."""
    try:
        stream.flush()
        raw = io.BufferedWriter(_Deaf(stream.fileno(), "wb", closefd=False))
    except (OSError, ValueError):  # it is in memory, not a file
        return stream
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)


class _Deaf(io.FileIO):
    """Raw file that accepts every write, even one that does not arrive."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def _mend_streams() -> None:
    """Escape characters that a stream's encoding lacks, and open missing standard streams, as many libraries need all three."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(
                os.devnull, os.O_RDWR
            )  # the lowest number that is free; a file of ours must not be taken for stdout
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - until the end
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
