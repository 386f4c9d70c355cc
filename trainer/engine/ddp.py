"""Data parallelism by torch's DistributedDataParallel, and training in a single process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.common.errors import require
from data_pipeline.loader import Batch
from trainer.checkpoint.files import STATE, WEIGHTS, load_state, load_weights
from trainer.checkpoint.host_copy import Content, HostCopy, packed_state, packed_weights, writer
from trainer.checkpoint.store import StateWriter
from trainer.distributed import DistContext
from trainer.engine import gradient_compression
from trainer.engine.base import SUMS
from trainer.engine.compilation import check_device, compiled
from trainer.engine.config import EngineConfig
from trainer.engine.loss import count, training_loss
from trainer.engine.prediction import Predictor
from trainer.model.running_stats import EarlyStatistics
from trainer.optim.optimizer import Ema, OptimConfig, build_optimizer, set_lr
from trainer.resilience.watchdog import Phase


class DdpEngine:
    """Data parallelism by torch's DDP (Li et al. 2020, arXiv 2006.15704), or a single process.

    Each rank keeps its own running statistics of batch normalisation while it trains, and those of rank 0 are the
    model's: they do not influence the weights, so keeping them is enough to continue bit for bit.

    Parameters that require no gradient when it is built never will. Of the others any may be frozen for some updates, as
    long as all ranks freeze the same.
    """

    def __init__(
        self, module: nn.Module, normalise: nn.Module, cfg: EngineConfig, optim: OptimConfig, ctx: DistContext
    ) -> None:
        self.ctx, self.optim, self.normalise = ctx, optim, normalise
        device = ctx.device
        check_device(cfg, device)
        if cfg.sync_bn:
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        self.module = module.to(device).to(memory_format=torch.channels_last)
        self.ema = Ema(self.module, optim) if optim.ema_decay > 0 else None
        self.eval_model = (
            self.ema.module if self.ema else self.module
        )  # what evaluation and the saved weights are about
        self.predict = Predictor(self.eval_model, normalise, cfg, device)
        self.autocast = self.predict.autocast
        self.optimizer = build_optimizer(self.module, optim, self.autocast.product_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast.precision == "fp16")
        self.early_statistics = EarlyStatistics(self.module)
        self.updates = 0
        self.copy = HostCopy()
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if optim.name == "sgd" and optim.momentum > 0:
            # The fused kernel asks for momentum of all or of none, so not of the head alone at first; and would leave it
            # as it finds it in memory where the very first update overflows.
            for parameter in self.trained:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.ddp_model: nn.Module = self.module
        self.powersgd: PowerSGDState | None = None
        if ctx.world > 1:
            self.ddp_model = DistributedDataParallel(
                self.module,
                device_ids=[device.index] if device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=gradient_compression.bucket_mb(cfg.compression, device),
            )
            self._settle_buckets()
            self.powersgd = gradient_compression.compress(self.ddp_model, cfg.compression)
        self._forward = compiled(self.ddp_model, cfg, device)
        self._lone_forward = compiled(self.module, cfg, device) if ctx.world > 1 else self._forward
        self.chunks_per_micro_batch = 1  # of a micro-batch, each with a forward and a backward pass of its own

    def fit_memory(self, rows: int, size_px: int) -> None:
        """Cut micro-batches of so many images into the fewest pieces that memory holds, found by trial. Collective.

        Raises `UserError` where not even one image fits.
        """
        while not self._fits(-(-rows // self.chunks_per_micro_batch), size_px):
            require(
                self.chunks_per_micro_batch < rows,
                f"data.size_px: there is no memory for one image of {size_px} px; give a lower one",
            )
            self.chunks_per_micro_batch *= 2

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        set_lr(self.optimizer, lr)
        # DDP waits for the gradients of all that it knows, so while some are frozen it is passed by.
        partly = not all(parameter.requires_grad for parameter in self.trained)
        forward = self._lone_forward if partly else self._forward
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.ctx.device)
        pieces = [piece for batch in micro_batches for piece in _cut(batch, self.chunks_per_micro_batch)]
        for number, batch in enumerate(pieces, start=1):
            with self.early_statistics(), self._no_sync() if number < len(pieces) else nullcontext():
                with Phase("forward"), self.autocast():
                    logits = forward(self.normalise(batch.images)).float()
                losses = training_loss(logits, batch, self.optim)
                with Phase("backward"):
                    # DDP averages over ranks; this makes the average the mean over the images of the whole update.
                    self.scaler.scale(losses * self.ctx.world / batch.total).backward()
            sums[:4] += count(logits.detach(), batch.labels, losses.detach())
        with Phase("update"):
            if partly:
                self._average_gradients()
            sums[4] = self._update()
        return sums

    def sync_buffers(self) -> None:
        self.ctx.broadcast([*self.module.buffers(), *(self.ema.module.buffers() if self.ema else ())])

    def capture_state(self, metadata: dict[str, str]) -> StateWriter:
        files: dict[str, Callable[[], Content]] = {}
        if self.powersgd:
            files |= gradient_compression.packed(self.powersgd, self.ctx, self.copy)
        if self.ctx.primary:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "updates": self.updates,
            }
            if self.ema:
                state["module"] = self.module.state_dict()
            weights, state = self.copy.of(self.eval_model.state_dict(), WEIGHTS), self.copy.of(state, STATE)
            files |= {WEIGHTS: lambda: packed_weights(weights, metadata), STATE: lambda: packed_state(state)}
        return writer(files, self.copy.wait)

    def load(self, folder: Path) -> None:
        state = load_state(folder / STATE, self.ctx.device)
        require(
            "engine" not in state,
            f"engine.name: {folder} was written by {state.get('engine')}, not by ddp; name that, or give another --run.dir",
        )
        load_weights(self.eval_model, folder)
        if self.ema:
            self.module.load_state_dict(state["module"])
        self.early_statistics.restart()
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run has been in another precision up to now
            self.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
        if self.powersgd:
            gradient_compression.load(self.powersgd, folder, self.ctx)

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.ddp_model.no_sync() if isinstance(self.ddp_model, DistributedDataParallel) else nullcontext()

    def _average_gradients(self) -> None:
        """What DDP does with its buckets, for the few gradients that there are."""
        for parameter in self.trained:
            if parameter.grad is not None:
                self.ctx.sum(parameter.grad).div_(self.ctx.world)

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

    def _fits(self, rows: int, size_px: int) -> bool:
        """Whether every rank has memory for both passes over so many images, beside what the optimiser will keep."""
        failed = torch.zeros(1, device=self.ctx.device)
        statistics = [buffer.clone() for buffer in self.module.buffers()]
        try:
            kept = [torch.empty_like(parameter) for parameter in self.module.parameters() for _ in range(2)]
            images = torch.zeros(rows, 3, size_px, size_px, dtype=torch.uint8, device=self.ctx.device)
            with self._no_sync():
                with self.autocast():
                    logits = self._forward(self.normalise(images.to(memory_format=torch.channels_last)))
                logits.sum().backward()
            del kept, logits
        except torch.OutOfMemoryError:
            failed += 1
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.module.buffers(), statistics, strict=True):
            buffer.copy_(before)
        return not self.ctx.sum(failed).item()

    def _settle_buckets(self) -> None:
        """Let DDP order its buckets now.

        It does so after its first backward pass, and the order decides how sums over three or more ranks round: a
        resumed run would otherwise differ from an uninterrupted one in its first step. A static graph orders them only
        in the second, and saves no time.
        """
        self.module.eval()
        pixels = next(self.module.parameters()).new_zeros(2, 3, 32, 32)
        self.ddp_model(pixels).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.train()


def _cut(batch: Batch, pieces: int) -> list[Batch]:
    """The rows of a batch in so many pieces, or fewer where there are not as many rows."""
    if pieces == 1:
        return [batch]
    images, labels = batch.images.chunk(pieces), batch.labels.chunk(pieces)
    targets = [None] * len(images) if batch.targets is None else batch.targets.chunk(pieces)
    return [
        batch._replace(images=rows, labels=names, targets=shares)
        for rows, names, shares in zip(images, labels, targets, strict=True)
    ]
