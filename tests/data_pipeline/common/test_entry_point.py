"""Commands print what they can, to whoever is there, and never die of it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, environment

PRINTING = """
import os, sys
from data_pipeline.common.entry_point import keep_printing, run_command

def main():
    with keep_printing():
        for number in range(20_000):
            print("a cat is 猫,", number, flush=True)
        print("told", file=sys.stderr)
    number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    assert number > 2, "a file in the place of stdout would take what libraries print"
    os.write(number, b"done")

run_command(main)
"""


@pytest.mark.parametrize(
    "redirection",
    ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "| head -1; exit ${PIPESTATUS[0]}", "| cat"],
)
def test_no_print_fails(redirection: str, tmp_path: Path) -> None:
    """Whatever becomes of the streams, and whatever the encoding lacks."""
    file = tmp_path / "file"
    command = ["bash", "-c", f'"$0" -c "$1" "$2" {redirection}', sys.executable, PRINTING, str(file)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**environment(), "PYTHONIOENCODING": "ascii"}, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert file.read_text() == "done"
    assert ended.stderr in ("told\n", "")
    if ended.stdout:
        assert ended.stdout.startswith("a cat is \\u732b, 0\n")


@pytest.mark.parametrize("program", ["print('a\\n' * 100_000)", "raise SystemExit(print('a'))"])
def test_who_reads_a_command_may_leave(program: str) -> None:
    """Without a word on stderr, not even at the interpreter's end."""
    main = f"from data_pipeline.common.entry_point import run_command\ndef main(): {program}\nrun_command(main)"
    command = ["bash", "-c", '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}', sys.executable, main]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert ended.returncode in (0, 128 + signal.SIGPIPE) and ended.stderr == ""


def test_a_mistake_that_nobody_reads() -> None:
    program = (
        "from data_pipeline.common.entry_point import run_command; from data_pipeline.common.errors import UserError\n"
        "def main(): raise UserError('data.path: 猫')\n"
        "run_command(main)"
    )
    for redirection, said in (("2>&-", ""), ("2>/dev/full", ""), ("", "error: data.path: \\u732b\n")):
        command = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, program]
        variables = {**environment(), "PYTHONIOENCODING": "ascii"}
        ended = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
        assert (ended.returncode, ended.stderr) == (2, said)


def test_torchs_threads_spin_briefly_unless_a_user_wants_otherwise() -> None:
    program = "from data_pipeline.common.entry_point import run_command; run_command(lambda: __import__('torch'))"
    for wanted, said in (
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ):
        variables = {
            name: value for name, value in environment().items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        }
        variables |= {"OMP_DISPLAY_ENV": "VERBOSE", **wanted}
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables, cwd=ROOT)
        assert said in ended.stderr and ("GOMP_SPINCOUNT = '10000'" in ended.stderr) == (not wanted), ended.stderr
