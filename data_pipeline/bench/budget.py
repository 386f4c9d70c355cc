"""Time budget of a benchmark, and its report where it is broken off."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

MINUTES = 5.0
"""Longest time of a benchmark, besides its preparation and one round."""


def rounds_within(
    rounds: int, deadline_s: float, agree: Callable[[Callable[[], bool]], bool] = lambda fits: fits()
) -> Iterator[int]:
    """Yield at most `rounds` numbers, while one more round, as long as the longest, would end before `deadline_s`.

    `deadline_s` is a value of `time.monotonic`; the first round always runs. `agree` makes several processes decide alike.
    """
    longest_s = 0.0
    for number in range(rounds):
        begin_s = time.monotonic()
        if number and not agree(lambda: time.monotonic() + longest_s <= deadline_s):  # noqa: B023 - called at once
            return
        yield number
        longest_s = max(longest_s, time.monotonic() - begin_s)


@contextmanager
def reported(report: Callable[[str], None]) -> Iterator[None]:
    """Call `report` when the measurement within ends: with "", or with the signal or crash that broke it off."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, _break_off)
    why = ""
    try:
        yield
    except BaseException as error:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        why = f"broken off by {type(error).__name__}; what was measured until then is kept"
        raise
    finally:
        report(why)
        for number, handler in before.items():
            signal.signal(number, handler)


def _break_off(number: int, frame: FrameType | None) -> None:
    """Raise SystemExit, once: a launcher sends more than one signal, and clearing up shall come to its end."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)
