"""Progress of a command, on a terminal and without one; it stays silent for no longer than promised."""

import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from data_pipeline.common import worker_pool
from data_pipeline.common.worker_pool import Part, progress
from tests.support.runs import ROOT, environment
from trainer.resilience import watchdog
from trainer.tracking import console


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "SILENT_S", 0.1)
    monkeypatch.setattr(console, "SILENT_S", 0.1)


def lines(count: int, read: Callable[[], str]) -> list[str]:
    """Wait for so many lines, as long as a busy machine takes."""
    found, end_s = list[str](), time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < end_s, found
        time.sleep(0.05)
        found += read().splitlines()
    return found


@pytest.mark.parametrize(
    ("total", "before", "done", "line"),
    [
        (None, 0, 0, "packing: 20 s so far"),
        (6400, 0, 0, "packing: 0 of 6,400 images after 20 s"),
        (6400, 0, 1600, "packing: 1,600 of 6,400 images, eta 0:01:00"),
        (6400, 3200, 4800, "packing: 4,800 of 6,400 images, eta 0:00:20"),
        (6400, 3200, 3200, "packing: 3,200 of 6,400 images after 20 s"),
    ],
)
def test_a_part_says_how_far_it_is(
    total: int | None, before: int, done: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Part("packing", total, before, "images")
    part.done = done
    start_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start_s + 20)
    assert str(part) == line


def test_lines_come_by_themselves_and_the_innermost_part_speaks(
    impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("opening the run"):
        assert lines(2, lambda: capsys.readouterr().err)[0].startswith("opening the run: ")
        with progress("predicting", 100) as advance:
            advance(140)  # more than there are, as where the other ranks are not as far
            assert lines(2, lambda: capsys.readouterr().err)[-1] == "predicting: 100 of 100 images, eta 0:00:00"
    capsys.readouterr()
    with progress("quick", 3):
        pass
    assert capsys.readouterr().err == "", "what is quick says nothing"


def test_only_rank_0_speaks(
    impatient: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress("predicting", 100) as advance:
        advance(1)
        time.sleep(0.25)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_and_keeps_stdout_apart() -> None:
    """stderr is a terminal and stdout a pipe: what is printed meanwhile goes into the pipe, the bar onto the terminal."""
    program = (
        "import time\nfrom data_pipeline.common.worker_pool import progress\n"
        "with progress('scanning', 8) as advance:\n    advance(2)\n    print('a result')\n    time.sleep(.5)\n"
    )
    ours, theirs = pty.openpty()
    told = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment() | {"TERM": "xterm"},
        cwd=ROOT,
        check=True,
        text=True,
    )
    os.close(theirs)
    assert told.stdout == "a result\n"
    assert "scanning: 2 of 8 images, eta 0:00:0" in os.read(ours, 1 << 16).decode()
    os.close(ours)


def test_a_training_that_takes_its_time_says_where_it_is(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    shown = console.Console(total_steps=120, epochs=4, resume_step=0)
    watchdog.heartbeat("evaluate", 12)
    shown.open()
    assert set(lines(2, lambda: capsys.readouterr().out)) == {"step 12/120  still busy: evaluate"}
    shown.close()
    capsys.readouterr()
    time.sleep(0.25)
    assert capsys.readouterr().out == ""
