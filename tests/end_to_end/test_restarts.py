"""Restarts of a job, without waiting: by torchrun after a rank has died, and on a second signal."""

import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from data_pipeline.common.entry_point import run_command
from launch.supervisor.record import recorded_restarts
from tests.support.runs import Job, checkpoint, dotted, free_port, ranks_of, reference, rows, settings_of
from trainer import __main__ as training
from trainer.checkpoint.manifest import Stamp, fault
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.mark.slow
def test_torchrun_starts_ranks_again(base: Path, tmp_path: Path) -> None:
    """Rank 1 is killed within the second epoch, and rank 0 within the third; the end is that of a run left alone."""
    run = tmp_path / "a run"
    torchrun = ["--nproc_per_node=2", "--max-restarts=2", f"--master-port={free_port()}", "-m", "trainer"]
    job = Job(1, tmp_path / "log", "torch.distributed.run", *torchrun, *dotted(settings_of(base, run)))
    for start, (rank, step) in enumerate(((1, 6), (0, 11))):
        while len(ranks := ranks_of(job, start)) < 2:
            assert job.process.poll() is None, job.output()
            time.sleep(0.1)
        job.wait_for_step(run, step)
        os.kill(ranks[rank], signal.SIGKILL)
    assert job.wait() == 0, job.output()
    assert job.output().count(f"resuming {run} at step ") == 2, job.output()
    for name in ("model.safetensors", "training.pt"):
        assert checkpoint(run)[name] == checkpoint(reference(base, 2))[name], name
    steps = [row["step"] for row in rows(run) if "train/lr" in row]
    assert steps == sorted(set(steps)), "a step is there twice"
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(reference(base, 2))]


@pytest.mark.slow
def test_launch_local_starts_ranks_again(base: Path, tmp_path: Path) -> None:
    """Rank 1 is killed within the second epoch, and rank 0 suspended within the fifth; the end is that of a run left alone.

    It goes on from a snapshot, as no checkpoint is written within an epoch.
    """
    epochs = 8  # of which some seconds are left when a busy machine gets round to the kill
    run, memory = tmp_path / "a run", tmp_path / "memory"
    kept = {"run.stall_s": "10", "run.save_every": "1000", "run.snapshot_every": "1", "run.snapshot_dir": str(memory)}
    options = dotted(settings_of(base, run, epochs) | kept)
    job = Job(1, tmp_path / "log", "launch", "local", "-n", "2", "--restarts", "2", *options)
    for start, (rank, step, act) in enumerate(((1, 6, signal.SIGKILL), (0, 21, signal.SIGSTOP))):
        while len(ranks := ranks_of(job, start)) < 2:
            assert job.process.poll() is None, job.output()
            time.sleep(0.1)
        while (there := snapshot_step(memory)) < step or there % 5 not in (1, 2):
            assert job.process.poll() is None, job.output()
            time.sleep(0.01)
        os.kill(ranks[rank], act)
    assert job.wait() == 0, job.output()
    causes = ["rank 1 was ended by SIGKILL", "rank 1 found that nothing moves, and rank 0 did not end"]
    for number, cause in enumerate(causes, start=1):
        assert f"restart {number}: {cause}\n" in job.output()
        assert f"restarted: {cause}; " in job.output(), "rank 0 tells what it costs"
    assert recorded_restarts(run) == (2, causes[1])
    # Both times, unless the machine let the end of the epoch come before the kill.
    assert re.search(r" at step \d+ of 40 from a snapshot in memory\n", job.output()), job.output()
    assert not list(memory.glob("*/*")), "the memory is given back"
    for name in ("model.safetensors", "training.pt"):
        assert checkpoint(run)[name] == checkpoint(reference(base, 2, epochs))[name], name
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(reference(base, 2, epochs))]
    assert sum("perf/lost_s" in row for row in rows(run)) == 2


def snapshot_step(memory: Path) -> int:
    """Step of the snapshot that is there; 0 where there is none."""
    for link in memory.glob("*/*/checkpoints/last"):
        with suppress(OSError):  # it is being replaced
            return int(os.readlink(link).removeprefix("step-").partition(".")[0])
    return 0


class SlowStore(Store):
    """Takes an hour to complete a checkpoint after the first."""

    def complete(self, progress: Progress, manifest: dict[str, Stamp], *, best: bool) -> None:  # type: ignore[override]
        if progress.step > 3:
            print("saving", flush=True)
            time.sleep(3600)
        super().complete(progress, manifest, best=best)


def signal_twice(job: Job, number: signal.Signals) -> int:
    """A signal while it saves, and again; its exit code."""
    while "saving" not in job.output():
        assert job.process.poll() is None, job.output()
        time.sleep(0.05)
    job.process.send_signal(number)
    time.sleep(2.5)  # or it were an echo of the first
    assert job.process.poll() is None, "one waits for the save"
    job.process.send_signal(number)
    return job.wait()


def test_a_second_signal_while_it_saves(base: Path, tmp_path: Path) -> None:
    """It leaves at once, and the checkpoint before is whole."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    runs = [tmp_path / number.name for number in numbers]
    jobs = [
        Job(1, tmp_path / f"{run.name}.log", "tests.end_to_end.test_restarts", *dotted(settings_of(base, run)))
        for run in runs
    ]
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(signal_twice, jobs, numbers))
    assert codes == [-signal.SIGTERM, 128 + signal.SIGINT], "a shell calls the first 143"
    for run in runs:
        newest = Store(run).newest()
        assert newest and newest.name == "step-00000003" and fault(newest) is None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with pytest.MonkeyPatch.context() as replaced:
        replaced.setattr("trainer.setup.start.Store", SlowStore)
        sys.argv[0] = "trainer"
        run_command(training.main)
