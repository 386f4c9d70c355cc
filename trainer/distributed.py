"""Processes and device of a run. The only file that asks for CUDA."""

import atexit
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from data_pipeline.common.errors import UserError
from data_pipeline.common.launcher import launched_rank
from data_pipeline.sharding import RankInfo

T = TypeVar("T")


@dataclass(frozen=True)
class DistContext(RankInfo):
    """This process among the `world` processes of a run."""

    @property
    def primary(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

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


@contextmanager
def open_dist_context() -> Iterator[DistContext]:
    """Join the processes that torchrun started, or stand alone; leave them at the end."""
    rank, world = launched_rank(), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = max(1, len(os.sched_getaffinity(0)) // local_world)
    torch.set_num_threads(cores)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():  # raised on every rank, but only rank 0 prints
            raise UserError(
                f"--nproc_per_node: {local_world} processes on a node with {torch.cuda.device_count()} GPUs; "
                "start one process a GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for all that stays in fp32
    if world > 1:
        # torchrun keeps its store when it restarts ranks, with the addresses of those that died.
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        attempt = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=world)
        keep_group()
    try:
        yield DistContext(device, rank, world, cores)
    finally:
        if world > 1:
            dist.destroy_process_group()


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


def gpu_count() -> int:
    """Count the GPUs of this machine that a run may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
