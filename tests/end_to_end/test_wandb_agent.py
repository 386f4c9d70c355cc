"""Sweeps of W&B by the real `wandb sweep` and `wandb agent`, against a server on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.runs import QUICK, descendants, environment, images, rows
from tests.support.wandb_backend import Backend, Sweep, isolate, serving

WANDB = str(Path(sys.executable).parent / "wandb")
PLACE = {"project": "theirs", "entity": "team"}


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    isolate(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        assert server.faults == []


def begun(backend: Backend, file: str) -> Sweep:
    """The sweep of a file, created by `wandb sweep`."""
    subprocess.run([WANDB, "sweep", file], env=environment(), capture_output=True, check=True)
    (sweep,) = backend.sweeps.values()
    return sweep


def agent(log: Path) -> subprocess.Popen[bytes]:
    """An agent of the sweep, which leaves after one run that failed."""
    command = [WANDB, "agent", "--max-consecutive-failed-runs", "1", "team/theirs/5weep0"]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def wait_until(happens: Callable[[], object], longest_s: float = 300) -> None:
    end_s = time.monotonic() + longest_s
    while not happens():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.slow
def test_trials_are_stopped_taken_away_and_resumed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, backend: Backend
) -> None:
    options = QUICK | {"data.path": str(images(tmp_path_factory.getbasetemp())), "tracking.wandb": "online"}
    arguments = [f"--{option}={value}" for option, value in options.items()]
    command = ["${env}", "python", "-m", "trainer", *arguments, "--run.name=mine", "${args}"]
    values = {"optim.lr": {"values": [0.01]}, "run.epochs": {"values": [400, 8]}, "run.max_steps": {"values": [None]}}
    Path("sweep.yaml").write_text(
        yaml.safe_dump({**PLACE, "method": "grid", "parameters": values, "command": command, "program": "trainer"})
    )
    sweep, log = begun(backend, "sweep.yaml"), tmp_path / "agent.log"
    first, second = Path("runs/mine-trial0"), Path("runs/mine-trial1")

    # Hyperband ends the first trial; the machine of the second is taken away, and with it the agent.
    process = agent(log)
    wait_until(lambda: rows(first))
    sweep.stop.add("trial0")
    wait_until(lambda: rows(second))
    for pid in (process.pid, *descendants(process.pid)):
        os.kill(pid, signal.SIGTERM)
    process.wait()
    wait_until(lambda: backend.runs["trial1"].exit_code is not None)
    stopped, taken = backend.runs["trial0"], backend.runs["trial1"]
    assert (stopped.exit_code, stopped.preempting, stopped.summary["stopped"]) == (0, False, True)
    assert (taken.exit_code, taken.preempting, taken.starts) == (1, True, 1)
    assert (first / "checkpoints/last").exists() and rows(second)[-1]["step"] < 40
    said = log.read_text()
    assert (
        "its sweep is done with it; to go on from there: python -m trainer --config runs/mine-trial0/config.yaml"
        in said
    )
    assert "W&B hands it to the next agent of its sweep" in said

    # The next agent is handed the second trial again.
    assert agent(log).wait() == 0
    commands = [("run", "trial0"), ("stop", "trial0"), ("run", "trial1"), ("resume", "trial1"), ("exit", "")]
    assert list(dict.fromkeys(sweep.commands)) == commands, "a stop is repeated until the run has ended"
    assert (taken.exit_code, taken.starts, taken.history[len(taken.history) - 1]["train/step"]) == (0, 2, 40)
    for run, sent in ((first, stopped), (second, taken)):
        assert (run / "wandb_id.txt").read_text() == run.name.removeprefix("mine-") + "\n"
        assert (sent.project, sent.entity, sent.sweep, sent.display_name) == ("theirs", "team", "5weep0", run.name)
        assert len(sent.history) == len(rows(run))
    assert sorted(backend.runs) == ["trial0", "trial1"]
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name[0] != ".") == ["runs", "sweep.yaml", "wandb"]
    assert {path.name for path in Path("wandb").iterdir()} <= {"sweep-5weep0", "debug-cli.root.log"}, "the agent's own"


@pytest.mark.slow
def test_stopped_trial_of_several_ranks_is_no_failure(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, backend: Backend
) -> None:
    """By the file that our own command makes."""
    options = QUICK | {"data.path": str(images(tmp_path_factory.getbasetemp())), "tracking.wandb": "online"}
    options |= {f"tracking.{key}": value for key, value in PLACE.items()}
    Path("mine.yaml").write_text(yaml.safe_dump({"options": options, "grid": {"run.epochs": [400]}}))
    made = [sys.executable, "-m", "launch", "sweep", "mine.yaml", "--wandb", "--ranks", "2"]
    subprocess.run(made, env=environment(), check=True)
    sweep, log, run = begun(backend, "mine.wandb.yaml"), tmp_path / "agent.log", Path("runs/mine-trial0")
    process = agent(log)
    wait_until(lambda: rows(run))
    sweep.stop.add("trial0")
    assert process.wait() == 0
    assert list(dict.fromkeys(sweep.commands)) == [("run", "trial0"), ("stop", "trial0"), ("exit", "")]
    assert "consecutive failed runs" not in log.read_text()
    sent = backend.runs["trial0"]
    assert (sent.exit_code, sent.summary["stopped"], sent.config["world_size"]) == (0, True, 2)
    assert (run / "wandb_id.txt").read_text() == "trial0\n" and (run / "checkpoints/last").exists()
