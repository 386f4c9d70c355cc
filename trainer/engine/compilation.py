"""Networks compiled by torch.compile, where it is asked for and available."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import require
from trainer.engine.config import EngineConfig


def check_device(cfg: EngineConfig, device: torch.device) -> None:
    """Check that an engine can work on `device` with these options. Raises `UserError`."""
    require(
        not cfg.sync_bn or device.type == "cuda",
        "engine.sync_bn: torch has it for GPUs only, and there is none here; leave it out",
    )
    require(
        cfg.compile != "on"
        or device.type == "cuda"
        or any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")),
        "engine.compile: on, but there is no C++ compiler here; install g++, or give off",
    )


def compiled(module: nn.Module, cfg: EngineConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return `module`, compiled for each shape of images if so asked. Raises `UserError` without a compiler."""
    check_device(cfg, device)
    if cfg.compile == "off" or (cfg.compile == "auto" and device.type != "cuda"):
        return module
    # Each resolution in training and in evaluation is a shape of its own; more of them than torch expects is no error.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    return torch.compile(module, dynamic=False, mode=cfg.compile_mode)
