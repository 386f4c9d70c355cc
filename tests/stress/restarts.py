"""python -m tests.stress.restarts [REPEATS]: the cost of a restart by the queue, within the allocation, and from memory.

On the cluster of slurm/dev/cluster.sh a run of two nodes saves every 40 steps. Some 30 steps after a checkpoint a rank is killed,
or its node is lost; the run's own metrics then tell how many steps it trains again, and how long ago it had made the step
from which it goes on.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.support.cluster import Cluster, running_cluster
from tests.support.runs import QUICK, dotted, render_images, rows
from trainer.checkpoint.snapshot_home import read_token

SAVE_EVERY, KILL_AT, LOST = 40, 70, "127.0.1.2"
SETTINGS = {**QUICK, "run.save_every": str(SAVE_EVERY), "run.epochs": "3", "engine.precision": "fp32"}
KINDS: dict[str, tuple[list[str], list[str], bool]] = {
    "rank killed, through the queue": (["--restarts", "0"], [], False),
    "rank killed, within the allocation": ([], [], False),
    "rank killed, snapshot in memory": ([], ["--run.snapshot_every", "5"], False),
    "node lost, a spare, snapshot in memory": (["--spares", "1"], ["--run.snapshot_every", "5"], True),
}
"""Interruption -> options of the job, and of the training; True where a node is lost."""


def main() -> None:
    repeats = int("".join(sys.argv[1:2]) or 3)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        images = render_images(base / "images", train=1800, val=24)
        with running_cluster(base, nodes=3) as cluster:
            print("| | steps trained again | seconds without training | lost seconds |\n|---|---|---|---|", flush=True)
            for kind, (job, training, lose) in KINDS.items():
                found = []
                for number in range(repeats):
                    run = base / f"{kind} {number}"
                    settings = {**SETTINGS, "data.path": str(images), "run.dir": str(run)}
                    cluster.submit(run, ["--nodes", "2", *job], [*dotted(settings), *training])
                    found.append(interrupted(cluster, run, lose))
                    cluster.launch("cancel", str(run))
                    cluster.wait(run, "CANCELLED", "COMPLETED", "FAILED")
                    if lose:
                        cluster.script("start-node", LOST)
                        cluster.until(run, lambda: f"{LOST} idle" in cluster.run("sinfo", "-h", "-N", "-o", "%N %t"))
                steps, down_s, lost_s = (median(values) for values in zip(*found, strict=True))
                print(f"| {kind} | {steps:.0f} | {down_s:.1f} | {lost_s:.1f} |", flush=True)


def interrupted(cluster: Cluster, run: Path, lose: bool) -> tuple[float, float, float]:
    """Interrupt the run. Returns the steps that it trains again, the seconds without training, and those that are lost in all."""
    cluster.until(run, lambda: any(row["step"] >= KILL_AT for row in rows(run)[-1:]))
    last_s = rows(run)[-1]["time"]
    if lose:
        cluster.script("kill-node", LOST)
        shutil.rmtree(f"{read_token(run)}-{LOST}")  # its memory is lost too
    else:
        os.kill(rank_on(LOST, run), signal.SIGKILL)
    cluster.until(run, lambda: any("perf/lost_s" in row for row in rows(run)))
    row = next(row for row in rows(run) if "perf/lost_s" in row)
    return row["perf/lost_steps"], row["time"] - last_s, row["perf/lost_s"]


def rank_on(node: str, run: Path) -> int:
    """Find the process of a rank of the run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        here = f"SLURMD_NODENAME={node}\0".encode() in variables and b"\0RANK=" in variables
        if here and b"\0launch.slurm.job\0" in command and os.fsencode(run) in command:
            return int(process.name)
    raise LookupError(f"no rank of {run} on {node}")


if __name__ == "__main__":
    main()
