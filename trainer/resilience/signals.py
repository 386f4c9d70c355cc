"""Stop on a signal: it raises a flag, which the training loop checks between two optimizer steps."""

import ctypes
import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)

ECHO_S = 2.0
"""The same signal again within this time counts as one: SLURM sends it to all processes, and torchrun forwards its own."""

AFTER_SIGNAL = "SLUICE_AFTER_SIGNAL"
"""Variable with a hint for a run that has saved on a signal, set where a job is restarted by itself."""

RESTARTED = "SLUICE_RESTARTED"
"""Variable with the cause for which a supervisor has started the processes of a run again."""


_PR_SET_PDEATHSIG = 1


def stop_with_launcher() -> None:
    """Get SIGHUP, under nohup SIGTERM, when the process that started this one dies: torchrun, once killed, cannot tell its ranks.

    Linux only.
    """
    number = signal.SIGTERM if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else signal.SIGHUP
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


class StopFlag:
    """Context manager: the first of SIGNALS sets `raised`, and is sent again when the context ends.

    SIGHUP, which a terminal sends when it is closed and a launcher when it dies, stays ignored under nohup, and after another
    signal. A second signal, unless it echoes the first, goes at once to the handler that this one replaced.
    """

    def __init__(self) -> None:
        self.raised = False
        self._signal: int | None = None
        self._signal_s = 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    @property
    def signal(self) -> int | None:
        """The signal that raised the flag."""
        return self._signal

    @property
    def raised_for_s(self) -> float:
        """Seconds since the signal; 0 where none has come to this process."""
        return time.monotonic() - self._signal_s if self.raised else 0.0

    def __enter__(self) -> Self:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            stop_with_launcher()
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._signal is not None and kind is None:
            signal.raise_signal(self._signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        forked = os.getpid() != self._pid  # a forked child must not take the signal for its parent
        if number == signal.SIGHUP and self.raised and not forked:
            return  # the terminal or the launcher has gone after all: it says nothing new
        now_s = time.monotonic()
        of_launcher = self._signal == signal.SIGHUP and number == signal.SIGTERM  # torchrun answers one with the other
        if (number == self._signal or of_launcher) and now_s - self._signal_s < ECHO_S and not forked:
            return
        again = self.raised or forked
        self.raised, self._signal, self._signal_s = True, number, now_s
        if again:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
