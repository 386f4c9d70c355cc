"""Sizes and helpers that the items share. Nothing here needs DALI."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from data_pipeline.batch import Batch
from trainer.check.cli import alone
from trainer.check.images import write_dataset
from trainer.distributed import DistContext, gpu_count
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.model.normalize import Normalise
from trainer.model.resnet import ModelConfig, build_resnet
from trainer.optim.config import OptimConfig

CLASSES = 10
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EAGER = EngineConfig(compile="off")


@dataclass(frozen=True)
class Scale:
    """Size of the work, for a kind of machine."""

    batch: int
    size_px: int
    width: float
    """Factor of the network's channels, where its speed is not measured."""
    images: int
    """Images that the loader reads in a round."""
    steps: int
    """Optimizer steps in a round."""
    values: int
    """float32 values of an all-reduce."""
    compiles: bool = True
    """Compile a network too, which takes a minute on a CPU."""


GPU = Scale(batch=256, size_px=224, width=1.0, images=16384, steps=20, values=25_000_000)
SMALL_GPU = replace(GPU, batch=32)
CPU = Scale(batch=8, size_px=64, width=0.25, images=256, steps=2, values=2_500_000)
SCALE = CPU if not gpu_count() else GPU if torch.cuda.mem_get_info()[1] > 30 << 30 else SMALL_GPU


def make_engine(
    ctx: DistContext,
    optim: OptimConfig | None = None,
    engine: EngineConfig = EAGER,
    model: ModelConfig | None = None,
    classes: int = CLASSES,
) -> DdpEngine:
    """Make an engine with freshly drawn weights, the same each time."""
    torch.manual_seed(0)
    network = build_resnet(model or ModelConfig(width=SCALE.width), classes)
    return DdpEngine(network, Normalise(MEAN, STD, ctx.device), engine, optim or OptimConfig(), ctx)


def noise(ctx: DistContext, seed: int = 0, *, rows: int | None = None, mixed: bool = False) -> Batch:
    """Make a batch of noise on the device; `mixed` has soft targets, as mixup gives."""
    rows, side = rows or SCALE.batch, SCALE.size_px
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (rows, 3, side, side), dtype=torch.uint8, generator=draw)
    labels = torch.randint(CLASSES, (rows,), generator=draw)
    targets = torch.rand(rows, CLASSES, generator=draw).softmax(dim=1).to(ctx.device) if mixed else None
    on_device = images.to(ctx.device).to(memory_format=torch.channels_last)
    return Batch(on_device, labels.to(ctx.device), torch.arange(rows), rows, rows, targets)


@contextmanager
def small_dataset(count: int = 32, side_px: int = 96, kind: str = "plain.jpg") -> Iterator[Path]:
    """Draw a dataset of two classes into a folder that is gone at the end."""
    with TemporaryDirectory(prefix="sluice-check-") as folder:
        yield write_dataset(Path(folder), count, side_px, kind)


def synchronize(ctx: DistContext) -> None:
    if ctx.device.type == "cuda":
        torch.cuda.synchronize(ctx.device)


def rate(act: Callable[[], float], ctx: DistContext, rounds: int = 3) -> float:
    """Measure what `act` does a second, as the median of some rounds; it returns how much that was."""
    rates = []
    for _ in range(rounds):
        synchronize(ctx)
        start = time.perf_counter()
        done = act()
        synchronize(ctx)
        rates.append(done / (time.perf_counter() - start))
    return median(rates)


def run_module(module: str, *arguments: str, ranks: int = 1) -> str:
    """Run `python -m module arguments` to its end, in several processes if so asked; returns what it prints.

    Raises RuntimeError with its error, and ModuleNotFoundError where it misses a package.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", module, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace", env=alone())
    if ran.returncode:
        missing = re.search(r"ModuleNotFoundError: (No module named '(.+?)')", ran.stderr)
        if missing:
            raise ModuleNotFoundError(missing[1], name=missing[2])
        raise RuntimeError(f"{module} ended with {ran.returncode}: {complaint(ran.stderr)}")
    return ran.stdout


def complaint(text: str) -> str:
    """Find the error in what a process has said: torchrun goes on behind it."""
    errors = re.findall(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|error): .+)$", text, re.M)
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return (errors or said[-1:] or ["it said nothing"])[0]
