"""Asked to stop: a signal raises a flag, and the training loop looks at it between two updates."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopFlag:
    """Context manager: the first SIGTERM, SIGINT or SIGUSR2 sets `raised`, and is sent on when the context ends.

    A second one goes at once to the handler that this one replaced.
    """

    def __init__(self) -> None:
        self.raised = False
        self._signal: int | None = None
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._signal is not None and kind is None:
            signal.raise_signal(self._signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.raised or os.getpid() != self._pid  # a forked child must not take the signal for its parent
        self.raised, self._signal = True, number
        if again:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
