"""Data parallelism by torch's DistributedDataParallel, and training in a single process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.batch import Batch, Places
from data_pipeline.common.errors import require
from trainer.checkpoint.files import STATE, load_state
from trainer.checkpoint.host_copy import Content, writer
from trainer.checkpoint.manifest import StateWriter
from trainer.distributed import DistContext
from trainer.engine import gradient_compression
from trainer.engine.compilation import check_device, compiled
from trainer.engine.config import EngineConfig
from trainer.engine.data_parallel import DataParallel
from trainer.engine.optimizer_state import adopt, adopt_group_steps, groups_of, loss_scale, read_whole
from trainer.engine.prediction import Predictor
from trainer.optim.optimizer import OptimConfig, build_optimizer, state_share


class DdpEngine(DataParallel):
    """Data parallelism by torch's DDP (Li et al. 2020, arXiv 2006.15704), or a single process.

    Parameters that require no gradient when it is built never will. Of the others any may be frozen for some updates, as
    long as all ranks freeze the same.
    """

    def __init__(
        self,
        module: nn.Module,
        normalise: nn.Module,
        cfg: EngineConfig,
        optim: OptimConfig,
        ctx: DistContext,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        device = ctx.device
        check_device(cfg, device)
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module) if cfg.sync_bn else module
        super().__init__(module, normalise, cfg, optim, ctx, teacher)
        self.predict = Predictor(self.eval_model, normalise, cfg, device)
        self.optimizer = build_optimizer(self.module, optim, self.autocast.product_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast.precision == "fp16")
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if optim.name == "sgd" and optim.momentum > 0:
            # The fused kernel asks for momentum of all or of none, so not of the head alone at first; and would leave it
            # as it finds it in memory where the very first step overflows.
            for parameter in self.trained:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.ddp_model: nn.Module = self.module
        self.powersgd: PowerSGDState | None = None
        if ctx.world > 1:
            # Buckets are ordered now, so that a resumed run sums in the same order.
            self.ddp_model = DistributedDataParallel(
                self.module,
                device_ids=[device.index] if device.type == "cuda" else None,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=gradient_compression.bucket_mb(cfg.compression, device),
            )
            self._settle_buckets()
            self.powersgd = gradient_compression.compress(self.ddp_model, cfg.compression)
        self._time_exchange()
        # One network runs through DDP, the other bypasses it while some parameters are frozen.
        self._forward = compiled(self.ddp_model, cfg, device)
        self._lone_forward = compiled(self.module, cfg, device) if ctx.world > 1 else self._forward
        self.pieces: dict[tuple[int, int], int] = {}
        """Pieces of a micro-batch of (rows, size_px), each with a forward and a backward pass of its own; 1 if not there."""

    @property
    def loss_scale(self) -> float | None:
        return float(self.scaler.get_scale()) if self.scaler.is_enabled() else None

    def fit_memory(self, rows: int, size_px: int, beside_bytes: int = 0) -> int:
        """Cut micro-batches of so many images into the fewest pieces that memory holds, found by trial; returns their number.

        `beside_bytes` of a GPU are left to others. A restored engine begins with as many pieces as before, which bits
        depend on. Collective. Raises `UserError` where not even one image fits.
        """
        pieces = self.pieces.get((rows, size_px), 1)
        while not self._fits(-(-rows // pieces), size_px, beside_bytes):
            require(
                pieces < rows,
                f"data.size_px: there is no memory for one image of {size_px} px; give a lower one",
            )
            pieces *= 2
        self.pieces[rows, size_px] = pieces
        return pieces

    def capture_state(self, metadata: dict[str, str]) -> StateWriter:
        files: dict[str, Callable[[], Content]] = {}
        if self.powersgd:
            files |= gradient_compression.packed(self.powersgd, self.ctx, self.copy)
        if self.ctx.primary:
            pieces = [(*shape, number) for shape, number in self.pieces.items()]
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                **({"pieces": pieces} if pieces else {}),
            }
            files |= self._captured(state, metadata)
        return writer(files, self.copy.wait)

    def load(self, folder: Path) -> None:
        state = load_state(folder / STATE, self.ctx.device)
        self._restore(state, folder)
        # A run may go on with another engine: the same numbers, divided otherwise.
        if state.get("engine") == "deepspeed":
            groups = groups_of(self.module, self.optimizer)
            whole = read_whole(folder, state, groups, self.ctx.device)
            adopt(self.optimizer, whole, dict(self.module.named_parameters()))
            adopt_group_steps(self.optimizer, state)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.pieces = {(rows, size_px): number for rows, size_px, number in state.get("pieces", ())}
        scale = loss_scale(state)
        if scale:  # otherwise the run has been in another precision up to now
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale[0], "_growth_tracker": scale[1]})
        if self.powersgd:
            gradient_compression.load(self.powersgd, folder, self.ctx)

    @property
    def _partly_frozen(self) -> bool:
        """DDP waits for the gradients of all that it knows, so while some are frozen it is passed by."""
        return not all(parameter.requires_grad for parameter in self.trained)

    def _chunks(self, micro_batches: list[Batch]) -> list[Batch]:
        return [chunk for batch in micro_batches for chunk in _cut(batch, self.pieces.get(_shape(batch), 1))]

    def _accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.ddp_model, DistributedDataParallel):
            return nullcontext()
        return self.ddp_model.no_sync()

    def _logits(self, images: Tensor) -> Tensor:
        forward = self._lone_forward if self._partly_frozen else self._forward
        with self.autocast():
            return forward(self.normalise(images)).float()

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _climb(self) -> dict[Tensor, Tensor]:
        if self._partly_frozen:
            self._average_gradients()
        return super()._climb()

    def _average_gradients(self) -> None:
        """Average as DDP does with its buckets, for the few gradients that are not frozen."""
        for parameter in self.trained:
            if parameter.grad is not None:
                self.ctx.sum(parameter.grad).div_(self.ctx.world)

    def _update(self) -> Tensor:
        if self._partly_frozen:
            with self.waits.exchanging():
                self.waits.part_done()
                self._average_gradients()
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.module.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.optim.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _fits(self, rows: int, size_px: int, beside_bytes: int) -> bool:
        """Return True where every rank has memory for both passes over so many images, beside what the optimiser will keep."""
        # A trial must leave no trace: statistics of normalisation are put back, and no rank averages its gradients. What the
        # optimiser will keep is not there before its first step, so its room is held.
        failed = torch.zeros(1, device=self.ctx.device)
        statistics = [buffer.clone() for buffer in self.module.buffers()]
        held = sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        copies = state_share(self.optim) + (
            self.optim.sam_radius > 0
        )  # of the weights: SAM keeps them in its second pass
        to_come = round(copies * sum(parameter.nbytes for parameter in self.trained)) - held
        try:
            kept = torch.empty(max(to_come, 0) + beside_bytes, dtype=torch.uint8, device=self.ctx.device)
            images = torch.zeros(rows, 3, size_px, size_px, dtype=torch.uint8, device=self.ctx.device)
            with self._accumulating(last=False):
                if self.teacher:
                    self.teacher(images.to(memory_format=torch.channels_last))
                logits = self._logits(images.to(memory_format=torch.channels_last))
                logits.sum().backward()
            del kept, logits
        except torch.OutOfMemoryError:
            failed += 1
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.module.buffers(), statistics, strict=True):
            buffer.copy_(before)
        if self.ctx.device.type == "cuda":
            torch.cuda.empty_cache()  # what this trial took is DALI's, too
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


def _shape(batch: Batch) -> tuple[int, int]:
    return len(batch.images), batch.images.shape[-1]


def _cut(batch: Batch, pieces: int) -> list[Batch]:
    """Cut the rows of a batch into so many pieces, or fewer where it has fewer rows."""
    if pieces == 1:
        return [batch]
    images, labels = batch.images.chunk(pieces), batch.labels.chunk(pieces)
    targets = [None] * len(images) if batch.targets is None else batch.targets.chunk(pieces)
    places: list[Places | None] = [None] * len(images)
    if batch.places:
        ends = np.cumsum([len(rows) for rows in images])[:-1]
        places = [batch.places._replace(positions=part) for part in np.split(batch.places.positions, ends)]
    return [
        batch._replace(images=rows, labels=names, targets=shares, places=where)
        for rows, names, shares, where in zip(images, labels, targets, places, strict=True)
    ]
