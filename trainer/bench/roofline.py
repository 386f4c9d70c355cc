"""Limits of a machine, each part measured bare, and the meaning of a run's distance from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.distributed import DistContext
from trainer.engine.config import Precision

_SIDE, _SIDE_GPU = 2048, 16384  # of the square matrices: large enough that a larger one gains nothing
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOTICED = 0.05
"""Share of a step's time; from this share on, waiting for data or for other ranks counts as what holds a run back."""


# ---- measured bare --------------------------------------------------------------------------------------------------


def matmul(precision: Precision, ctx: DistContext) -> Callable[[], float]:
    """Make a function that multiplies two large square matrices on this rank and returns the number of FLOPs.

    `precision` is resolved: fp32 (TF32 on a GPU, as for a run), bf16 or fp16.
    """
    side = _SIDE_GPU if ctx.device.type == "cuda" else _SIDE
    left, right = torch.randn(2, side, side, device=ctx.device, dtype=_DTYPES[precision]).unbind()
    product = torch.empty_like(left)

    def multiply() -> float:
        torch.mm(left, right, out=product)
        return 2.0 * side**3

    return multiply


def decode(folder: Path, size_px: int, ctx: DistContext) -> Callable[[], float]:
    """Make a function that decodes a batch of `folder`'s train/CLASS/*.jpg on this rank's cores and returns their number."""
    from data_pipeline.bench.peers import CONTESTANTS, LIMIT, Task  # here, for it needs DALI

    delivery = CONTESTANTS[LIMIT].deliver(Task(folder, size_px, ctx.cores))
    return lambda: next(delivery)


# ---- what holds a run back ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Medians over all ranks, in images/s."""

    loader: float
    compute: float
    """Speed without communication, on synthetic images."""
    joined: float
    """Speed with communication, on synthetic images; equal to `compute` for a single rank."""
    end_to_end: float
    decode: float | None = None
    """Speed of bare decoding; None where it was not measured."""


@dataclass(frozen=True)
class Setting:
    """Settings of a run that decide which option to change."""

    cores: int
    """Processor cores of each rank."""
    gpu: bool
    precision: Precision
    """Resolved."""
    best_precision: Precision
    """Precision that `auto` means on this machine."""
    compile: str
    compression: str
    accumulate: int
    threads: int | None
    decode: str
    mfu: float
    """Share of the measured matmul's FLOP/s that the run uses, end to end."""


def verdict(rates: Rates, setting: Setting) -> str:
    """Say in one sentence what holds the run back, by how much, and which option to change."""
    step = 1 / rates.end_to_end
    waiting = (step - 1 / rates.joined) / step
    exposed = (1 / rates.joined - 1 / rates.compute) / step
    if max(waiting, exposed) < NOTICED:
        return _compute(setting, min(1.0, (1 / rates.compute) / step))  # noise may make it more
    return _data(rates, setting, waiting) if waiting >= exposed else _communication(setting, exposed)


def _data(rates: Rates, setting: Setting, waiting: float) -> str:
    shared = rates.loader > 1.1 * rates.end_to_end  # alone the loader is fast enough
    if shared:
        held = (
            f"A share of the machine holds this run back: alone the loader delivers {rates.loader:.0f} images/s, but "
            f"working beside the computation it costs {waiting:.0%} of the time"
        )
    else:
        held = f"The loader holds this run back: {waiting:.0%} of the time is spent waiting for its images"
    if setting.gpu and shared == (setting.decode != "cpu"):
        return f"{held}; decode elsewhere: --data.decode {'cpu' if shared else 'auto'}"
    if setting.threads is not None and setting.threads < setting.cores:
        return f"{held}; leave out --data.threads {setting.threads}, as each process has {setting.cores} cores"
    if setting.threads is not None and setting.threads > setting.cores:
        return f"{held}; lower --data.threads {setting.threads} to the {setting.cores} cores of a process"
    decoding = f", for which decoding is {rates.loader / rates.decode:.0%} of the work" if rates.decode else ""
    return f"{held}; make its images small by python -m data_pipeline.pack and give the pack as --data.path{decoding}"


def _communication(setting: Setting, exposed: float) -> str:
    held = f"Communication holds this run back: {exposed:.0%} of the time the ranks wait for gradients"
    if setting.compression == "none":
        return f"{held}; send half of the bytes: --engine.compression bf16"
    more = 2 * setting.accumulate
    return f"{held}; send them less often: --optim.accumulate {more}, with --data.batch as many times as large"


def _compute(setting: Setting, share: float) -> str:
    held = (
        f"Computation holds this run back: {share:.0%} of the time, at {setting.mfu:.0%} of the FLOP/s of a large matmul "
        f"in {setting.precision}"
    )
    if setting.precision == "fp32" and setting.best_precision != "fp32":
        return f"{held}; this machine multiplies {setting.best_precision} faster: --engine.precision auto"
    if setting.compile == "off":
        return f"{held}; have it compiled where that is faster: --engine.compile auto"
    return f"{held}; no option is left to change, only faster or more processors help"
