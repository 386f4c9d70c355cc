"""Find the nodes of slow ranks, and leave them out when a job is queued again.

SLURM takes a list of nodes to leave out for a pending job alone, so the job is queued first, and its script, which SLURM then
ends, has the time that SIGTERM leaves it (KillWait, 30 s by default). Where that fails the job may start on these nodes again.
"""

import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError, printable
from launch.slurm.commands import run_slurm
from launch.slurm.submission import Submission
from trainer.tracking.json_lines import METRICS, read_lines


def slow_ranks(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the alerts of `lines` of metrics.jsonl about ranks that are slow at its end; see `SlowRanks`."""
    named: dict[int, dict[str, Any]] = {}
    for line in lines:
        match line:
            case {"alert": "slow rank", "rank": int(rank), "node": str(), "phase": str(), "slower_pct": float()}:
                named[rank] = line
            case {"alert": "rank no longer slow", "rank": int(rank)}:
                named.pop(rank, None)
            case {"perf/slow_ranks": 0}:  # another start of the run, perhaps on other nodes
                named.clear()
    return list(named.values())


def nodes_to_leave(submission: Submission, job: str) -> list[str]:
    """Return the nodes to leave out, with those that are already: empty where none is slow, or not enough others are there."""
    if not submission.job.profile.get("exclude_slow"):
        return []
    slow = {one["node"] for one in slow_ranks(read_lines(Path(submission.job.run) / METRICS))}
    if not slow:
        return []
    left_out = run_slurm("squeue", "--noheader", f"--jobs={job}", "--format=%x").strip()
    nodes = _node_names([*slow, *([] if left_out in ("", "(null)") else [left_out])])
    try:
        # The job itself would wait for ever: SLURM does not refuse a list that leaves too few nodes.
        script = run_slurm("scontrol", "write", "batch_script", os.environ["SLURM_JOB_ID"], "-")
        run_slurm("sbatch", "--test-only", f"--exclude={','.join(nodes)}", stdin=script)
    except UserError as error:
        print(
            f"slow ranks on {printable(', '.join(sorted(slow)))}, but the job cannot do without: {printable(str(error))}"
        )
        return []
    return nodes


def leave_out(job: str, nodes: list[str]) -> None:
    """Keep a job that has just been queued again off these nodes. Raises `UserError`."""
    run_slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
    print(f"left out, as ranks were slow there: {', '.join(nodes)}", flush=True)


def outlive_the_job() -> None:
    """Go on when SLURM ends the processes of this job, until it kills them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _node_names(lists: Iterable[str]) -> list[str]:
    """Pick what may be a list of nodes, such as gpu[03-06,11]; a name comes from a file in the run folder."""
    return sorted(one for one in lists if re.fullmatch(r"[\w.,\[\]-]+", one, re.ASCII))
