"""Common part of the engines: an optimizer step over micro-batches, and the files of weights and training state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from trainer.checkpoint.files import STATE, WEIGHTS, load_weights
from trainer.checkpoint.host_copy import Content, HostCopy, packed_state, packed_weights
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig
from trainer.engine.loss import count_batch, training_loss
from trainer.engine.precision import Autocast
from trainer.model.drop_path import draw_paths, drop_paths
from trainer.model.running_stats import EarlyStatistics
from trainer.node.clock import WaitTimer, clock_of
from trainer.optim.config import OptimConfig
from trainer.optim.optimizer import Ema, set_lr
from trainer.optim.swa import BATCHES, Swa
from trainer.resilience.watchdog import Phase


class DataParallel(ABC):
    """An engine whose ranks each train on images of their own, and average the gradients.

    Each rank keeps its own running statistics of batch normalisation while it trains, and those of rank 0 are the
    model's: they do not influence the weights, so keeping them is enough to continue bit for bit.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        module: nn.Module,
        normalise: nn.Module,
        cfg: EngineConfig,
        optim: OptimConfig,
        ctx: DistContext,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.ctx, self.optim, self.normalise, self.teacher = ctx, optim, normalise, teacher
        self.module = module.to(ctx.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.module, optim) if optim.ema_decay > 0 else None
        self.swa = Swa(self.module) if optim.swa > 0 else None
        averaged = self.ema or self.swa
        self.eval_model = averaged.module if averaged else self.module
        """Network that is evaluated and saved."""
        self.autocast = Autocast(cfg.precision, ctx.device)
        self.early_statistics = EarlyStatistics(self.module)
        self.drop_paths = drop_paths(self.module)
        self.class_weights = (
            None if isinstance(optim.class_weights, str) else torch.tensor(optim.class_weights, device=ctx.device)
        )
        self.updates = 0
        self.copy = HostCopy()
        self.waits = WaitTimer(clock_of(ctx.device))

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        set_lr(self.optimizer, lr)
        chunks = self._chunks(micro_batches)
        counted = self._passes(chunks)
        if self.optim.sam_radius > 0 and self.updates % self.optim.sam_steps == 0:
            # The gradient that counts is that of the place above; losses and scores are those of the weights themselves.
            before = self._climb()
            self._passes(chunks)
            torch._foreach_copy_([*before], [*before.values()])
        # Only now do the weights change, and their average with them.
        with Phase("update"):
            norm = self._update()
            if self.ema:
                self.ema.update(self.module, self.updates)
            self.updates += 1
        return torch.cat([counted, norm.to(counted).reshape(1)])

    def _passes(self, chunks: list[Batch]) -> Tensor:
        """Make forward and backward passes over the chunks of a step; returns this rank's `count` of them, summed."""
        counted = torch.zeros(4, dtype=torch.float64, device=self.ctx.device)
        # Gradients are averaged over the ranks in the last one alone.
        for number, batch in enumerate(chunks, start=1):
            draw_paths(self.drop_paths, batch.places, self.ctx.device)
            with self.early_statistics(), self._accumulating(last=number == len(chunks)):
                with Phase("forward"):
                    taught = self.teacher(batch.images) if self.teacher else None
                    logits = self._logits(batch.images)
                losses = training_loss(logits, batch, self.optim, self.class_weights, taught)
                with Phase("backward"), self.waits.exchanging():
                    # Gradients are averaged over ranks; this makes it the mean over the images of the whole step.
                    self._backward(losses * self.ctx.world / batch.total)
            counted += count_batch(logits.detach(), batch, losses.detach())
        return counted

    def _climb(self) -> dict[Tensor, Tensor]:
        """Move the weights `sam_radius` up their gradient, whose place is free then; returns each as it was before.

        Foret et al. 2021, arXiv 2010.01412, equation 2. A factor of the loss, as fp16 has it, changes nothing; a gradient that
        is not finite moves nothing.
        """
        weights = {p.detach(): p.grad for p in self.module.parameters() if p.grad is not None}
        before = {weight: weight.clone() for weight in weights}
        norm = nn.utils.get_total_norm(weights.values())
        moves = torch._foreach_mul([*weights.values()], self.optim.sam_radius / (norm + 1e-12))
        for move in moves:
            move.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_add_([*weights], moves)
        self.optimizer.zero_grad(set_to_none=True)
        return before

    def sync_buffers(self) -> None:
        self.ctx.broadcast([*self.module.buffers(), *(self.eval_model.buffers() if self._averages else ())])

    @property
    def _averages(self) -> bool:
        """True where the weights that are evaluated are an average, beside those that are trained."""
        return self.eval_model is not self.module

    def average(self, count: int, batches: Iterable[Batch]) -> None:
        """See `Engine`."""
        assert self.swa
        self.swa.update(self.module, count)
        # Statistics of normalisation are no mean of statistics: they are measured, by images that pass the averaged weights.
        if count == 0:
            return  # the weights are the mean, and their statistics its own
        with self.swa.estimating(self.module) as statistics, self.autocast(), torch.no_grad():
            for batch in islice(batches, BATCHES):
                self.swa.module(self.normalise(batch.images))
            for one in statistics:
                self.ctx.sum(one).div_(self.ctx.world)

    def fit_memory(self, rows: int, size_px: int, beside_bytes: int = 0) -> int:
        """See `Engine`. Only DDP cuts (see `check_deepspeed`)."""
        return 1

    def _chunks(self, micro_batches: list[Batch]) -> list[Batch]:
        """Parts of a batch that each have a forward and a backward pass of their own."""
        return micro_batches

    def _time_exchange(self) -> None:
        """Tell the waiting for other ranks from the backward pass, where an engine exchanges gradients behind it.

        The gradient of the first trained layer comes last, and the hook on it runs before DDP hears of it.
        """
        if self.ctx.world > 1:
            first = next(parameter for parameter in self.module.parameters() if parameter.requires_grad)
            first.register_post_accumulate_grad_hook(self.waits.part_done)

    @abstractmethod
    def _accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Wrap the passes of a chunk; after the last one of a step, gradients are averaged over the ranks."""

    @abstractmethod
    def _logits(self, images: Tensor) -> Tensor:
        """Logits [B, classes] float32 of images [B, 3, H, W] uint8, in training."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _update(self) -> Tensor:
        """Clip and step; returns the norm of the gradient before clipping."""

    def _captured(self, state: dict[str, Any], metadata: dict[str, str]) -> dict[str, Callable[[], Content]]:
        """Files of the weights, and of `state` with what training has in every engine; copied now, packed later."""
        state = {**state, "updates": self.updates, **({"module": self.module.state_dict()} if self._averages else {})}
        weights, state = self.copy.of(self.eval_model.state_dict(), WEIGHTS), self.copy.of(state, STATE)
        return {WEIGHTS: lambda: packed_weights(weights, metadata), STATE: lambda: packed_state(state)}

    def _restore(self, state: dict[str, Any], folder: Path) -> None:
        """Weights, and what `_captured` adds to the training state."""
        load_weights(self.eval_model, folder)
        if self._averages:
            self.module.load_state_dict(state["module"])
        self.early_statistics.restart()
        self.updates = state["updates"]
