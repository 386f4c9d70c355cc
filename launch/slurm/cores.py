"""Processor cores to ask for where a profile names none: each process's share of a node."""

import re
from contextlib import suppress

from data_pipeline.common.errors import UserError
from launch.slurm.commands import run_slurm
from launch.slurm.profile import Profile


def cores_per_task(profile: Profile) -> int | None:
    """Ask SLURM for a task's share of the cores of the profile's nodes; None leaves it to the cluster.

    With GPUs it is a node's cores by its GPUs, without them by the job's tasks. Where the nodes of a partition differ it is
    the smallest, so that the job may run on each of them.
    """
    with suppress(UserError):
        partitions = run_slurm("scontrol", "--oneliner", "show", "partition")
        return share(profile, partitions, run_slurm("scontrol", "--oneliner", "show", "node"))
    return None


def share(profile: Profile, partitions: str, nodes: str) -> int | None:
    """Compute `cores_per_task` from what `scontrol --oneliner` shows, a line each."""
    shares = []
    for partition in map(_fields, partitions.splitlines()):
        name = partition.get("PartitionName", "")
        wanted = profile.partition.split(",") if profile.partition else [name] * (partition.get("Default") == "YES")
        if name not in wanted:
            continue
        limit = partition.get("MaxCPUsPerNode", "")
        for node in map(_fields, nodes.splitlines()):
            if name not in node.get("Partitions", "").split(","):
                continue
            cores = int(
                node.get("CPUEfctv") or node.get("CPUTot") or 0
            )  # the first is without those kept for the system
            gpus = sum(int(count) for count in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", node.get("Gres", "")))
            if limit.isdecimal():
                cores = min(cores, int(limit))
            if gpus >= profile.gpus_per_node:
                shares.append(cores // (gpus if profile.gpus_per_node else profile.ranks_per_node))
    return min(shares, default=0) or None


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))
