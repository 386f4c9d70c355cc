"""What turns batches into weights: forward, backward, all-reduce, update."""

import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.loader import UNCOUNTED, Batch
from trainer.machine import Machine, Precision, resolve_precision
from trainer.optim import Ema, OptimConfig, build_optimizer

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

    def save(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write weights and training state into `folder`. Collective."""
        ...

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` left off. Collective."""
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


class DdpEngine:
    """Data parallelism by torch's DDP (Li et al. 2020, arXiv 2006.15704), or a single process.

    Each rank keeps its own running statistics of batch normalisation while it trains, and those of rank 0 are the
    model's: they do not influence the weights, so keeping them is enough to continue bit for bit.
    """

    def __init__(
        self, module: nn.Module, normalise: nn.Module, cfg: EngineConfig, optim: OptimConfig, machine: Machine
    ) -> None:
        self.machine, self.optim, self.normalise = machine, optim, normalise
        device = machine.device
        self.module = module.to(device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.module, optim, device)
        self.ema = Ema(self.module, optim) if optim.ema_decay > 0 else None
        self.judged = self.ema.module if self.ema else self.module  # what evaluation and the saved weights are about
        self.predict = Predictor(self.judged, normalise, cfg, device)
        self.autocast = self.predict.autocast
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast.precision == "fp16")
        self.updates = 0
        self.replica: nn.Module = self.module
        if machine.world > 1:
            self.replica = DistributedDataParallel(
                self.module,
                device_ids=[device.index] if device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )
            self._settle_buckets()
        self._forward = compiled(self.replica, cfg, device)

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.machine.device)
        for number, batch in enumerate(micro_batches, start=1):
            with self._no_sync() if number < len(micro_batches) else nullcontext():
                with self.autocast():
                    logits = self._forward(self.normalise(batch.images)).float()
                losses = self._loss(logits, batch)
                # DDP averages over ranks; this makes the average the mean over the images of the whole update.
                self.scaler.scale(losses * self.machine.world / batch.total).backward()
            sums[:4] += count(logits.detach(), batch.labels, losses.detach())
        sums[4] = self._update()
        return sums

    def agree(self) -> None:
        self.machine.broadcast([*self.module.buffers(), *(self.ema.module.buffers() if self.ema else ())])

    def save(self, folder: Path, metadata: dict[str, str]) -> None:
        if not self.machine.primary:
            return
        weights = {name: tensor.detach().contiguous() for name, tensor in self.judged.state_dict().items()}
        # A single entry, since safetensors writes several in random order: equal weights make equal files. And files are
        # written by Python, whose error names a full disk as such.
        (folder / WEIGHTS).write_bytes(save(weights, {_METADATA: json.dumps(metadata)}))
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "updates": self.updates}
        if self.ema:
            state["module"] = self.module.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        (folder / STATE).write_bytes(buffer.getbuffer())

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.machine.device, weights_only=True)
        load_weights(self.judged, folder)
        if self.ema:
            self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run has been in another precision up to now
            self.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.replica.no_sync() if isinstance(self.replica, DistributedDataParallel) else nullcontext()

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum over the counted rows of cross-entropy with label smoothing (Szegedy et al. 2015, sec. 7)."""
        targets = batch.labels if batch.targets is None else batch.targets
        losses = functional.cross_entropy(
            logits, targets, ignore_index=UNCOUNTED, label_smoothing=self.optim.label_smoothing, reduction="none"
        )
        # Label smoothing gives a loss to rows without any target too.
        return torch.where(batch.labels != UNCOUNTED, losses, 0).sum()

    def _update(self) -> Tensor:
        """Clip, step, average; returns the norm of the gradient before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.module.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.optim.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.module, self.updates)
        self.updates += 1
        return norm

    def _settle_buckets(self) -> None:
        """Let DDP order its buckets now.

        It does so after its first backward pass, and the order decides how sums over three or more ranks round: a
        resumed run would otherwise differ from an uninterrupted one in its first step.
        """
        self.module.eval()
        pixels = next(self.module.parameters()).new_zeros(2, 3, 32, 32)
        self.replica(pixels).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.train()


def compiled(module: nn.Module, cfg: EngineConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    wanted = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    return torch.compile(module) if wanted else module


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
