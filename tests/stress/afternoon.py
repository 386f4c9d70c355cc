"""python -m tests.stress.afternoon [--minutes 40] [--seed 0] [--out DIR]: all that befalls a run in an afternoon.

On the cluster of slurm/dev/cluster.sh a run of two nodes and a spare one keeps snapshots in memory, and a mirror on a small
disk. For so many minutes one mishap after another befalls it (`mishaps.MISHAPS`), in a random order at random moments.
Meanwhile agents of W&B train a sweep of six trials against a server on this machine: one trial is stopped, one taken away.
Then the run is cancelled, handed in again to end soon, and compared with one that was left alone:

the run         the same weights to the bit, and each row of metrics.jsonl once, with the same loss
the logs        have each mishap with its cause
the mirror      restores the run as it is
the trials      are all accounted for, in their folders and by the server

Exits with 1 where anything was lost or not told.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

from data_pipeline.common.cli import parse_plain
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import require
from tests.end_to_end.test_faults import mounted
from tests.stress.mishaps import MISHAPS, NODES, SAVED, Trouble, tail
from tests.stress.trials import sweep_through
from tests.support.cluster import Cluster, running_cluster
from tests.support.recorded import faults_of_weights
from tests.support.runs import QUICK, descendants, dotted, render_images, rows, tree
from tests.support.wandb_backend import isolate, serving
from trainer.checkpoint.mirror_restore import Mirrored
from trainer.checkpoint.snapshot_home import read_token
from trainer.checkpoint.store import Store

JOB = ["--nodes", "2", "--spares", "1", "--partition", "low", "--max_crashes", "1000"]
OPTIONS = QUICK | {
    "run.log_every": "5",
    "run.save_every": "50",
    "run.snapshot_every": "10",
    "run.stall_s": "60",
    "run.epochs": "100000",  # more than there is time for: it ends by run.max_steps
    "optim.warmup": "0",
    "engine.precision": "fp32",
    "engine.threads": "1",
}
GAP_S = (1.0, 40.0)  # from the moment when all is well again to the next mishap
MORE_STEPS = 100  # until the run ends, when the afternoon is over


class Told(NamedTuple):
    """A mishap and what became of it."""

    minute: float
    kind: str
    done: str
    said: str
    """Line of the log with its cause."""
    lost_steps: float | None = None
    """Steps that were trained again; None where the training did not stand still."""
    lost_s: float | None = None


class Afternoon:
    """Record of all that has happened so far, printed as it happens."""

    def __init__(self) -> None:
        self.begin_s = time.monotonic()
        self.told: list[Told] = []
        self.faults: list[str] = []

    def tell(self, kind: str, done: str, said: str, cost: dict[str, Any]) -> None:
        one = Told(self.minute, kind, done, said, cost.get("perf/lost_steps"), cost.get("perf/lost_s"))
        self.told.append(one)
        lost = "" if one.lost_s is None else f"{one.lost_steps:.0f} steps, {one.lost_s:.1f} s"
        print(f"| {one.minute:.1f} | {done} | {said.partition('; ')[0][:130]} | {lost} |", flush=True)

    @property
    def minute(self) -> float:
        return (time.monotonic() - self.begin_s) / 60

    def summary(self) -> str:
        lines = ["| | times | steps trained again | seconds lost |", "|---|---|---|---|"]
        for kind in dict.fromkeys(one.kind for one in self.told):
            ours = [one for one in self.told if one.kind == kind]
            lost = [(one.lost_steps, one.lost_s) for one in ours if one.lost_s is not None]
            steps, seconds = zip(*lost, strict=True) if lost else ((), ())
            lines.append(f"| {kind} | {len(ours)} | {_spread(steps)} | {_spread(seconds)} |")
        return "\n".join(lines)


def _spread(values: tuple[Any, ...]) -> str:
    """Median and range."""
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})" if values else ""


def afternoon(base: Path, minutes: float, seed: int, disk: Path) -> Afternoon:
    """A run and a sweep at once."""
    seen = Afternoon()
    with (
        pytest.MonkeyPatch.context() as patch,
        serving() as backend,
        running_cluster(base, nodes=len(NODES)) as cluster,
        ThreadPoolExecutor() as pool,
    ):
        isolate(base, patch)
        patch.setenv("WANDB_BASE_URL", backend.url)
        patch.setenv("PATH", cluster.environment["PATH"])
        small = QUICK | {"data.path": str(render_images(base / "few images")), "run.epochs": str(round(4 * minutes))}
        sweep = pool.submit(sweep_through, base / "home", small, backend, random.Random(seed), seen.tell)

        try:
            mishaps_of_a_run(seen, cluster, base, minutes, random.Random(seed), disk)
        except BaseException:
            for pid in descendants(os.getpid()):  # the agent among them, for which the pool waits
                os.kill(pid, signal.SIGTERM)
            raise
        seen.faults += [*sweep.result(), *backend.faults]
    return seen


def mishaps_of_a_run(
    seen: Afternoon, cluster: Cluster, base: Path, minutes: float, draw: random.Random, disk: Path
) -> None:
    """Raises AssertionError where the run does not tell of a mishap, or does not go on."""
    run, images = base / "the run", render_images(base / "images", train=610, val=23)
    options = OPTIONS | {"data.path": str(images), "run.dir": str(run), "run.name": run.name, "run.mirror": str(disk)}
    cluster.submit(run, JOB, dotted(options))
    cluster.until(run, lambda: bool(tail(run)))
    trouble, mishaps, end = Trouble(cluster, run, disk, draw), list[str](), seen.minute + minutes
    while seen.minute < end:
        mishaps = mishaps or draw.sample([*MISHAPS], len(MISHAPS))
        time.sleep(draw.uniform(*GAP_S))
        kind = mishaps.pop()
        seen.tell(kind, *trouble.inflict(kind))

    # A user cancels the run, and hands it in again to end soon.
    trouble.mark()
    cluster.launch("cancel", str(run))
    said = trouble.expect(SAVED)
    cluster.wait(run, "CANCELLED")
    last = Store(run).progress().step + MORE_STEPS
    cluster.submit(run, JOB, dotted(options | {"run.max_steps": str(last)}))
    seen.tell("cancelled", "cancelled, and submitted again", said, trouble.await_training())
    seen.faults += ended(cluster, run, last)

    # Left alone, by the same options.
    whole = base / "left alone"
    alone = {"data.path": str(images), "run.dir": str(whole), "run.max_steps": str(last)}
    cluster.submit(whole, JOB, dotted(OPTIONS | alone))
    seen.faults += ended(cluster, whole, last)
    seen.faults += [
        *compared(run, whole),
        *restored(run, disk, base / "restored"),
    ]


def ended(cluster: Cluster, run: Path, last: int) -> list[str]:
    """Wait for the end of a run, however long it takes."""
    while cluster.state(run) not in ("COMPLETED", "FAILED", "CANCELLED"):
        time.sleep(1)
    step, end = Store(run).progress().step, cluster.submission(run).end
    token = read_token(run)
    left = [str(home) for home in token.parent.glob(f"{token.name}-*")] if token else []
    faults = [f"{run} ended as {end} at step {step}, not {last}"] if (end, step) != ("stopped", last) else []
    return faults + ([f"{run} has left {left} in memory"] if left else [])


def compared(run: Path, whole: Path) -> list[str]:
    """Compare a run with one that was left alone. Returns its faults."""
    ours, theirs = (
        {(row["step"], name): row[name] for row in rows(one) for name in row if name.endswith("/loss")}
        for one in (run, whole)
    )
    faults, steps = faults_of_weights(run, whole), [[row["step"] for row in rows(one)] for one in (run, whole)]
    if steps[0] != steps[1]:
        faults.append(f"metrics.jsonl has rows at {len(steps[0])} steps, not {len(steps[1])}, or at others")
    differing = [at for at, loss in theirs.items() if ours.get(at) != pytest.approx(loss, rel=1e-9)]
    return faults + [f"{len(differing)} losses in metrics.jsonl differ, first {at}" for at in differing[:1]]


def restored(run: Path, disk: Path, place: Path) -> list[str]:
    """Restore the run from its mirror, and compare. Returns what is not the same."""
    Mirrored(str(disk), run.name, Store(place)).restore(lambda saved: None)
    there = len(Store(run).folders()) == len(Store(place).folders())
    same = {name: (run / name).read_bytes() == (place / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    for link in ("last", "best"):
        same[f"the {link} checkpoint"] = tree(run / "checkpoints" / link) == tree(place / "checkpoints" / link)
    lost = [f"restored from the mirror, {name} is another" for name, alike in same.items() if not alike]
    return lost + ([] if there else ["the mirror has another number of checkpoints"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.afternoon", exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--minutes", type=float, default=40, help="Time in which mishaps happen; comparing takes half as long."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the mishaps.")
    parser.add_argument("--out", type=Path, help="New folder for all files, kept; a temporary one if not given.")
    args = parse_plain(parser, sys.argv[1:])
    require(args.minutes > 0, f"--minutes: {args.minutes} is not positive; give a number such as 40")
    require(args.out is None or not args.out.exists(), f"--out: {args.out} exists; give a new folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started
    with tempfile.TemporaryDirectory(prefix="sluice-afternoon-") as temporary:
        base = (args.out or Path(temporary)).absolute()
        base.mkdir(exist_ok=True)
        with mounted(base / "disk", "-t", "tmpfs", "-o", "size=64m", "none") as disk:
            print("| minute | what happened | what the log said | lost |\n|---|---|---|---|", flush=True)
            seen = afternoon(base, args.minutes, args.seed, disk)
    print(
        "",
        seen.summary(),
        "",
        *(seen.faults or ["nothing was lost"]),
        f"seed {args.seed}, {seen.minute:.1f} min",
        sep="\n",
    )
    sys.exit(bool(seen.faults))


if __name__ == "__main__":
    run_command(main)
