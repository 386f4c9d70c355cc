"""Training on a real SLURM: to the end, and through all that a cluster does to a job on the way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.slurm.commands import run_slurm
from launch.slurm.profile import Profile, Request
from launch.slurm.submission import Submission
from launch.slurm.submit import executor_for, script_of
from launch.supervisor.record import recorded_restarts
from tests.conftest import HOSTILE_NAMES
from tests.support.cluster import Cluster, running_cluster
from tests.support.runs import ROOT, checkpoint, dotted, render_images, rows, settings_of
from tests.support.wandb_backend import wandb_rows
from trainer.check.results import read
from trainer.checkpoint.store import Store

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 2, 10
SLOWLY = {"model.width": "1"}
"""SLURM takes seconds to act on a job, which shall not have ended by then."""
TWO_BY_TWO = ["--nodes", "2", "--tasks_per_node", "2"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def cluster(base: Path) -> Iterator[Cluster]:
    cwd = base / "submitted from here"
    cwd.mkdir()
    with running_cluster(cwd) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, base: Path) -> Path:
    """Folder of a run of two nodes with two ranks each, with a name to trip over."""
    run = base / "it's 100% \"un\\disturbed\"\t; $HOME [ü] 'x"
    cluster.submit(run, TWO_BY_TWO, settings(base, run))
    cluster.wait(run, "COMPLETED", "FAILED")
    assert Store(run).progress().finished, cluster.said(run)
    return run


def settings(base: Path, run: Path) -> list[str]:
    """Bits are compared, so the precision must not be chosen by how fast the machine happens to be."""
    return dotted({**settings_of(base, run, EPOCHS), **SLOWLY, "engine.precision": "fp32"})


def test_trial_of_a_sweep_is_waited_for(cluster: Cluster, base: Path) -> None:
    """And cancelled where it is stopped, saving first."""
    of_trial = {"WANDB_SWEEP_ID": "5weep", "WANDB_RUN_ID": "trial0"}
    longer = dotted({**settings_of(base, base, 400), "run.name": "mine"})
    settings = [word for word in longer if word not in ("--run.dir", str(base))]
    command = [sys.executable, "-m", "launch", "submit", "--", *settings]
    with subprocess.Popen(command, cwd=cluster.cwd, env=cluster.environment | of_trial) as process:
        run = cluster.cwd / "runs/mine-trial0"
        cluster.eventually(lambda: bool(rows(run)), lambda: "no row")
        assert process.poll() is None
        process.terminate()
    assert process.returncode == -signal.SIGTERM, "which an agent does not take for a failure"
    assert cluster.state(run) == "CANCELLED" and Store(run).progress().step > 0


def assert_same_end(run: Path, whole: Path) -> None:
    """The same bytes, and each step's row once."""
    ours, theirs = checkpoint(run), checkpoint(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], f"{name} differs"
    losses = {row["step"]: row["train/loss"] for row in rows(run) if "train/loss" in row and "val/loss" not in row}
    assert len(losses) == sum("train/loss" in row and "val/loss" not in row for row in rows(run))
    wanted = {row["step"]: row["train/loss"] for row in rows(whole) if "train/loss" in row and "val/loss" not in row}
    assert losses == pytest.approx(wanted, rel=1e-9)


def assert_events_once(run: Path) -> None:
    """TensorBoard shows the steps that metrics.jsonl has, none of them twice."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    wanted = [(row["step"], row["train/loss"]) for row in rows(run) if "train/loss" in row]
    assert [step for step, _ in shown] == [step for step, _ in wanted] == list(range(1, STEPS + 1))
    assert [loss for _, loss in shown] == pytest.approx([loss for _, loss in wanted], rel=1e-6)


def test_two_nodes_to_the_end(cluster: Cluster, undisturbed: Path) -> None:
    submission = cluster.submission(undisturbed)
    assert submission.job.profile["nodes"] == 2
    assert submission.end == "finished"
    logs = sorted(file.name for file in submission.folder.glob("rank-*.log"))
    assert logs == ["rank-0.log", "rank-1.log", "rank-2.log", "rank-3.log"]
    assert "epoch 2/2" in submission.rank_log(0).read_text()
    for rank, node in enumerate([0, 0, 1, 1]):
        assert (
            f"rank {rank} of 4, number {rank % 2} of 2 on 127.0.1.{node + 1}" in submission.rank_log(rank).read_text()
        )
    assert "submitit" not in submission.script_log.read_text()

    shown = cluster.launch("status", str(undisturbed.parent))
    line = next(line for line in shown.stdout.splitlines() if "disturbed" in line)
    assert "finished" in line and "2.00" in line, shown
    assert "epoch 2/2" in cluster.launch("logs", str(undisturbed)).stdout
    again = cluster.launch("resubmit", str(undisturbed))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "is finished" in again.stderr


def test_preempted_in_mid_epoch(cluster: Cluster, base: Path, undisturbed: Path) -> None:
    """A job of the high partition needs both nodes; the run saves, makes room, and goes on by itself."""
    run = base / "preempted"
    cluster.submit(run, [*TWO_BY_TWO, "--partition", "low"], settings(base, run))
    cluster.wait_for_step(run, 2)
    cluster.run("srun", "--partition=high", "--nodes=2", "--exclusive", "true")
    stopped = Store(run).progress()
    assert 2 <= stopped.step < STEPS and not stopped.finished
    cluster.wait(run, "COMPLETED", "FAILED")
    assert cluster.restarts(run) == 1
    assert "saved on a signal: queued again" in cluster.said(run)
    assert f"resuming {run} at step {stopped.step} of {STEPS}" in cluster.said(run)
    submission = cluster.submission(run)
    assert (submission.crashes, submission.restarts, submission.end) == (0, 1, "finished")
    assert_same_end(run, undisturbed)


def test_requeued_cancelled_and_resubmitted_to_fewer_nodes(cluster: Cluster, base: Path) -> None:
    """W&B has every row, though SLURM's signals go to each process of a job."""
    run = base / "requeued"
    cluster.submit(run, ["--nodes", "2"], [*settings(base, run), "--run.epochs", "4", "--tracking.wandb", "offline"])
    cluster.wait_for_step(run, 1)
    cluster.run("scontrol", "requeue", cluster.job(run))
    cluster.wait(run, "PENDING")
    saved = Store(run).progress()
    assert 1 <= saved.step < STEPS, "SIGTERM had it saved"
    twice = cluster.launch("resubmit", str(run))
    assert (twice.returncode, twice.stderr.count("\n")) == (2, 1) and "cancel it first" in twice.stderr

    cluster.wait_for_step(run, saved.step + 2, restarts=1)
    assert f"resuming {run} at step {saved.step}" in cluster.said(run)
    first = cluster.submission(run)
    assert cluster.launch("cancel", str(run)).returncode == 0
    cluster.wait(run, "CANCELLED")
    stopped = Store(run).progress()
    assert saved.step + 2 <= stopped.step < 2 * STEPS
    assert cluster.restarts(run) == 1, "it stays cancelled"
    assert (first.crashes, first.end) == (0, "cancelled")

    again = cluster.launch("resubmit", str(run), "--nodes", "1")
    assert again.returncode == 0, again.stderr
    followed = cluster.launch("logs", "-f", str(run))
    assert f"resuming {run} at step {stopped.step} of {2 * STEPS}" in followed.stdout
    assert "epoch 4/4" in followed.stdout, "it follows to the end"
    assert Store(run).progress().finished
    second = cluster.submission(run)
    assert second.folder != first.folder and second.job.profile["nodes"] == 1
    words = first.rank_log(0).read_text() + second.rank_log(0).read_text()
    assert "if it was cancelled: python -m launch resubmit " in words and "dropped" not in words
    assert "Bypassing" not in first.script_log.read_text()
    segments = [wandb_rows(path) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    steps = [row["train/step"] for segment in segments for row in segment]
    assert len(segments) == 3 and list(dict.fromkeys(steps)) == [*range(1, 2 * STEPS + 1)]


def test_resubmitted_to_another_number_of_nodes(cluster: Cluster, base: Path, undisturbed: Path) -> None:
    """As many ranks on fewer nodes go on in mid-epoch with the images that were next: the end is the same to the bit."""
    run = base / "from two nodes to one"
    cluster.submit(run, TWO_BY_TWO, [*settings(base, run), "--tracking.tensorboard", "true"])
    cluster.wait_for_step(run, 2)
    cluster.run("scancel", "--signal=USR2", cluster.job(run))
    cluster.wait(run, "PENDING")
    assert 2 <= Store(run).progress().step < STEPS
    assert cluster.launch("cancel", str(run)).returncode == 0
    again = cluster.launch("resubmit", str(run), "--nodes", "1", "--tasks_per_node", "4")
    assert again.returncode == 0, again.stderr
    cluster.wait(run, "COMPLETED", "FAILED")
    assert "rank 3 of 4, number 3 of 4 on " in cluster.said(run)
    assert_same_end(run, undisturbed)
    assert_events_once(run)


def test_a_sweep(cluster: Cluster, base: Path) -> None:
    """One array: of its runs one is requeued, one fails, one is cancelled and handed in again, and none minds the others."""
    options = settings_of(base, base, EPOCHS) | SLOWLY
    del options["run.dir"]
    listed = [{"optim.lr": 0.01}, {"data.path": "/nowhere"}, {"optim.lr": 0.02}, {"optim.lr": 0.03, "run.epochs": 3}]
    file = cluster.cwd / "it's 100% mine.yaml"
    file.write_text(json.dumps({"options": options, "list": listed}))
    wanted = ["sweep", file.name, "--profile", "dev", "--nodes", "1", "--tasks_per_node", "1", "--parallel", "2"]
    refused = cluster.launch(*wanted, "--partition", "nope")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "invalid partition" in refused.stderr
    assert not (cluster.cwd / "runs" / file.stem).exists()

    done = cluster.launch(*wanted)
    assert done.returncode == 0 and "trains 4 runs" in done.stdout, done.stderr
    names = ["lr=0.01", "path=-nowhere", "lr=0.02", "lr=0.03,epochs=3"]
    folder = cluster.cwd / "runs" / file.stem
    saved, failing, other, waiting = runs = [folder / name for name in names]
    array = cluster.job(saved).partition("_")[0]
    assert [cluster.job(run) for run in runs] == [f"{array}_{number}" for number in range(4)]
    assert "ArrayTaskThrottle=2" in cluster.run("scontrol", "show", "job", array)
    cluster.until(waiting, lambda: "(JobArrayTaskLimit)" in line_of(cluster, waiting))  # once SLURM has looked at it
    assert cluster.launch("cancel", f"{file.stem}/{waiting.name}").returncode == 0

    cluster.wait_for_step(saved, 1)
    cluster.run("scancel", "--signal=USR2", cluster.job(saved))
    for run in (saved, other):
        cluster.wait(run, "COMPLETED", "FAILED")
        assert Store(run).progress().finished, cluster.said(run)
    assert [cluster.submission(run).restarts for run in runs] == [1, 0, 0, 0]
    assert "finished" in line_of(cluster, saved) and "cancelled" in line_of(cluster, waiting)
    assert "error: data.path: /nowhere is not a folder" in line_of(cluster, failing)
    assert "epoch 2/2" in cluster.launch("logs", f"{file.stem}/{other.name}").stdout

    again = cluster.launch("resubmit", f"{file.stem}/{waiting.name}")
    assert again.returncode == 0 and "_" not in cluster.job(waiting), again.stderr
    cluster.wait(waiting, "COMPLETED", "FAILED")
    summed = cluster.launch("summary", file.stem)
    assert summed.returncode == 0, summed.stderr
    table = pd.read_csv(folder / "summary.csv")
    assert list(table.run) == names
    assert list(table.state[[0, 2, 3]]) == ["finished"] * 3
    assert table.state[1].startswith("error: data.path: /nowhere is not a folder")
    assert list(table.epochs) == [2, 0, 2, 3]
    assert list(table.best_top1_pct[[0, 2, 3]]) == pytest.approx(
        [Store(run).progress().best_top1_pct for run in (saved, other, waiting)]
    )
    once_more = cluster.launch(*wanted, "--dry_run")  # only what is not done is handed in again
    assert once_more.returncode == 0 and "--array" not in once_more.stdout
    assert [name in once_more.stdout for name in names] == [False, True, False, False]


def line_of(cluster: Cluster, run: Path) -> str:
    """Of the table that `status` prints."""
    shown = cluster.launch("status")
    return next(line for line in shown.stdout.splitlines() if run.name in line)


def test_crashes_have_a_limit(cluster: Cluster, base: Path) -> None:
    """The first crash, a killed process, brings the job back; the second, images that have gone meanwhile, ends it."""
    run, images = base / "crashing", render_images(base / "images to lose")
    cluster.submit(
        run,
        ["--max_crashes", "1", "--restarts", "0"],
        [*settings(base, run), "--data.path", str(images), "--run.epochs", "4"],
    )
    cluster.wait_for_step(run, 4)
    cluster.until(run, lambda: Store(run).progress().step >= 3)  # written while the training goes on
    kill_rank(cluster, run)
    cluster.until(run, lambda: cluster.restarts(run) == 1)
    saved = Store(run).progress()
    images.rename(base / "lost images")
    cluster.wait(run, "FAILED")
    submission = cluster.submission(run)
    assert submission.crashes == 2
    assert submission.end and submission.end.startswith(f"error: data.path: {images}")
    assert Store(run).progress() == saved and saved.step >= 3


def kill_rank(cluster: Cluster, run: Path, node: str = "127.0.1.1") -> None:
    """SIGKILL for a rank on a node, as the kernel sends it when the memory is full."""
    folder = str(cluster.submission(run).folder)
    wanted = "\0".join([sys.executable, "-u", "-m", "launch.slurm.job", folder, ""]).encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            here = f"SLURMD_NODENAME={node}\0".encode() in (process / "environ").read_bytes()
            if here and (process / "cmdline").read_bytes() == wanted:
                os.kill(int(process.name), signal.SIGKILL)
                return


def test_a_mistake_is_not_tried_again(cluster: Cluster, base: Path) -> None:
    """Nor does the job see more of the submitting shell than it is meant to."""
    run = base / "mistaken"
    setup = 'echo "the job sees ${WANDB_API_KEY} and ${OTHER:-nothing else} and $GIVEN"'
    options = ["--nodes", "2", "--gpus_per_node", "2", "--setup", json.dumps([setup]), "--env.GIVEN", "it's $HOME"]
    mistaken = [*settings(base, run), "--engine.device", "cpu", "--data.path", "/nowhere"]  # nothing is behind the GPUs
    cluster.submit(run, options, mistaken, WANDB_API_KEY="a,b", OTHER="c")
    cluster.wait(run, "FAILED")
    assert cluster.restarts(run) == 0
    assert "rank 3 of 4, number 1 of 2 on " in cluster.said(run), "a process for each GPU"
    assert cluster.said(run).count("error: data.path: /nowhere is not a folder") == 1
    assert "the job sees a,b and nothing else and it's $HOME\n" in cluster.said(run)
    assert "error: data.path: /nowhere" in cluster.launch("status", str(base)).stdout
    written = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".log"]
    assert len(written) >= 5 and not any(b"a,b" in path.read_bytes() for path in written)


def test_time_limit(cluster: Cluster, base: Path) -> None:
    """SLURM's own warning, which may come while the training is still starting; the job is queued again."""
    run = base / "long"
    # SLURM may warn a minute too early, and nobody hears it before the processes are there.
    cluster.submit(run, ["--time", "0:02:00", "--warn_s", "40"], [*settings(base, run), "--run.epochs", "1000"])
    cluster.until(run, lambda: cluster.restarts(run) == 1)
    assert "asked to stop: saved step" in cluster.said(run)
    assert "saved on a signal: queued again" in cluster.said(run)
    assert Store(run).progress().step >= 1
    assert cluster.launch("cancel", str(run)).returncode == 0
    assert cluster.state(run) == "CANCELLED"


def test_a_lost_node(cluster: Cluster, base: Path) -> None:
    """Nobody is told: SLURM finds out, and starts the job anew from its last checkpoint."""
    run = base / "on a lost node"
    cluster.submit(run, ["--nodes", "2"], [*settings(base, run), "--tracking.tensorboard", "true"])
    cluster.wait_for_step(run, 4)
    cluster.until(run, lambda: Store(run).progress().step >= 3)
    cluster.script("kill-node", "127.0.1.2")
    cluster.until(run, lambda: cluster.restarts(run) == 1)
    saved = Store(run).progress()
    cluster.script("start-node", "127.0.1.2")
    cluster.until(run, lambda: cluster.state(run) in ("COMPLETED", "FAILED"))
    assert f"resuming {run} at step {saved.step} of {STEPS}" in cluster.said(run)
    assert Store(run).progress().finished
    assert_events_once(run)


def test_restarts_within_the_allocation(base: Path, undisturbed: Path) -> None:
    """A rank is killed, then a node is lost: each time the spare node takes its place, and SLURM has nothing to start again."""
    cwd = base / "with a spare"
    cwd.mkdir()
    run = base / "on spare nodes"
    with running_cluster(cwd, nodes=3) as cluster:
        cluster.submit(run, [*TWO_BY_TWO, "--spares", "1"], settings(base, run))
        cluster.wait_for_step(run, 2)
        kill_rank(cluster, run, "127.0.1.2")
        cluster.until(run, lambda: recorded_restarts(run).number == 1)
        wait_for_step(cluster, run, 6)
        cluster.script("kill-node", "127.0.1.3")
        cluster.script("start-node", "127.0.1.3")  # SLURM does not notice, and its srun waits for the task that is gone
        cluster.until(run, lambda: recorded_restarts(run).number == 2)
        cluster.wait(run, "COMPLETED", "FAILED")
        said, submission = cluster.said(run), cluster.submission(run)
        assert re.search(r"restart 1 on 127.0.1.1, 127.0.1.3: rank [23] on 127.0.1.2 was ended by SIGKILL", said), said
        assert "restart 2 on 127.0.1.1, 127.0.1.2: node 127.0.1.3 is lost" in said, said
        assert (submission.crashes, submission.restarts, submission.end) == (0, 0, "finished"), said
        assert cluster.restarts(run) == 0
        shown = cluster.launch("status", str(base)).stdout
        assert "finished" in next(line for line in shown.splitlines() if run.name in line)
    assert_same_end(run, undisturbed)


def wait_for_step(cluster: Cluster, run: Path, step: int) -> None:
    """Until the run reports `step` after what has just happened."""
    start_s = time.time()
    cluster.until(run, lambda: any(row["step"] >= step and row["time"] > start_s for row in rows(run)[-1:]))


def test_plain_sbatch(cluster: Cluster, base: Path) -> None:
    run = base / "by sbatch"
    log = base / "by sbatch.log"
    options = ["--gpus-per-node=0", "--ntasks-per-node=1", f"--output={log}", "--parsable"]
    # With a whole node come its GPUs, and nothing is behind them.
    ours = [*settings(base, run), "--run.epochs", "5", "--engine.device", "cpu"]
    job = cluster.run("sbatch", *options, str(ROOT / "slurm/train.sbatch"), *ours).strip()

    def state() -> str:
        return cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    cluster.eventually(lambda: len(rows(run)) > 0, log.read_text)
    shown = cluster.launch("status", str(base)).stdout
    assert "running" in next(line for line in shown.splitlines() if run.name in line)
    cluster.run("scancel", "--signal=USR2", job)
    cluster.eventually(lambda: state() == "PENDING", log.read_text)
    assert not Store(run).progress().finished
    cluster.eventually(lambda: state() == "COMPLETED", log.read_text)
    assert Store(run).progress().finished
    assert f"resuming {run} at step" in log.read_text()


@pytest.mark.slow
def test_check_of_all_nodes(cluster: Cluster, base: Path) -> None:
    """Each node by itself, in an allocation of our own, then all ranks together."""
    out = base / "it's 100% checked"
    options = ["--profile", "dev", "--out", str(out)]
    done = cluster.launch("check-nodes", *options, "--", "--only", "fit memory", "loader speed")
    assert done.returncode == 0, done.stdout + done.stderr
    for node in ("127.0.1.1", "127.0.1.2"):
        assert [one.state for one in read(out / node)] == ["pass", "skipped"]
        assert f"{node}: 1 pass, 0 FAIL, 1 skipped\n" in done.stdout
    assert re.search(r"^slow(est)? node\S* .*127\.0\.1\.\d, \d+% of the others in ", done.stdout, re.M), done.stdout
    assert "rank 3: 127.0.1.2, cpu\n" in done.stdout
    assert re.search(r"^slowest pair: ranks \d and \d on 127\.0\.1\.\d", done.stdout, re.M), done.stdout
    assert (out / "summary.txt").read_text() in done.stdout


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "x\n#SBATCH --comment=y\ntouch z"])
def test_hostile_names_stay_whole(cluster: Cluster, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the script, and in sbatch's reading of it."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    submission = Submission(tmp_path / name / "slurm" / "1")
    profile = Profile(comment=name if name.isprintable() else "plain", env={"NAME": name}, setup=['printf %s "$NAME"'])
    executor = executor_for(submission.folder, [submission], Request(profile, False), name)
    script = script_of(executor)
    run_slurm("sbatch", "--test-only", stdin=script)
    submission.folder.mkdir(parents=True)
    harmless = script.replace("\nsrun ", "\nprintf '%s\\n' ").replace(f"\n{sys.executable} ", "\nprintf '%s\\n' ")
    subprocess.run(["bash", "-c", harmless], check=True)
    said = submission.script_log.read_text()
    assert said.startswith(name)
    assert said.endswith(f"\nlaunch.slurm.after\n{submission.folder}\n0\n")
    job = run_slurm("sbatch", "--parsable", "--hold", stdin=script).strip()
    shown = run_slurm("scontrol", "show", "job", job)
    run_slurm("scancel", job)
    assert f"JobName={name if name.isprintable() else ascii(name)}\n" in shown
    assert f"Comment={profile.comment}" in shown


def test_dry_run_writes_nothing(cluster: Cluster, base: Path) -> None:
    run = base / "dry"
    done = cluster.launch("submit", "--profile", "dev", "--dry_run", "--", *settings(base, run), WANDB_API_KEY="secret")
    assert done.returncode == 0 and not run.exists()
    for line in ("--nodes=2", "--ntasks-per-node=1", "--partition=low", "--time=60", "--requeue"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert "WANDB_API_KEY" in done.stdout and "secret" not in done.stdout
    assert "#SBATCH --cpus-per-task=4\n" in done.stdout, "all of a node's, for two processes"
    done = cluster.launch("submit", "--profile", "dev", "--spares", "1", "--dry_run", "--", *settings(base, run))
    for words in ("#SBATCH --nodes=3\n", "#SBATCH --no-kill\n", " --no-kill --kill-on-bad-exit=0 "):
        assert words in done.stdout, "a lost node ends neither the job nor its step"
    given = {"DALI_X": "1", "FI_X": "1", "CUDA_HOME": "/cuda", "CUDA_VISIBLE_DEVICES": "3"}
    done = cluster.launch("submit", "--gpus_per_node", "1", "--dry_run", "--", *settings(base, run), **given)
    assert "#SBATCH --cpus-per-task=2\n" in done.stdout, "half of a node's GPUs, and half of its cores"
    exported = next(line for line in done.stdout.splitlines() if "--export=" in line and line.startswith("#SBATCH"))
    assert {"DALI_X", "FI_X", "CUDA_HOME"} <= set(exported.partition("=")[2].split(","))
    assert "CUDA_VISIBLE_DEVICES" not in exported


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--partition", "nope"], "invalid partition specified: nope"),
        (["--nodes", "3"], "More processors requested than permitted"),
        (["--gpus_per_node", "3"], "node configuration"),
        (["--constraint", "nope"], "feature"),
        (["--reservation", "nope"], "eservation"),
        (["--", "--run.dir", "50%j"], "has %j in it"),
    ],
)
def test_what_sbatch_would_refuse_is_one_line(cluster: Cluster, base: Path, options: list[str], words: str) -> None:
    run = base / "refused"
    options = options if "--" in options else [*options, "--", *settings(base, run)]
    done = cluster.launch("submit", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, done.stderr
    assert not run.exists()


def test_a_refusal_after_the_test_is_one_line_too(cluster: Cluster, base: Path, tmp_path: Path) -> None:
    """Limits on the number of jobs, which need accounting: here a stand-in for sbatch refuses, once it is meant."""
    said = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    stand_in = tmp_path / "sbatch"
    stand_in.write_text(f"""#!/bin/sh
case $1 in --*) exec {shutil.which("sbatch")} "$@";; esac
echo '{said}' >&2
exit 1
""")
    stand_in.chmod(0o755)
    run = base / "refused late"
    path = f"{tmp_path}:{cluster.environment['PATH']}"
    done = cluster.launch("submit", "--", *settings(base, run), PATH=path)
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
    assert not list((run / "slurm").iterdir())
