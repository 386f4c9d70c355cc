"""Options of the engine. No torch is imported here: a mistake in them is reported before anything heavy is loaded."""

from dataclasses import dataclass
from typing import Literal

from data_pipeline.common.errors import UserError
from trainer.optim.config import OptimConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compression = Literal["none", "bf16", "fp16", "powersgd"]

ELEMENTWISE = ("sgd", "adamw")
"""Optimisers that change each weight by itself, so that they work on any part of all weights laid end to end."""


@dataclass(frozen=True)
class EngineConfig:
    """Options of how an optimizer step is computed."""

    name: Literal["ddp", "deepspeed"] = "ddp"
    """Data parallelism: ddp is torch's DistributedDataParallel; deepspeed divides what zero_stage says among the ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """State that deepspeed divides among the ranks: 0 nothing, 1 the optimiser's state, 2 the gradients too, 3 the weights
    too. A higher stage takes less memory."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward; weights stay fp32. auto: bf16 where the hardware multiplies it, else fp16
    on a GPU and fp32 on a CPU; a resumed run keeps its own."""
    device: Literal["auto", "cpu"] = "auto"
    """Device of each process. auto: a GPU where there is one, and one that cannot be used ends the start; cpu passes over it."""
    bind_cores: bool = True
    """Keep each of several processes of a node on cores of its own, near its GPU. What numactl or SLURM have bound stays."""
    threads: int | None = None
    """Threads that compute on each process's CPU. If not given, its share of the cores; in a resumed run the same as before,
    because another number rounds in another way."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for GPUs and off for CPUs, where it took a minute and gained nothing. It needs a C compiler
    and Python's headers on a GPU's machine, where auto is off without them, and a C++ compiler on a CPU."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Goal of the compiler, as in torch.compile. The two others take longer to compile, and record CUDA graphs: for one GPU
    and one micro-batch a step."""
    deterministic: bool = False
    """Kernels that give the same bits each time, on a GPU too, and one decoder for all images whatever data.hw_decoder_load
    says; slower. An operation without such a kernel ends the run."""
    compile_cache: str | None = None
    """Folder of compiled code, for runs to share: yours, and writable by nobody else, because its contents are run. If not
    given, compiled/ in Sluice's cache."""
    compression: Compression = "none"
    """Form in which DDP sends gradients: bf16 and fp16 take half the bytes; powersgd (Vogels et al. 2019) sends two thin
    factors of each weight's, after 100 optimizer steps of whole ones. For slow networks; each changes the weights a little."""
    sync_bn: bool = False
    """Statistics of batch normalisation over all ranks instead of each rank's own images. GPUs only."""
    fit_memory: bool = False
    """Cut micro-batches into the fewest pieces that fit into memory beside DALI, found by trials before the first step. Batch
    normalisation then sees one piece at a time. For ddp."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UserError(f"engine.threads: {self.threads} is not positive; leave it out to use the cores there are")


def check_deepspeed(cfg: EngineConfig, optim: OptimConfig) -> None:
    """Raise `UserError` for options that do not go together with the engine deepspeed. Loads nothing."""
    if cfg.name != "deepspeed":
        return
    if cfg.zero_stage > 0 and optim.name not in ELEMENTWISE:
        raise UserError(
            f"optim.name: {optim.name} needs whole weights, which ZeRO divides; choose one of "
            f"{', '.join(ELEMENTWISE)}, or set engine.zero_stage to 0"
        )
    for name, average in (("ema_decay", optim.ema_decay), ("swa", optim.swa)):
        if cfg.zero_stage == 3 and average > 0:
            raise UserError(
                f"optim.{name}: {average} needs whole weights, which ZeRO-3 divides; set it to 0, or "
                "engine.zero_stage to 2"
            )
    if optim.sam_radius > 0:
        raise UserError(f"optim.sam_radius: {optim.sam_radius} is for DDP only; set it to 0, or engine.name to ddp")
    if cfg.compression != "none":
        raise UserError(
            f"engine.compression: {cfg.compression} is for DDP only; leave it out, or set engine.name to ddp"
        )
    if cfg.sync_bn:
        raise UserError("engine.sync_bn: it is for DDP only; leave it out, or set engine.name to ddp")
    if cfg.fit_memory:
        raise UserError("engine.fit_memory: it is for DDP only; leave it out, or set engine.name to ddp")
    if cfg.zero_stage == 3 and cfg.compile == "on":
        raise UserError(
            "engine.compile: on does not work with ZeRO-3, which collects weights layer by layer; set it to off, or "
            "engine.zero_stage to 2"
        )
