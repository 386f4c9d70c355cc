"""Precision and threads of a run. They decide how sums round, so a resumed run keeps them, or says that it does not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch

from trainer.checkpoint.progress import Arithmetic
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig, Precision
from trainer.engine.precision import processor, resolve_precision

_ORDER: tuple[Precision, ...] = (
    "fp32",
    "fp16",
    "bf16",
)  # every processor computes in the first; in the later ones fewer do


def choose_arithmetic(
    cfg: EngineConfig, ctx: DistContext, before: Arithmetic | None
) -> tuple[EngineConfig, Arithmetic, list[str]]:
    """Choose this run's arithmetic after `before`: the options as resolved, what they stand for, lines for the user.

    A given option decides. Otherwise a run resumed on CPUs keeps fp32, as bf16 would be slow on some, and at the
    same number of processes its threads. Collective.
    """
    lines = []
    cfg = replace(cfg, precision=_precision(cfg, ctx, before))
    threads, cores = _threads(cfg, ctx, before), _gathered(torch.get_num_threads(), ctx)
    now = Arithmetic(cfg.precision, threads, processor(ctx.device))
    if before and threads != cores and cfg.threads is None and ctx.device.type == "cpu":
        lines.append(
            f"keeps {threads[0]} threads a process, for the same bits as before; there are cores for {cores[0]}, which "
            f"--engine.threads {cores[0]} uses"
        )
    if not before and ctx.device.type == "cpu" and (unheard := _unheard(cfg, ctx, threads[0])):
        lines.append(unheard)
    if before and (what := before.differences(now)):
        lines.append(f"its bits will differ from those of a run that was not interrupted: {what}")
    return cfg, now, lines


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Let torch take kernels that give the same bits each time, and refuse operations that have none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU multiplies its first matrices
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = cudnn.benchmark, memory.fill_uninitialized_memory
    # A benchmark takes what is fastest at the moment. Memory that was not written is read nowhere, so it is not filled.
    cudnn.benchmark = memory.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark, memory.fill_uninitialized_memory = before


def _precision(cfg: EngineConfig, ctx: DistContext, before: Arithmetic | None) -> Precision:
    """Choose the same on all ranks: where their processors differ, what all of them are good at."""
    own = resolve_precision(cfg.precision, ctx.device)
    if cfg.precision == "auto" and before and before.precision == "fp32" and ctx.device.type == "cpu":
        own = "fp32"
    return _ORDER[min(_gathered(_ORDER.index(own), ctx))]


def _threads(cfg: EngineConfig, ctx: DistContext, before: Arithmetic | None) -> list[int]:
    """Threads of each rank."""
    if ctx.device.type != "cpu":
        return [0] * ctx.world
    if cfg.threads is None and before and len(before.threads) == ctx.world and min(before.threads) > 0:
        return before.threads
    return _gathered(cfg.threads or torch.get_num_threads(), ctx)


def _unheard(cfg: EngineConfig, ctx: DistContext, threads: int) -> str | None:
    """Say that OMP_NUM_THREADS is not obeyed. With several processes it is torchrun's, which sets it to 1."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if cfg.threads is not None or ctx.world > 1 or not wanted.isdecimal() or int(wanted) in (0, threads):
        return None
    return (
        f"OMP_NUM_THREADS is {int(wanted)}, but this run computes with {threads}, one for each core; "
        f"--engine.threads {int(wanted)} obeys it"
    )


def _gathered(number: int, ctx: DistContext) -> list[int]:
    return [int(value) for value in ctx.gather(torch.tensor([number], device=ctx.device)).flatten().tolist()]
