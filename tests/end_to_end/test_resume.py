"""A run that is killed, stopped or cut short ends as one that nothing interrupted: the same bytes, the same rows."""

import json
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.loader import Cursor
from tests.support.runs import (
    SOLO,
    STEPS,
    TRAIN,
    USUAL,
    checkpoint,
    dotted,
    metrics_table,
    reference,
    rows,
    settings_of,
    train,
)
from trainer.checkpoint.store import Store
from trainer.config import load
from trainer.loop import fit
from trainer.resilience.signals import StopFlag
from trainer.scoring import evaluate


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def scores(run: Path) -> dict[tuple[int, str], float]:
    """Value of each train/ and val/ scalar at each step; none may be there twice, nor any other but a saving's time."""
    table: dict[tuple[int, str], float] = {}
    for row in rows(run):
        for name, value in row.items():
            if name not in ("step", "epoch", "time") and not name.startswith("perf/ckpt_"):
                assert (row["step"], name) not in table, f"{name} of step {row['step']} is there twice"
                table[row["step"], name] = value
    return {key: value for key, value in table.items() if key[1].startswith(("train/", "val/"))}


def assert_same_end(run: Path, uninterrupted: Path) -> None:
    ours, theirs = checkpoint(run), checkpoint(uninterrupted)
    assert ours.keys() == theirs.keys() == {"model.safetensors", "training.pt", "progress.json"}
    for name in ours:
        assert ours[name] == theirs[name], f"{name} differs"
    assert scores(run) == pytest.approx(scores(uninterrupted), rel=1e-9)


def kill_again_and_again(ranks: int, base: Path, run: Path, kills: int, draw: random.Random) -> str:
    """Start a run, kill it at a random step or a moment after, start it anew, and so on; at last let it end.

    Returns what the last start said.
    """
    for step in sorted(draw.sample(range(1, STEPS - 4), kills)):
        job = train(ranks, base, run)
        job.wait_for_step(run, step)
        time.sleep(draw.uniform(0, 0.1))
        job.kill()
        assert job.process.returncode == -signal.SIGKILL, f"it ended before step {step}: {job.output()}"
    job = train(ranks, base, run)
    assert job.wait() == 0, job.output()
    return job.output()


def test_killed_runs_of_one_process(base: Path, tmp_path: Path) -> None:
    """Two runs at a time, each killed four times."""
    whole = reference(base, 1)
    runs = [tmp_path / "first run", tmp_path / "second run"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda run: kill_again_and_again(1, base, run, 4, random.Random(run.name)), runs))
    for run in runs:
        assert_same_end(run, whole)


def test_killed_run_of_two_ranks(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    said = kill_again_and_again(2, base, run, 3, random.Random(2))
    assert f"resuming {run} at step" in said
    assert_same_end(run, reference(base, 2))


@pytest.mark.slow
def test_killed_run_of_four_ranks(base: Path, tmp_path: Path) -> None:
    """Sums over more than two ranks depend on their order, which DDP would choose anew in a resumed run."""
    run = tmp_path / "a run"
    job = train(4, base, run, epochs=1)
    job.wait_for_step(run, 3)
    while job.process.poll() is None and not Store(run).progress().step:
        time.sleep(0.02)
    job.kill()
    assert Store(run).progress().step == 3
    job = train(4, base, run, epochs=1)
    assert job.wait() == 0, job.output()
    assert_same_end(run, reference(base, 4, epochs=1))


def test_stopped_and_shortened_run(base: Path, tmp_path: Path) -> None:
    """SIGTERM to torchrun and its workers, an end by run.max_steps, then the rest: by two ranks, and by one."""
    run = tmp_path / "a run"
    job = train(2, base, run)
    job.wait_for_step(run, 1)
    job.terminate()
    assert job.wait() != 0
    stopped = Store(run).progress()
    assert 1 <= stopped.step < STEPS and not stopped.finished
    assert f"asked to stop: saved step {stopped.step} on SIGTERM; the same command goes on from there" in job.output()
    assert rows(run)[-1]["step"] == stopped.step, "it went on after it had saved"

    job = train(2, base, run, max_steps=12)
    assert job.wait() == 0, job.output()
    assert f"resuming {run} at step {stopped.step} of {STEPS}" in job.output()
    assert "stopped after run.max_steps: 12 of 15 steps" in job.output()
    shortened = Store(run).progress()
    assert (shortened.step, shortened.cursor.epoch, shortened.cursor.seen) == (12, 2, 24), "it is within an epoch"
    alone = shutil.copytree(run, tmp_path / "alone")  # with folders in place of its links, as by cp -rL

    job = train(2, base, run)
    assert job.wait() == 0, job.output()
    assert f"resuming {run} at step 12 of {STEPS}" in job.output()
    first_new = next(row for row in rows(run) if row["step"] > 12)
    assert (first_new["step"], first_new["epoch"]) == (13, pytest.approx(2 + 36 / 57)), "it goes on within the epoch"
    evaluated = {key: value for key, value in scores(run).items() if key[0] == 12 and key[1].startswith("val/")}
    assert len(evaluated) == 5
    ends = {key: value for key, value in scores(run).items() if key not in evaluated}
    assert ends == pytest.approx(scores(reference(base, 2)), rel=1e-9)
    for name in ("model.safetensors", "training.pt"):
        assert checkpoint(run)[name] == checkpoint(reference(base, 2))[name], f"{name} differs"

    job = train(1, base, alone)
    assert job.wait() == 0, job.output()
    assert Store(alone).progress().finished
    assert scores(alone)[15, "train/loss"] == pytest.approx(ends[15, "train/loss"], abs=0.3)


def test_shortened_to_a_whole_epoch(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    job = train(1, base, run, max_steps=10)
    assert job.wait() == 0, job.output()
    assert "stopped after run.max_steps: 10 of 15 steps" in job.output()
    progress = json.loads(checkpoint(run)["progress.json"])
    assert (progress["step"], progress["cursor"], progress["finished"]) == (10, {"epoch": 2, "seen": 0}, False)

    before = checkpoint(run)
    job = train(1, base, run, max_steps=10)
    assert job.wait() == 0 and "has reached run.max_steps 10" in job.output()
    assert checkpoint(run) == before

    job = train(1, base, run)
    assert job.wait() == 0, job.output()
    assert_same_end(run, reference(base, 1))


def test_stop_at_the_end_of_an_epoch(base: Path, tmp_path: Path) -> None:
    """It is saved before it is evaluated, which may take longer than whoever stops it will wait."""
    run = tmp_path / "a run"
    settings = settings_of(base, run) | {"run.log_every": "100", "run.save_every": "100"}
    cfg = load(dotted(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stop = StopFlag()
        stop.raised = True
        stopped = fit(cfg, SOLO, stop)
        assert (stopped.step, stopped.cursor) == (5, Cursor(0, TRAIN)) and not stopped.finished
        assert not any("val/loss" in row for row in rows(run))
        assert fit(cfg, SOLO, StopFlag()).finished
    finally:
        torch.set_num_threads(threads)
    assert checkpoint(run) == checkpoint(reference(base, 1))
    wanted = {key: value for key, value in scores(reference(base, 1)).items() if key[0] in (5, 10, 15)}
    assert scores(run) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("every", ["1", "3 steps"])
def test_broken_off_in_a_long_validation(
    every: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps until then are saved before, and the run that goes on validates at once."""
    run = tmp_path / "a run"
    rarely = {"run.log_every": "100", "run.save_every": "100", "run.validate_every": every, "engine.threads": "1"}
    cfg = load(dotted(settings_of(base, run) | rarely))
    calls = count(1)

    def broken_off_in_the_second(*args: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.session.LONG_S", 0.0)
        patch.setattr("trainer.session.evaluate", broken_off_in_the_second)
        with pytest.raises(MemoryError):
            fit(cfg, SOLO, StopFlag())
    saved = Store(run).progress()
    assert (saved.step, saved.cursor.epoch) == ((10, 1) if every == "1" else (6, 1))
    assert fit(cfg, SOLO, StopFlag()).finished
    assert [row["step"] for row in rows(run) if "val/loss" in row][:2] == ([5, 10] if every == "1" else [3, 6])
    assert checkpoint(run)["model.safetensors"] == checkpoint(reference(base, 1))["model.safetensors"]


def test_two_ranks_log_what_the_table_of_metrics_says(base: Path) -> None:
    logged = {name for row in rows(reference(base, 2)) for name in row} - {"step", "epoch", "time"}
    usual = {name for name, when in metrics_table().items() if when in (*USUAL, "several ranks")}
    assert usual <= logged <= metrics_table().keys()
    last = rows(reference(base, 2))[-2]
    assert last["train/samples"] == last["epoch"] * TRAIN and 0 < last["perf/host_mem_gib"] < 100
    assert 0 < last["perf/compute_ms"] < 2 * last["perf/step_ms_p95"] and last["perf/mfu_pct"] > 0
