"""What turns batches into weights: forward, backward, all-reduce, update."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.common.errors import UserError
from data_pipeline.config import require
from data_pipeline.loader import IGNORE_LABEL, Batch
from trainer.checkpoint.host_copy import METADATA
from trainer.checkpoint.store import StateWriter
from trainer.distributed import resolve_precision
from trainer.engine.config import Compression as Compression
from trainer.engine.config import EngineConfig, Precision
from trainer.optim.config import OptimConfig

WEIGHTS, STATE = "model.safetensors", "training.pt"

SUMS = ("loss", "top1", "top5", "images", "grad_norm")
"""What `Engine.step` adds up, in this order."""

PRESENT = 0.2
"""Share of a mixed image above which the binary loss takes its class to be there; that of timm's recipes with this loss."""


class Engine(Protocol):
    module: nn.Module
    """The network in training, unwrapped: its keys never say "module." or "_orig_mod."."""

    @property
    def predict(self) -> Callable[[Tensor], Tensor]:
        """Logits [B, classes] float32 of images [B, 3, H, W] uint8, by the averaged weights where there are any."""
        ...

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        """One whole update. Returns this rank's sums [5] float64 on the device (see SUMS); nothing waits for them."""
        ...

    def sync_buffers(self) -> None:
        """Give all ranks rank 0's statistics of batch normalisation, before evaluating. Collective."""
        ...

    def capture_state(self, metadata: dict[str, str]) -> StateWriter:
        """Weights and training state as they are now: a function that writes this rank's files of them into a folder.

        Collective; the function is not, and may be called in another thread while training goes on, but no more once
        there is a newer snapshot. What it raises is OSError.
        """
        ...

    def load(self, folder: Path) -> None:
        """Continue exactly where the snapshot in `folder` was taken. Collective."""
        ...


class Normalise(nn.Module):
    """uint8 pixels [B, 3, H, W] to (pixel / 255 - mean) / std, float32, in the same memory layout."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        super().__init__()
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(1, 3, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(1, 3, 1, 1) / torch.tensor(std, device=device).view(
            1, 3, 1, 1
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


class Predictor:
    """Images to logits: `network` in evaluation mode, normalisation and precision included."""

    def __init__(self, network: nn.Module, normalise: nn.Module, cfg: EngineConfig, device: torch.device) -> None:
        self.network, self.normalise = network, normalise
        self.autocast = Autocast(cfg.precision, device)
        self._forward = compiled(network, cfg, device)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, classes] float32 of `images` [B, 3, H, W] uint8."""
        was_training = self.network.training
        self.network.eval()
        with torch.inference_mode(), self.autocast():
            logits = self._forward(self.normalise(images)).float()
        self.network.train(was_training)
        return logits


class Autocast:
    """The precision of forward passes on a device."""

    def __init__(self, wanted: Precision, device: torch.device) -> None:
        self.precision, self.device = resolve_precision(wanted, device), device

    def __call__(self) -> torch.autocast:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype or torch.float32, enabled=dtype is not None)

    @property
    def product_dtype(self) -> torch.dtype:
        """Of products beside those passes that bear a short mantissa, but not a short exponent."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def check_device(cfg: EngineConfig, device: torch.device) -> None:
    """Make sure that an engine can work on `device` as it is told. Raises `UserError`."""
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
    """`module`, or it compiled for each shape of images that it meets. Raises `UserError` without a compiler."""
    check_device(cfg, device)
    if cfg.compile == "off" or (cfg.compile == "auto" and device.type != "cuda"):
        return module
    # Each resolution in training and in evaluation is a shape of its own, and more of them than torch expects is no error.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    return torch.compile(module, dynamic=False, mode=cfg.compile_mode)


def keep_compiled(cfg: EngineConfig, run: Path) -> None:
    """Have what torch.compile makes kept where a restarted run finds it. To be called before anything is compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cfg.compile_cache or str(run / "compiled")


def training_loss(logits: Tensor, batch: Batch, optim: OptimConfig) -> Tensor:
    """Sum of `optim.loss` over the counted rows, with label smoothing (Szegedy et al. 2015, sec. 7)."""
    targets = batch.labels if batch.targets is None else batch.targets
    smoothing = optim.label_smoothing
    if optim.loss == "cross_entropy":
        losses = functional.cross_entropy(
            logits, targets, ignore_index=IGNORE_LABEL, label_smoothing=smoothing, reduction="none"
        )
    else:
        classes = logits.shape[1]
        if batch.targets is None:
            targets = functional.one_hot(targets.clamp_min(0), classes)
        present = (targets > PRESENT).to(logits.dtype) * (1 - smoothing) + smoothing / classes
        losses = functional.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(dim=1)
    # Rows without any target have a loss too, by label smoothing or as images of no class.
    return torch.where(batch.labels != IGNORE_LABEL, losses, 0).sum()


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights strictly. Raises `UserError` where they are not those of such a module."""
    with _reading(folder / WEIGHTS):
        module.load_state_dict(load_file(folder / WEIGHTS))


def load_state(file: Path, device: torch.device) -> dict[str, Any]:
    """What `packed_state` made of training state. Raises `UserError` for a file of anything but tensors and plain values."""
    with _reading(file):
        state: dict[str, Any] = unpickled(file, device)
        return state


def unpickled(file: Path, device: torch.device, *known: type) -> Any:
    """What torch.save wrote: tensors, containers, plain values and what is `known`; else torch's error, without its warning."""
    with torch.serialization.safe_globals([*known]), warnings.catch_warnings(action="ignore"):
        return torch.load(file, map_location=device, weights_only=True)


def read_metadata(folder: Path) -> dict[str, str]:
    """What a checkpoint's weights say of themselves: the model's name, and the names of its classes as JSON.

    Raises `UserError` where they cannot be read.
    """
    with _reading(folder / WEIGHTS), safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata: dict[str, str] = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        return metadata


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__).partition(". ")[0].rstrip(".: ")
        raise UserError(
            f"{file}: it cannot be loaded ({why}); restore it, or begin anew in another --run.dir"
        ) from None


def count(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """[4] float64 sums over the counted rows: loss, top-1 hits, top-5 hits, rows. `logits` [B, classes], `labels` [B]."""
    counted = labels != IGNORE_LABEL
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]) & counted[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted.sum()]).double()
