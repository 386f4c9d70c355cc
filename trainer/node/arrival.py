"""Messages of the ranks to each other before they join and when they fail, through the store at which they meet."""

import json
import os
import platform
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch.distributed import Store

from data_pipeline.common.errors import UserError
from trainer.node import cores, gpus
from trainer.node.network import View

_FAREWELL_S = 3.0  # time in which ranks that fail alike should have done so


class Place(NamedTuple):
    """Node and GPU of a rank, for people who look for them."""

    node: str
    gpu: str
    """UUID as nvidia-smi prints it; empty for the CPU."""

    def __str__(self) -> str:
        return f"{self.node}, {self.gpu}" if self.gpu else self.node


class Arrival(NamedTuple):
    """One rank's message before it joins."""

    mistake: str = ""
    """Text of the `UserError` that keeps it from joining."""
    gpu: str = ""
    """UUID; empty where it computes on the CPU."""
    numa_node: int = -1
    """NUMA node of the GPU; -1 where it is not known."""
    host: str = ""
    local_rank: int = 0
    cpus: tuple[int, ...] = ()
    """Processors that it may use."""
    view: View = View()

    @property
    def place(self) -> Place:
        return Place(self.host.partition(" ")[0], f"GPU-{self.gpu.removeprefix('GPU-')}" if self.gpu else "")


def exchange(store: Store, rank: int, world: int, own: Arrival) -> list[Arrival]:
    """Tell `own` to the other ranks, and return every rank's message. Collective.

    Raises `UserError`, the same on all ranks, where one has made a mistake or two have one GPU between them.
    """
    keys = [f"arrived/{number}" for number in range(world)]
    store.set(keys[rank], json.dumps(own))
    store.wait(keys)
    everyone = []
    for text in store.multi_get(keys):
        told = Arrival(*json.loads(text))
        everyone.append(told._replace(cpus=tuple(told.cpus), view=View(*told.view)))
    try:
        for number, arrival in enumerate(everyone):
            if arrival.mistake:
                raise UserError(f"rank {number}: {arrival.mistake}" if number else arrival.mistake)
        gpus.check_gpus([arrival.gpu for arrival in everyone])
    except UserError:
        all_fail(store, rank, world)  # so that the store outlives what the others read
        raise
    return everyone


def take_cores(everyone: list[Arrival], rank: int, local_world: int, *, bind: bool) -> int:
    """Return how many of its node's cores are this process's share; `bind` keeps it on them, unless a launcher has done so."""
    own = everyone[rank]
    node = sorted((one for one in everyone if one.host == own.host), key=lambda one: one.local_rank)
    if len(node) != local_world:  # not all ranks of a node tell the same name for it
        return max(1, len(own.cpus) // local_world)
    if bind and local_world > 1 and all(one.cpus == own.cpus for one in node):
        part = cores.share(cores.in_order(own.cpus), [one.numa_node for one in node], node.index(own))
        if part:
            cores.bind(part)
    sharing = sum(not set(own.cpus).isdisjoint(one.cpus) for one in node)
    return max(1, len(own.cpus) // sharing)


def all_fail(store: Store, rank: int, world: int) -> bool:
    """Return True where the other ranks have met a mistake as well, so that none of them waits for this one."""
    failed, gone = ([f"{what}/{number}" for number in range(world)] for what in ("failed", "gone"))
    wait = timedelta(seconds=_FAREWELL_S)
    try:
        store.set(failed[rank], "")
        store.wait(failed, wait)
        store.set(gone[rank], "")
    except RuntimeError:  # some have not, or the store's host has ended
        return False
    if rank == 0:  # the store may be in this process, and the others may still ask
        with suppress(RuntimeError):
            store.wait(gone, wait)
    return True


def host_name() -> str:
    """Name that the processes of one node have in common, its own before a space; it tells apart nodes of one machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{os.environ.get('SLURMD_NODENAME') or platform.node()} {boot.read_text().strip() if boot.exists() else ''}"
