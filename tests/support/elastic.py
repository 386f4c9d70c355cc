"""Configuration of torchrun's own library, for ranks that it forks."""

import uuid

from torch.distributed.launcher.api import LaunchConfig


def this_machine(ranks: int) -> LaunchConfig:
    """Configure `ranks` processes on this machine alone."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,  # two runs on one machine must not find each other
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
