"""What turns batches into weights: forward, backward, all-reduce, update."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.loader import UNCOUNTED, Batch
from trainer.machine import Precision, resolve_precision

WEIGHTS, STATE = "model.safetensors", "training.pt"
_METADATA = "sluice"

SUMS = ("loss", "top1", "top5", "images", "grad_norm")
"""What `Engine.step` adds up, in this order."""


@dataclass(frozen=True)
class EngineConfig:
    """How an update is computed."""

    name: Literal["ddp"] = "ddp"
    """Data parallelism: ddp is torch's DistributedDataParallel."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward; weights stay fp32. auto: bf16 where the hardware multiplies it, else fp16
    on a GPU and fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for GPUs and off for CPUs. On a CPU it needs a C++ compiler."""


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

    def agree(self) -> None:
        """Give all ranks rank 0's statistics of batch normalisation, before evaluating. Collective."""
        ...

    def snapshot(self, metadata: dict[str, str]) -> Callable[[Path], None]:
        """Weights and training state as they are now: a function that writes this rank's files of them into a folder.

        Collective; the function is not. What it raises is OSError.
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


def compiled(module: nn.Module, cfg: EngineConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    wanted = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    return torch.compile(module) if wanted else module


def smooth_loss(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Sum over the counted rows of cross-entropy with label smoothing (Szegedy et al. 2015, sec. 7)."""
    targets = batch.labels if batch.targets is None else batch.targets
    losses = functional.cross_entropy(
        logits, targets, ignore_index=UNCOUNTED, label_smoothing=smoothing, reduction="none"
    )
    # Label smoothing gives a loss to rows without any target too.
    return torch.where(batch.labels != UNCOUNTED, losses, 0).sum()


def packed_weights(module: nn.Module, metadata: dict[str, str]) -> bytes:
    """What WEIGHTS holds: every tensor under its name, readable by `load_weights` and `read_metadata`."""
    weights = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    # A single entry, since safetensors writes several in random order: equal weights make equal files.
    return save(weights, {_METADATA: json.dumps(metadata)})


def packed_state(state: dict[str, Any]) -> memoryview:
    """What STATE holds. Files are written by Python and not by torch, as its error names a full disk as such."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights strictly."""
    module.load_state_dict(load_file(folder / WEIGHTS))


def read_metadata(folder: Path) -> dict[str, str]:
    """What a checkpoint's weights say of themselves: the model's name, and the names of its classes as JSON."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata: dict[str, str] = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        return metadata


def count(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """[4] float64 sums over the counted rows: loss, top-1 hits, top-5 hits, rows. `logits` [B, classes], `labels` [B]."""
    counted = labels != UNCOUNTED
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]) & counted[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted.sum()]).double()
