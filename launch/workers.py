"""Run the processes of a training on one node, through torchrun's own library.

As a program, torchrun reports the failure of a process at length and with exit code 1. Called from here, a user's mistake
stays the one line that rank 0 prints, and exit code 2.
"""

import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


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


def join_nodes(variables: Mapping[str, str], ranks: int) -> LaunchConfig:
    """Configure `ranks` processes on this node, one of WORLD_SIZE nodes; the first node is at MASTER_ADDR.

    The rendezvous is static, because torchrun's own numbers the nodes in another way than SLURM.
    """
    nodes = int(variables["WORLD_SIZE"])
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id=variables["MASTER_PORT"],
        rdzv_backend="static",
        rdzv_endpoint=f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}",
        rdzv_configs={"rank": int(variables["RANK"])},
        max_restarts=0,
    )


def run_workers(config: LaunchConfig, module: str, arguments: list[str]) -> int:
    """Run `python -m module arguments` in every process. Returns 0, the first failure's exit code, or 128 + N for signal N."""
    logging.disable(logging.CRITICAL)  # torchrun's report
    try:
        with tempfile.TemporaryDirectory() as notes:  # torchrun would leave this folder in /tmp
            config.logs_specs = DefaultLogsSpecs(log_dir=notes)
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as received:
        return 128 + int(received.sigval)
    return 0
