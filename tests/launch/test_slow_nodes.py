"""Nodes of slow ranks that a job leaves out when it is queued again: on a real SLURM, with jobs that do nothing else."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm.submission import Job, Submission
from tests.support.cluster import Cluster, running_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


JOB = """#!/bin/bash
#SBATCH --requeue --nodes={nodes} --time=5 --open-mode=append --output={run}/log.txt
echo "start ${{SLURM_RESTART_COUNT:-0}} on $SLURM_JOB_NODELIST" | tee -a {run}/starts.txt
[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0
echo '{{"step": 9, "epoch": 1, "time": 1, "alert": "slow rank", "rank": 0, "node": "'$SLURMD_NODENAME'", "phase": "data", \
"slower_pct": 41.0}}' > {run}/metrics.jsonl
{python} -m launch.slurm.after {folder} 0
"""


@pytest.mark.parametrize("nodes", [1, 2], ids=["another node is there", "none is"])
def test_a_node_of_a_slow_rank(cluster: Cluster, tmp_path: Path, nodes: int) -> None:
    submission = Submission(tmp_path / "submission")
    submission.folder.mkdir()
    profile = {"max_crashes": 1, "exclude_slow": True}
    submission.write_job(Job(str(tmp_path), str(tmp_path), profile, "v", "2026-01-31 12:00:00"))
    submission.write_outcome(0, "handed over")
    script = JOB.format(nodes=nodes, run=tmp_path, folder=submission.folder, python=sys.executable)
    (tmp_path / "job.sh").write_text(script)
    number = cluster.run("sbatch", "--parsable", str(tmp_path / "job.sh")).strip()
    starts = tmp_path / "starts.txt"

    # SLURM itself waits ten seconds before it starts the job again. A start sooner finds the first one still ending, and fails.
    cluster.eventually(
        lambda: starts.exists() and len(starts.read_text().splitlines()) == 2,
        lambda: cluster.run("scontrol", "show", "job", number) + (tmp_path / "log.txt").read_text(),
    )
    first, second = (line.rpartition(" ")[2] for line in starts.read_text().splitlines())
    said = (tmp_path / "log.txt").read_text()
    if nodes == 1:
        assert second != first and f"left out, as ranks were slow there: {first}\n" in said
    else:
        assert second == first and "but the job cannot do without: sbatch: " in said
