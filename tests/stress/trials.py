"""A sweep of W&B by real agents against a server on this machine, of which one trial is stopped and one taken away."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.end_to_end.test_wandb_agent import PLACE, agent, begun
from tests.support.runs import descendants, rows
from tests.support.wandb_backend import Backend
from trainer.checkpoint.store import Store

TRIALS = 6
TOLD = {
    "stopped": "its sweep is done with it",
    "taken": "W&B hands it to the next agent of its sweep",
}


def sweep_through(
    home: Path,
    options: dict[str, str],
    backend: Backend,
    draw: random.Random,
    tell: Callable[[str, str, str, dict[str, Any]], None],
) -> list[str]:
    """Train a grid of six trials in the current folder, `home`. Returns what was lost."""
    stopped, taken = draw.sample(range(TRIALS), 2)
    arguments = [f"--{option}={value}" for option, value in (options | {"tracking.wandb": "online"}).items()]
    command = ["${env}", "python", "-m", "trainer", *arguments, "--run.name=mine", "${args}"]
    values = {"run.seed": {"values": [*range(TRIALS)]}}
    file = {**PLACE, "method": "grid", "parameters": values, "command": command, "program": "trainer"}
    (home / "sweep.yaml").write_text(yaml.safe_dump(file))
    sweep, log = begun(backend, "sweep.yaml"), home / "agent.log"
    process, faults = agent(log), list[str]()

    for number in range(TRIALS):
        name, run = f"trial{number}", home / f"runs/mine-trial{number}"
        wait(process, partial(rows, run))
        fate = {stopped: "stopped", taken: "taken"}.get(number, "")
        if fate == "stopped":
            sweep.stop.add(name)
        if fate == "taken":  # its machine, and with it the agent
            for pid in (process.pid, *descendants(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            process.wait()
            while backend.runs[name].exit_code is None:
                time.sleep(0.1)
            process = agent(log)
        wait(process, partial(ended_well, backend, name))
        faults += faults_of_trial(run, backend, name, fate)
        if fate:
            line = next((line for line in log.read_text().splitlines() if TOLD[fate] in line), "")
            cost = next((row for row in rows(run) if "perf/lost_s" in row), {})
            tell(f"trial {fate}", f"{name} {fate}", line, cost)
            faults += [] if line else [f"{name} was {fate}, and the log does not tell"]
    if code := process.wait():
        faults.append(f"the last agent ended with {code}")
    if sorted(backend.runs) != [f"trial{number}" for number in range(TRIALS)]:
        faults.append(f"the server has {sorted(backend.runs)}")
    return faults


def wait(process: subprocess.Popen[bytes], holds: Callable[[], object]) -> None:
    """Raises `RuntimeError` where the agent ends before."""
    while not holds():
        if process.poll() is not None and not holds():
            raise RuntimeError(f"the agent has ended with {process.returncode}")
        time.sleep(0.2)


def ended_well(backend: Backend, name: str) -> bool:
    return name in backend.runs and backend.runs[name].exit_code == 0


def faults_of_trial(run: Path, backend: Backend, name: str, fate: str) -> list[str]:
    """Look for faults of a trial that has ended, in its folder and at the server."""
    sent, progress, steps = backend.runs[name], Store(run).progress(), [row["step"] for row in rows(run)]
    found = {
        "its folder is not finished": progress.finished != (fate != "stopped"),
        "steps are missing or twice": steps != [*range(1, progress.step + 1)],
        f"the server has {len(sent.history)} of {len(steps)} rows": len(sent.history) != len(steps),
        f"it was started {sent.starts} times": sent.starts != 1 + (fate == "taken"),
        f"stopped is {sent.summary.get('stopped')}": bool(sent.summary.get("stopped")) != (fate == "stopped"),
        "wandb_id.txt has another id": (run / "wandb_id.txt").read_text() != f"{name}\n",
    }
    return [f"{name}: {what}" for what, lost in found.items() if lost]
