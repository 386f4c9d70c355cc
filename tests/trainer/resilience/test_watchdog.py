"""A rank that hangs, or is suspended, is named with its place; the job ends in time, with stacks, and can be started again."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from data_pipeline.common.errors import UserError
from tests.end_to_end.test_restarts import ranks_of
from tests.support.runs import (
    SOLO,
    Job,
    checkpoint,
    dotted,
    environment,
    free_port,
    reference,
    settings_of,
    train,
)
from trainer.checkpoint.store import Store
from trainer.distributed import DistContext
from trainer.resilience.watchdog import FRESH, STALLED, Phase, Position, Watchdog, heartbeat, verdict
from trainer.run_config import RunConfig

STALL_S = 4.0


# ---- what it says ----------------------------------------------------------------------------------------------------

AHEAD, BEHIND = Position(91, "backward", 12, False), Position(90, "data", 12, False)


@pytest.mark.parametrize(
    ("positions", "silent", "line"),
    [
        ({0: AHEAD, 1: AHEAD}, {1}, "rank 1 does not answer since step 12 (backward); the others wait at step 12 (backward)"),
        ({0: AHEAD, 1: BEHIND}, {1}, "rank 1 does not answer since step 12 (data); the others wait at step 12 (backward)"),
        ({0: BEHIND, 1: AHEAD, 2: AHEAD}, set(), "rank 0 stopped at step 12 (data); the others wait at step 12 (backward)"),
        ({0: AHEAD, 2: BEHIND, 3: BEHIND}, {2, 3}, "ranks 2, 3 do not answer since step 12 (data); the others wait at step "
         "12 (backward)"),
        ({0: AHEAD, 1: BEHIND, 2: BEHIND}, set(), "ranks 1, 2 stopped at step 12 (data); the others wait at step 12 (backward)"),
        ({0: AHEAD, 1: AHEAD}, set(), "all ranks wait at step 12 (backward)"),
        ({0: BEHIND}, set(), "rank 0 stopped at step 12 (data)"),
        ({1: AHEAD}, {0}, "rank 0 does not answer since step 0 (start); the others wait at step 12 (backward)"),
    ],
)  # fmt: skip
def test_who_is_to_blame(positions: dict[int, Position], silent: set[int], line: str) -> None:
    assert verdict(positions, silent) == line


# ---- processes that only note where they are -------------------------------------------------------------------------


def rank_of_two(plan: str) -> None:
    """A rank of a job whose updates are a tenth of a second long; `plan` says who is held up after ten of them."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=rank == 0, wait_for_workers=False
    )
    ctx = DistContext(torch.device("cpu"), rank, world, cores=1)
    with Watchdog(STALL_S, Path("stacks"), ctx, lambda line: print("told:", line, flush=True)):
        for step in range(200 if plan == "patient" else 10**6):
            heartbeat("data", step, fresh=plan == "fresh")
            if step == 10 and rank == world - 1 and plan in ("behind", "fresh"):
                hold_up()
            with Phase("forward"):
                time.sleep(0.01)
            heartbeat("all-reduce")
            store.set(f"{step}/{rank}", "")
            for other in range(world):
                store.get(f"{step}/{other}")  # wait for it, as a collective does
            if step == 10:
                Path(f"ready {rank}").touch()
    store.set(f"over/{rank}", "")
    if rank == 0:  # the store is in its process, and the others may still read what they wait for
        for other in range(world):
            store.get(f"over/{other}")


def hold_up() -> None:
    time.sleep(3600)


@contextmanager
def started(folder: Path, plan: str, world: int = 2) -> Iterator[list["subprocess.Popen[str]"]]:
    """So many ranks, in `folder`; killed at the end."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    meet["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # or torch warns of connections that end with a rank
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.resilience.test_watchdog", plan],
            env={**environment(), **meet, "RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until_under_way(processes: list["subprocess.Popen[str]"], folder: Path) -> None:
    while not all((folder / f"ready {rank}").exists() for rank in range(len(processes))):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    said = process.communicate(timeout=300)
    return process.returncode, *said


def test_a_rank_that_is_held_up(tmp_path: Path) -> None:
    """Both ranks leave, with their stacks; rank 0 says it, once."""
    with started(tmp_path, "behind") as processes:
        ends = [ended(process) for process in processes]
    line = (
        f"nothing has moved for run.stall_s {STALL_S:g}: rank 1 stopped at step 10 (data); the others wait at "
        "step 10 (all-reduce); stacks in stacks"
    )
    assert ends == [(STALLED, f"told: {line}\n", f"error: {line}\n"), (STALLED, f"told: {line}\n", "")]
    stacks = [(tmp_path / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert all(line in stack and "in rank_of_two" in stack for stack in stacks)
    assert ["in hold_up" in stack for stack in stacks] == [False, True]


@pytest.mark.parametrize("suspended", [0, 1])
def test_a_rank_that_is_suspended(suspended: int, tmp_path: Path) -> None:
    """Also rank 0, in whose process the ranks meet, and without which they cannot hear of each other."""
    with started(tmp_path, "suspended") as processes:
        wait_until_under_way(processes, tmp_path)
        processes[suspended].send_signal(signal.SIGSTOP)
        code, _, said = ended(processes[1 - suspended])
    assert code == STALLED
    begin = f"error: nothing has moved for run.stall_s {STALL_S:g}: rank {suspended} does not answer since step "
    assert said.startswith(begin) and "; the others wait at step " in said and said.count("\n") == 1
    assert (tmp_path / "stacks" / f"rank-{1 - suspended}.txt").is_file()


def test_what_is_no_hang(tmp_path: Path) -> None:
    """Progress, be it slow, and a job that is suspended as a whole for a while, as SLURM may do."""
    with started(tmp_path, "patient") as processes:
        wait_until_under_way(processes, tmp_path)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                process.send_signal(number)
            time.sleep(2 * STALL_S)
        assert [ended(process) for process in processes] == [(0, "", ""), (0, "", "")]
    assert not (tmp_path / "stacks").exists()


def test_one_process_and_more_patience_at_first(tmp_path: Path) -> None:
    with started(tmp_path, "fresh", world=1) as processes:
        start_s = time.monotonic()
        code, _, said = ended(processes[0])
    assert code == STALLED and time.monotonic() - start_s > FRESH * STALL_S
    begin = f"error: nothing has moved for run.stall_s {STALL_S:g}: "
    assert said == f"{begin}rank 0 stopped at step 10 (data); stacks in stacks\n"


def test_times_that_are_none() -> None:
    for value in (-1.0, math.inf, math.nan):
        with pytest.raises(
            UserError, match=rf"run\.stall_s: {value} is no time; give seconds such as 600, or 0 for off"
        ):
            RunConfig(stall_s=value)


def test_off(tmp_path: Path) -> None:
    with Watchdog(0, tmp_path, SOLO, print):
        time.sleep(0.3)
    assert not list(tmp_path.iterdir())


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def suspend(job: Job, run: Path, rank: int) -> int:
    """SIGSTOP for a rank in mid-training; the job's exit code."""
    job.wait_for_step(run, 7)
    os.kill(ranks_of(job, start=0)[rank], signal.SIGSTOP)
    return job.wait()


@pytest.mark.slow
def test_suspended_ranks_of_a_training(base: Path, tmp_path: Path) -> None:
    """Rank 1 under torchrun and rank 0 under `launch local`; both launchers end what is suspended."""
    whole = reference(base, 2)
    runs = [tmp_path / "first run", tmp_path / "second run"]
    options = [dotted(settings_of(base, run) | {"run.stall_s": "10"}) for run in runs]
    jobs = [
        Job(2, tmp_path / "first.log", "trainer", *options[0], cold=True),
        Job(1, tmp_path / "second.log", "launch", "local", "-n", "2", *options[1]),
    ]
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(suspend, jobs, runs, (1, 0)))
    assert codes == [1, STALLED], "torchrun's own, and the rank's"
    for job, run, suspended in zip(jobs, runs, (1, 0), strict=True):
        said = f"error: nothing has moved for run.stall_s 10: rank {suspended} does not answer since step "
        assert job.output().count(said) == 1, job.output()
        assert "; the others wait at step " in job.output() and f"; stacks in {run}/stacks\n" in job.output()
        written = [f"collectives-{1 - suspended}", f"rank-{1 - suspended}.txt"]
        assert sorted(path.name for path in (run / "stacks").iterdir()) == written
        assert Store(run).progress().step >= 3
    job = train(2, base, runs[0])
    assert job.wait() == 0, job.output()
    for name in ("model.safetensors", "training.pt"):
        assert checkpoint(runs[0])[name] == checkpoint(whole)[name]


if __name__ == "__main__":
    rank_of_two(sys.argv[1])
