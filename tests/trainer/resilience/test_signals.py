"""The first signal raises a flag and is sent on at the end; the second goes at once; a forked child has its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import FrameType

import pytest

from data_pipeline.common.entry_point import run_command
from tests.support.runs import environment
from trainer.resilience.signals import ECHO_S, SIGNALS, StopFlag


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """The signals that reach the handler which was there before, as a launcher's may be."""
    numbers: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before = {number: signal.signal(number, take) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_waits_for_the_end(number: signal.Signals, taken: list[int]) -> None:
    with StopFlag() as stop:
        assert not stop.raised
        signal.raise_signal(number)
        assert stop.raised and taken == []
    assert taken == [number], "sent on when the training is in order"


@pytest.mark.parametrize(("hangup", "wanted"), [("SIG_DFL", signal.SIGHUP), ("SIG_IGN", signal.SIGTERM)])
def test_rank_stops_with_its_launcher(hangup: str, wanted: signal.Signals) -> None:
    """An agent of W&B kills a launcher when its sweep is cancelled; ranks that knew nothing of it would train on."""
    rank = """if True:
        import time
        from trainer.resilience.signals import StopFlag
        with StopFlag() as stop:
            print("ready", flush=True)
            while not stop.raised:
                time.sleep(0.01)
            print("saved on", stop.signal, flush=True)
    """
    launcher = f"""if True:
        import signal, subprocess, sys
        signal.signal(signal.SIGHUP, signal.{hangup})
        subprocess.run([sys.executable, '-Sc', sys.argv[1]])
    """
    variables = {**environment(), "TORCHELASTIC_RUN_ID": "1"}
    process = subprocess.Popen(
        [sys.executable, "-Sc", launcher, rank], stdout=subprocess.PIPE, text=True, env=variables
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == f"saved on {int(wanted)}\n"


def test_end_of_the_launcher_is_no_second_signal(taken: list[int]) -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGUSR2 and taken == []


def test_second_signal_goes_at_once(taken: list[int]) -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGTERM)
        assert stop.raised and taken == [signal.SIGTERM]


def test_the_same_signal_goes_at_once_unless_it_is_an_echo(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sends SIGTERM to torchrun and to its workers, and torchrun to its workers."""
    now_s = [50.0]
    monkeypatch.setattr("trainer.resilience.signals.time.monotonic", lambda: now_s[0])
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        now_s[0] += ECHO_S - 0.1
        signal.raise_signal(signal.SIGTERM)
        assert stop.raised and taken == []
        now_s[0] += 0.2
        signal.raise_signal(signal.SIGTERM)
        assert taken == [signal.SIGTERM]


def test_a_closed_terminal_stops_unless_nohup(taken: list[int]) -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.raised
    assert taken == [signal.SIGHUP]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.raised
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_no_signal_no_change(taken: list[int]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        assert signal.getsignal(signal.SIGTERM) != handler
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not stop.raised and taken == []


def test_an_error_is_not_covered_by_the_signal(taken: list[int]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopFlag():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError
    assert taken == [] and signal.getsignal(signal.SIGTERM) == handler


def test_a_forked_child_does_not_take_it(taken: list[int]) -> None:
    with StopFlag() as stop:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(7 if taken == [signal.SIGTERM] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "it went to the handler of before, at once"
        assert not stop.raised


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_the_process_ends_by_the_signal(number: signal.Signals) -> None:
    """As whoever sent it expects."""
    script = f"""
import signal
from trainer.resilience.signals import StopFlag
with StopFlag() as stop:
    signal.raise_signal({int(number)})
    print("saved", stop.raised, flush=True)
print("not reached")
"""
    ended = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, "saved True\n", "")


def test_ctrl_c_ends_a_command_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGINT)
            print("saved", stop.raised)
        print("not reached")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr() == ("saved True\n", "")
