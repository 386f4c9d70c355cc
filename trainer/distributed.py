"""Processes and device of a run. The only file that asks for CUDA."""

import atexit
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.common.errors import UserError
from data_pipeline.common.launcher import launched_rank, leave_alone
from data_pipeline.sharding import RankInfo
from trainer.node import cores, gpus, network
from trainer.node.arrival import Arrival, Place, all_fail, exchange, host_name, take_cores

T = TypeVar("T")
CPU = torch.device("cpu")

PATIENCE_S = 1800.0
"""Time for which ranks wait for each other if a run does not say otherwise."""

_FOR_EVER_S = 14 * 86400.0  # NCCL counts its patience in milliseconds, in 32 bits


@dataclass(frozen=True)
class DistContext(RankInfo):
    """This process among the `world` processes of a run."""

    timeout_s: float = PATIENCE_S
    """Time after which a collective fails."""
    places: tuple[Place, ...] = ()
    """Node and GPU of each rank; empty where there is only one."""

    @property
    def primary(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        """True on one process of each node."""
        nodes = [place.node for place in self.places]
        return not nodes or nodes.index(nodes[self.rank]) == self.rank

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` up over all ranks, in place. Collective."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather the `values` of all ranks as [world, ...] on the CPU. Collective."""
        if self.world == 1:
            return values[None].cpu()
        everyone = [torch.empty_like(values, device=self.device) for _ in range(self.world)]
        dist.all_gather(everyone, values.to(self.device))
        return torch.stack(everyone).cpu()

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of rank 0. Collective."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def raise_together(self, act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """`act()` on this rank; if it raises on any, every rank raises the first of these errors. Collective.

        A `UserError` stays one, and says which rank met it, if that is not the first; another error of one of several ranks
        becomes a RuntimeError with its traceback. `group` is other connections than the usual ones, for another thread.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = act()
        except UserError as error:
            failure = UserError(f"rank {self.rank}: {error}") if self.rank else error
        except Exception:
            if self.world == 1:
                raise
            failure = RuntimeError(f"rank {self.rank} failed\n{traceback.format_exc()}")
        failures: list[Exception | None] = [failure] * self.world
        if self.world > 1:
            dist.all_gather_object(failures, failure, group)
        first = next((one for one in failures if one is not None), None)
        if first is not None:
            raise first
        return result  # type: ignore[return-value]

    def gather_objects(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """`value` of each rank, in their order, on all of them. Collective."""
        values: list[T] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group)
        return values

    def run_on_rank0(self, act: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
        """`act()` on rank 0 alone; every rank waits for it, and raises its error if it meets one. Collective."""
        self.raise_together(lambda: act() if self.primary else None, group)

    def broadcast_from_rank0(self, choose: Callable[[], T]) -> T:
        """Run `choose()` on rank 0, and return its result on every rank. Collective."""
        chosen = [choose() if self.primary else None]
        if self.world > 1:
            dist.broadcast_object_list(chosen, src=0)
        return chosen[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here with all its work done, the GPU's included. Collective."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world > 1:
            dist.barrier()

    def new_group(self) -> Any:
        """Open further connections between the CPUs of all ranks, for another thread. None for one. Collective.

        Not of some ranks: torch has those outside of a new group split NCCL's connections, of whatever kind the group is,
        and NCCL waits there for all ranks, so for ever (`perform_nocolor_split`).
        """
        if self.world == 1:
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))

    def enter_thread(self) -> None:
        """Let the calling thread use this rank's GPU; a new one would open a context on the first, which costs memory there."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


@contextmanager
def open_dist_context(
    *, device: Literal["auto", "cpu"] = "auto", bind_cores: bool = True, patience_s: float = PATIENCE_S
) -> Iterator[DistContext]:
    """Join the processes that a launcher started, or stand alone; leave them at the end.

    `device` cpu passes over the GPUs. `bind_cores` keeps each of several ranks on its own share of the node's cores, near
    its GPU. A collective fails after a wait of twice `patience_s` or half an hour, whichever is longer; 0: after two weeks.

    Where this rank fails and others do not, it leaves without a word to them, as they may be in the middle of a
    collective: they fail when its connections close. Raises `UserError`, on every rank, for a device that cannot be used.
    """
    rank, world = launched_rank(), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world == 1:
        gpu, _ = _find_gpu(local_rank, device)
        yield DistContext(gpu or CPU, cores=_use_threads(len(os.sched_getaffinity(0))))
        return

    # The store outlives a meeting: torchrun keeps it when it restarts ranks, and a process may join several times.
    meeting, _, _ = next(dist.rendezvous("env://", rank, world))
    store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}", meeting)
    gpu, found = None, Arrival()
    try:
        gpu, found = _find_gpu(local_rank, device)
    except UserError as error:
        found = Arrival(mistake=str(error))  # raised on all ranks, as they would wait for this one
    found = found._replace(
        host=host_name(),
        local_rank=local_rank,
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        view=network.view(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
    )
    everyone = exchange(store, rank, world, found)
    share = _use_threads(take_cores(everyone, rank, local_world, bind=bind_cores))
    timeout_s = max(PATIENCE_S, 2 * patience_s) if patience_s else _FOR_EVER_S
    _prepare_backends(network.interface(found.view, [one.view for one in everyone]), timeout_s)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=gpu,  # NCCL connects now, and barriers know their GPU
    )
    keep_group()
    try:
        yield DistContext(gpu or CPU, rank, world, share, timeout_s, tuple(one.place for one in everyone))
    except BaseException as error:
        # Other ranks may wait in a collective for this one, and to destroy the group would be to wait for them.
        if isinstance(error, UserError) and all_fail(store, rank, world):
            dist.destroy_process_group()
        else:
            leave_alone()
        raise
    dist.destroy_process_group()


def _find_gpu(local_rank: int, device: str) -> tuple[torch.device | None, Arrival]:
    """Make a GPU this process's own, None for the CPU. Raises `UserError` where there is one that cannot be used."""
    visible = gpu_count(device)
    why = gpus.evidence(os.environ) if device != "cpu" and not visible else None
    if why:
        raise gpus.unusable(why, torch.__version__, str(torch.version.cuda), gpus.driver_version(), _complaint())
    if not visible:
        return None, Arrival()
    found = torch.device("cuda", gpus.index_for(local_rank, visible))
    gpu: Any = torch.cuda.get_device_properties(found)  # torch's types lack its place on the bus
    gpus.check_architecture(gpu.name, (gpu.major, gpu.minor), torch.cuda.get_arch_list())
    torch.cuda.set_device(found)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 for all that stays in fp32
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    return found, Arrival(gpu=str(gpu.uuid), numa_node=cores.numa_node(address))


def _complaint() -> str:
    """First sentence of torch's own words on why it can use no GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].partition(". ")[0]
    return "it finds none"


def _use_threads(count: int) -> int:
    torch.set_num_threads(count)
    return count


def _prepare_backends(interface: str | None, timeout_s: float) -> None:
    """Set what NCCL and gloo read from the environment, unless the user has."""
    # NCCL's own watchdog must not end the process before ours has said which rank holds up the others.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout_s)))
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


_meetings = count()
_groups: list[object] = []
atexit.register(_groups.clear)


def keep_group() -> None:
    """Keep the process group until the interpreter is about to end, even if it is left before.

    The last one to release it waits for its threads. With a communication hook that may be one of these threads itself, a
    moment after the training has ended, and gloo then aborts the process ("Resource deadlock avoided"). The interpreter
    must not end first either: a thread that then frees the tensors of the last collective wants the interpreter's lock,
    and the process is aborted as well ("terminate called without an active exception").
    """
    _groups.append(dist.group.WORLD)


def gpu_count(device: str = "auto") -> int:
    """Count the GPUs of this machine that a run with that `engine.device` may use."""
    if device == "cpu":
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an old driver, which is refused in a line of our own
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
