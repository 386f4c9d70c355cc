"""Compression of the gradients that DDP sends: all bytes, or fewer that stand for them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.checkpoint.files import load_state
from trainer.checkpoint.host_copy import Content, HostCopy, packed_state
from trainer.distributed import DistContext
from trainer.engine.config import Compression

POWERSGD_RANK = 2
POWERSGD_START = 100  # steps that send whole gradients first: the early ones matter most


def bucket_mb(how: Compression, device: torch.device) -> int | None:
    """Size of the buckets that DDP reduces gradients in; None is its own.

    PowerSGD goes on with a bucket once its first sum is there. On a CPU gloo's threads do that, and those of two buckets
    would call their next sums in an order of their own on each rank; so there all gradients are one bucket.
    """
    return 1 << 20 if how == "powersgd" and device.type == "cpu" else None


def compress(ddp_model: DistributedDataParallel, how: Compression) -> PowerSGDState | None:
    """Make `ddp_model` send its gradients in this way; returns PowerSGD's memory between steps, if it is PowerSGD.

    PowerSGD (Vogels et al. 2019, arXiv 1905.13727) sends two thin factors of each weight's gradient and adds what they
    miss to the next one.
    """
    match how:
        case "bf16":
            ddp_model.register_comm_hook(None, bf16_compress_hook)
        case "fp16":
            ddp_model.register_comm_hook(None, fp16_compress_hook)
        case "powersgd":
            state = PowerSGDState(None, POWERSGD_RANK, POWERSGD_START)
            ddp_model.register_comm_hook(state, powerSGD_hook)
            return state
    return None


_TENSORS = ("error_dict", "p_memory_dict", "q_memory_dict")  # by number of the bucket


def packed(state: PowerSGDState, ctx: DistContext, copy: HostCopy) -> dict[str, Callable[[], Content]]:
    """Copy this rank's memory of PowerSGD, as a file by name; each rank has its own."""
    tensors = {name: dict(getattr(state, name)) for name in _TENSORS}
    copied = copy.of({"world": ctx.world, "iter": state.iter, **tensors}, "powersgd")
    return {_name(ctx): lambda: packed_state(copied)}


def load(state: PowerSGDState, folder: Path, ctx: DistContext) -> None:
    """Continue from what `packed` copied; afresh where the run had another number of ranks or no PowerSGD."""
    file = folder / _name(ctx)
    saved = load_state(file, ctx.device) if file.exists() else {}
    if saved.get("world") != ctx.world:
        return
    state.iter = saved["iter"]
    for name in _TENSORS:
        getattr(state, name).update(saved[name])


def _name(ctx: DistContext) -> str:
    return f"powersgd-{ctx.rank}.pt"
