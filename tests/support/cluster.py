"""A real SLURM cluster for the tests, brought up by slurm/dev/cluster.sh."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.slurm.submission import Submission, newest
from tests.support import warm
from tests.support.runs import ROOT, environment, rows

SCRIPT = ROOT / "slurm/dev/cluster.sh"
WAIT_S = 300
"""No single thing takes longer, on two slow cores."""


class Cluster:
    """Some nodes of four processors, and the commands of ours and of SLURM against them."""

    def __init__(self, folder: Path, cwd: Path, nodes: int) -> None:
        slurm_free = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
        port = (
            10_000 + os.getpid() % 900 * 10 + 5 * (nodes > 2)
        )  # another for whoever else tests here; training takes those from 20000
        self.cwd = cwd
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**slurm_free, "PATH": path, "CLUSTER_DIR": str(folder), "CLUSTER_PORT": str(port)}
        self.environment["CLUSTER_NODES"] = str(nodes)

    def script(self, *arguments: str) -> str:
        """Output of cluster.sh."""
        return self.run("bash", str(SCRIPT), *arguments)

    def start(self) -> None:
        self.script("start")
        self.environment["SLURM_CONF"] = shlex.split(self.script("env"))[1].removeprefix("SLURM_CONF=")

    def run(self, *command: str) -> str:
        """Output of a command that succeeds."""
        done = self.attempt(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def attempt(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.cwd,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )

    def launch(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`python -m launch arguments`."""
        return warm.run("launch", *arguments, environment={**self.environment, **variables}, cwd=self.cwd)

    def submit(self, run: Path, options: list[str], settings: list[str], **variables: str) -> str:
        """The number of the job that trains `run`."""
        done = self.launch("submit", *options, "--", *settings, **variables)
        assert done.returncode == 0, done.stderr
        return self.job(run)

    def job(self, run: Path) -> str:
        job = self.submission(run).job.id
        assert job
        return job

    def submission(self, run: Path) -> Submission:
        submission = newest(run)
        assert submission
        return submission

    def said(self, run: Path) -> str:
        """All that the job has printed."""
        return "\n".join(file.read_text() for file in sorted(self.submission(run).folder.glob("*.log")))

    def state(self, run: Path, which: str = "%T") -> str:
        """Ask squeue for the run's job: its state, or with %r the reason for waiting."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={self.job(run)}", f"--format={which}").strip()

    def restarts(self, run: Path) -> int:
        show = self.run("scontrol", "show", "job", self.job(run))
        return int(show.partition("Restarts=")[2].split()[0])

    def wait(self, run: Path, *states: str) -> None:
        """Until the job is in one of `states`."""
        self.until(run, lambda: self.state(run) in states)

    def wait_for_step(self, run: Path, step: int, restarts: int = 0) -> None:
        """Until the run reports `step`, after so many restarts of its job."""
        self.until(run, lambda: self.restarts(run) >= restarts and self.state(run) == "RUNNING")
        start_s = time.time()
        self.until(run, lambda: any(row["step"] >= step and row["time"] > start_s for row in rows(run)[-1:]))

    def until(self, run: Path, reached: Callable[[], bool]) -> None:
        self.eventually(reached, lambda: f"{self.state(run)}: {self.said(run)}")

    def eventually(self, reached: Callable[[], bool], explain: Callable[[], str]) -> None:
        end_s = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < end_s, explain()
            time.sleep(0.1)


@contextmanager
def running_cluster(cwd: Path, nodes: int = 2) -> Iterator[Cluster]:
    """A cluster of so many nodes, gone at the end; the test is skipped where SLURM is not installed."""
    if not shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin") or not shutil.which("sbatch"):
        pytest.skip("SLURM is not installed: apt-get install --no-install-recommends slurm-wlm munge")
    cluster = Cluster(
        Path(f"/tmp/slurm-{os.getpid()}-{nodes}"), cwd, nodes
    )  # pytest's folders are too long for a socket
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.script("stop")
