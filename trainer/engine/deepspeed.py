"""Data parallelism by DeepSpeed, with optimiser, gradients and weights divided among the ranks as ZeRO does."""

import atexit
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.files import STATE, load_state
from trainer.checkpoint.host_copy import Content, packed_state, writer
from trainer.checkpoint.manifest import StateWriter
from trainer.distributed import DistContext
from trainer.engine.compilation import compiled
from trainer.engine.config import EngineConfig, check_deepspeed
from trainer.engine.data_parallel import DataParallel
from trainer.engine.optimizer_state import (
    SHARD,
    Moments,
    adopt,
    adopt_group_steps,
    group_steps,
    groups_of,
    loss_scale,
    part_of,
    read_whole,
)
from trainer.engine.precision import Autocast
from trainer.engine.prediction import Predictor
from trainer.optim.config import OptimConfig
from trainer.optim.optimizer import build_optimizer

_BUCKET = 1 << 23  # gradients reduced at a time: 32 MiB, as DDP has 25; DeepSpeed would set aside 2 GB
_FIRST_SCALE, _CLEAN_UPDATES = 2.0**16, 2000  # as torch's GradScaler


class DeepSpeedEngine(DataParallel):
    """Data parallelism by DeepSpeed; `zero_stage` chooses what is divided among the ranks.

    0: nothing; 1: the optimiser's state; 2: the gradients too; 3: the weights too (Rajbhandari et al. 2020, "ZeRO",
    arXiv 1910.02054, section 5). Weights stay fp32. Where gradients are not finite, stages 1 to 3 leave the update out in
    any precision. DeepSpeed decides that on the host, so a step there waits for the device, which one of DDP does not; and
    its contiguous weights are turned into channels-last for each convolution, a pass over all of them.
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
        check_deepspeed(cfg, optim)
        self.stage, device = cfg.zero_stage, ctx.device
        if self.stage == 3:
            cfg = replace(cfg, compile="off")
        super().__init__(module, normalise, cfg, optim, ctx, teacher)
        # DeepSpeed takes contiguous weights only. From stage 1 on they are windows of one flat tensor and stay so.
        self.module.to(memory_format=torch.contiguous_format)
        self.ddp_model = _Cast(compiled(self.module, cfg, device), self.autocast)
        self.optimizer = build_optimizer(self.module, optim, self.autocast.product_dtype)
        self.groups = groups_of(self.module, self.optimizer)
        self._deepspeed = _import_deepspeed(ctx)
        self.engine, self._zero, _, _ = self._deepspeed.initialize(
            model=self.ddp_model, optimizer=self.optimizer, config=self._options(), dist_init_required=False
        )
        if self.stage == 0:
            self.module.to(memory_format=torch.channels_last)
            self._time_exchange()  # the other stages exchange in the middle of a pass
        if self._averages:
            self.predict = Predictor(self.eval_model, normalise, cfg, device)
        else:
            self.predict = Predictor(self.ddp_model, normalise, replace(cfg, compile="off"), device)
        self.scale = _FIRST_SCALE if self.autocast.precision == "fp16" else 1.0
        self.clean_updates = 0  # since the scale was changed

    @property
    def loss_scale(self) -> float | None:
        return self.scale if self.autocast.precision == "fp16" else None

    def capture_state(self, metadata: dict[str, str]) -> StateWriter:
        files: dict[str, Callable[[], Content]] = {}
        with self.whole_weights():
            if self.ctx.primary:
                state: dict[str, Any] = {
                    "engine": "deepspeed",
                    "zero_stage": self.stage,
                    "world": self.ctx.world,
                    "scale": self.scale,
                    "clean_updates": self.clean_updates,
                    "group_steps": group_steps(self.optimizer),
                }
                files = self._captured(state, metadata)
        if self.ctx.primary or self.stage > 0:
            shard = self.copy.of([self.optimizer.state.get(weights, {}) for weights in self._shards], SHARD)
            files[SHARD.format(rank=self.ctx.rank)] = lambda: packed_state({"optimizer": shard})
        return writer(files, self.copy.wait)

    def load(self, folder: Path) -> None:
        state = load_state(folder / STATE, self.ctx.device)
        with self.whole_weights(source=0):
            self._restore(state, folder)
        if self.stage > 0:
            self._zero.refresh_fp32_params()
        if self._divided_alike(state):
            shard = SHARD.format(rank=self.ctx.rank if self.stage > 0 else 0)
            saved = load_state(folder / shard, self.ctx.device)["optimizer"]
            for weights, moments in zip(self._shards, saved, strict=True):
                self.optimizer.state[weights] = moments
        else:
            self._divide(read_whole(folder, state, self.groups, self.ctx.device))
        adopt_group_steps(self.optimizer, state)
        scale = loss_scale(state)
        if self.autocast.precision == "fp16" and scale:
            self.scale, self.clean_updates = scale

    def _divided_alike(self, state: dict[str, Any]) -> bool:
        """Return True where a checkpoint's parts of the optimizer's state are this engine's."""
        same = state.get("engine") == "deepspeed" and state["zero_stage"] == self.stage
        return same and (self.stage == 0 or state["world"] == self.ctx.world)

    def _divide(self, moments: Moments) -> None:
        """Take over the optimizer's state of another engine, stage or number of ranks."""
        if self.stage == 0:
            adopt(self.optimizer, moments, dict(self.module.named_parameters()))
            return
        used = [group for group in self.groups if group]
        for group, part in zip(used, self._shards, strict=True):
            state = part_of(moments, group, self.stage, self.ctx.rank, self.ctx.world, part)
            if state:
                self.optimizer.state[part] = state

    def _options(self) -> dict[str, Any]:
        """DeepSpeed's configuration. Precision, learning rate and accumulation are ours to handle."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # required but without effect: the loader shares the images out
            "gradient_clipping": self.optim.clip_norm if self.stage > 0 else 0.0,  # without it DeepSpeed clips at 1
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": _BUCKET,
                "allgather_bucket_size": _BUCKET,
            },
        }

    def _accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        if self.stage > 0:
            self._zero.override_loss_scale(self.scale)
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.engine(self.normalise(images))
        return logits

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss if self.stage > 0 else loss * self.scale)

    def _update(self) -> Tensor:
        if self.stage == 0:
            norm, skipped = self._update_whole()
        else:
            self.engine.step()
            norm, skipped = torch.as_tensor(self.engine.get_global_grad_norm()), self._zero.overflow
        if self.autocast.precision == "fp16":
            self._adapt_scale(skipped)
        return norm

    def _update_whole(self) -> tuple[Tensor, bool]:
        """Do as ZeRO does, where it is not in use: returns the gradient's norm, and True where the step was left out."""
        parameters = list(self.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = nn.utils.get_total_norm(gradients)
        if self.optim.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, norm)
        skipped = self.autocast.precision == "fp16" and not bool(norm.isfinite())
        if skipped:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.engine.step()
        return norm, skipped

    def _adapt_scale(self, skipped: bool) -> None:
        """Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2)."""
        self.clean_updates = 0 if skipped else self.clean_updates + 1
        if skipped:
            self.scale /= 2
        elif self.clean_updates == _CLEAN_UPDATES:
            self.scale, self.clean_updates = self.scale * 2, 0

    @property
    def _shards(self) -> list[Tensor]:
        """Tensors that the optimiser changes on this rank: its part of all weights, or each of the weights."""
        match self.stage:
            case 0:
                return [weights for group in self.optimizer.param_groups for weights in group["params"]]
            case 1 | 2:
                return list(self._zero.single_partition_of_fp32_groups)
            case _:
                return list(self._zero.fp32_partitioned_groups_flat)

    def whole_weights(self, source: int | None = None) -> AbstractContextManager[None]:
        """Within it the weights are whole on every rank; at its end those of rank `source` are kept. Collective."""
        if self.stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            list(self.module.parameters()), modifier_rank=source
        )
        return gathered


class _Cast(nn.Module):
    """`forward` of a network in a given precision, its logits in fp32.

    Autocast belongs inside: DeepSpeed switches off what surrounds it, and its own setting would last for the process.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], autocast: Autocast) -> None:
        super().__init__()
        self.network, self.autocast = network, autocast

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.network(images).float()


def _leave() -> None:
    """Leave the group, once its threads have freed the tensors of the last collectives.

    They need the interpreter's lock for that, and one that asks for it while the interpreter ends aborts the process
    ("terminate called without an active exception"; one of five runs did).
    """
    time.sleep(0.3)
    dist.destroy_process_group()
    time.sleep(0.1)


def _import_deepspeed(ctx: DistContext) -> Any:
    """DeepSpeed, ready for `initialize`, without its messages; a single process gets a group of its own."""
    os.environ.setdefault("DS_ACCELERATOR", ctx.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    if (
        ctx.device.type == "cuda"
    ):  # DeepSpeed takes it for the GPU's number, which it is not where a process sees one alone
        os.environ["LOCAL_RANK"] = str(ctx.device.index)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    if ctx.device.type == "cpu":
        # Otherwise it compiles, for half a minute, an all-reduce that only its inference uses.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    if not dist.is_initialized():
        backend = "nccl" if ctx.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)  # not before: DeepSpeed keeps the group for the process
    return deepspeed
