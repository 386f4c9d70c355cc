"""Networks compiled by torch.compile, where it is asked for and available."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import require
from data_pipeline.common.launcher import warn_on_rank0
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig


def check_device(cfg: EngineConfig, device: torch.device) -> None:
    """Check that an engine can work on `device` with these options. Raises `UserError`."""
    require(
        not cfg.sync_bn or device.type == "cuda",
        "engine.sync_bn: torch has it for GPUs only, and there is none here; leave it out",
    )
    why = lacking(device.type) if cfg.compile == "on" else None
    require(not why, f"engine.compile: on, but {why}, or give off")


def check_graphs(cfg: EngineConfig, ctx: DistContext, accumulate: int) -> None:
    """Check that CUDA graphs, which two of the compiler's modes record, would train as they should. Raises `UserError`."""
    if cfg.compile == "off" or cfg.compile_mode == "default" or ctx.device.type != "cuda":
        return
    several = accumulate > 1 or cfg.fit_memory
    require(
        not several,
        f"engine.compile_mode: {cfg.compile_mode} adds up gradients of several micro-batches wrongly, or fails "
        "(github.com/pytorch/pytorch/issues/169545); set it to default, or optim.accumulate to 1 without engine.fit_memory",
    )
    require(
        ctx.world == 1,
        f"engine.compile_mode: {cfg.compile_mode} fails, or is many times slower, with batch normalisation on several GPUs "
        "(github.com/pytorch/pytorch/issues/139207 and 140395); set it to default",
    )


def choose_compile(cfg: EngineConfig, ctx: DistContext) -> EngineConfig:
    """Resolve `auto` to on or off, the same on all ranks; where a GPU's machine lacks a part, a line says so. Collective."""
    if cfg.compile != "auto":
        return cfg
    if ctx.device.type != "cuda" or (cfg.name == "deepspeed" and cfg.zero_stage == 3):
        return replace(cfg, compile="off")
    missing = [why for why in ctx.gather_objects(lacking(ctx.device.type)) if why]
    if missing:
        warn_on_rank0(f"engine.compile: auto is off here, as {missing[0]}")
    return replace(cfg, compile="off" if missing else "on")


def compiled(module: nn.Module, cfg: EngineConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return `module`, compiled for each shape of images if so asked. Raises `UserError` without a compiler."""
    check_device(cfg, device)
    if cfg.compile == "off" or (cfg.compile == "auto" and (device.type != "cuda" or lacking(device.type))):
        return module
    # Each resolution in training and in evaluation is a shape of its own; more of them than torch expects is no error.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    return torch.compile(module, dynamic=False, mode=cfg.compile_mode)


@cache
def lacking(device_type: str) -> str | None:
    """Say what torch.compile lacks here for such a device, and the package that has it; None where nothing is lacking.

    For a CPU it writes C++. For a GPU Triton does without nvcc, but builds the part that starts its kernels when the first
    of them runs: in C, with the headers of Python.
    """
    if device_type == "cpu":
        there = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
        return None if there else "there is no C++ compiler here; install g++"
    # As triton.runtime.build finds them.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not shutil.which(compiler):
        return "Triton needs a C compiler, and there is none here; install gcc"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if not (headers / "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Triton needs Python's headers, and there is no {headers}/Python.h; install python{version}-dev"
    # Both may be there, and the headers of C not.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.c")
        source.write_text("#include <Python.h>\n#include <stdio.h>\n")
        built = subprocess.run(
            [compiler, str(source), "-shared", "-fPIC", f"-I{headers}", "-o", f"{folder}/trial.so"], capture_output=True
        )
    failed = f"Triton needs a C compiler, and {compiler} cannot build a library here; install gcc and libc6-dev"
    return failed if built.returncode else None
