"""Item about the options of networks and of training that change what a step computes. Without DALI."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch, Places
from trainer.check.items import common, training
from trainer.check.items.common import CLASSES, EAGER, MEAN, STD, noise
from trainer.check.results import Found
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.compilation import lacking
from trainer.engine.config import EngineConfig, Precision
from trainer.engine.ddp import DdpEngine
from trainer.engine.prediction import Predictor
from trainer.model.config import is_timm
from trainer.model.network import build_network
from trainer.model.normalize import Normalise
from trainer.model.resnet import ModelConfig
from trainer.optim.config import OptimConfig

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16")
COMPILED_DIFFERS = 0.05
"""Share of the loss by which a compiled network may differ from an eager one after a few steps in bf16."""


class Variant(NamedTuple):
    model: ModelConfig
    optim: OptimConfig
    taught: bool = False
    """True for a teacher beside the labels."""
    multi_label: bool = False
    compiles: bool = True
    """True where it is compiled too, on a GPU."""


FACTORS = [1 + number / CLASSES for number in range(CLASSES)]
VARIANTS = {
    "se, blur, drop path, SAM and EMA by binary loss": Variant(
        ModelConfig(attention="se", blur=True, stem="deep", shortcut="pool", activation="silu", drop_path=0.2),
        OptimConfig(loss="binary", sam_radius=0.05, ema_decay=0.9),
    ),
    "eca, patches, a teacher and SWA with class weights": Variant(
        ModelConfig(attention="eca", stem="patch", activation="gelu"),
        OptimConfig(name="adamw", swa=0.5, class_weights=FACTORS, temperature=2.0),
        taught=True,
    ),
    "several classes": Variant(
        ModelConfig(), OptimConfig(loss="binary", class_weights=FACTORS), multi_label=True, compiles=False
    ),
    "timm's": Variant(ModelConfig("timm:seresnet18", drop_path=0.1), OptimConfig(name="muon")),
}


def networks_and_losses() -> Found:
    """Make some steps of each variant: finite in bf16 and fp16, without waits on a GPU, and there compiled as well."""
    told = []
    with open_dist_context() as ctx:
        compiles = ctx.device.type == "cuda" and not lacking("cuda")
        for name, variant in VARIANTS.items():
            try:
                losses = {one: loss_of(variant, replace(EAGER, precision=one), ctx, name) for one in PRECISIONS}
            except ModuleNotFoundError as missing:
                told.append(f"{name} left out, as {missing.name} is not installed")
                continue
            told.append(name)
            if compiles and variant.compiles:
                compiled = loss_of(variant, EngineConfig(precision="bf16", compile="on"), ctx, f"{name}, compiled")
                apart = abs(compiled / losses["bf16"] - 1)
                assert apart < COMPILED_DIFFERS, f"{name}: compiled, its loss is {apart:.1%} from the eager one's"
                told[-1] += f" (compiled {apart:.1%} apart)"
    return Found("; ".join(told))


def loss_of(variant: Variant, cfg: EngineConfig, ctx: DistContext, name: str) -> float:
    """Make steps of a fresh network, average and predict; returns the loss of the last step. AssertionError tells faults."""
    torch.manual_seed(0)
    model = variant.model if is_timm(variant.model.name) else replace(variant.model, width=common.SCALE.width)
    normalise = Normalise(MEAN, STD, ctx.device)
    engine = DdpEngine(build_network(model, CLASSES), normalise, cfg, variant.optim, ctx, teacher_of(variant, cfg, ctx))
    before = [weights.clone() for weights in engine.module.parameters()]
    batch = batch_of(variant, ctx)
    for number in range(training.WARM + 1):
        # In fp16, torch's loss scaling waits for all optimizers that are not fused.
        waits = cfg.precision == "fp16" and variant.optim.name == "muon"
        warm = number == training.WARM and ctx.device.type == "cuda" and not waits
        with training.alarm_of_torch() if warm else nullcontext():
            sums = engine.step([batch], 1e-3)
        assert torch.isfinite(sums[:4]).all(), f"{name} in {cfg.precision}: {sums.tolist()}"
    assert not all(map(torch.equal, before, engine.module.parameters())), f"{name} in {cfg.precision} changes no weight"
    for count in (0, 1) if variant.optim.swa else ():
        engine.average(count, [batch])
    assert torch.isfinite(engine.predict(batch.images)).all(), f"{name} in {cfg.precision} predicts no numbers"
    return float(sums[0])


def batch_of(variant: Variant, ctx: DistContext) -> Batch:
    """Make a batch of noise with places, from which paths to drop follow."""
    batch = noise(ctx, mixed=True)
    rows = len(batch.labels)
    targets = (batch.targets > 0.1).float() if variant.multi_label and batch.targets is not None else batch.targets
    return batch._replace(targets=targets, places=Places(0, 0, np.arange(rows)), multi_label=variant.multi_label)


def teacher_of(variant: Variant, cfg: EngineConfig, ctx: DistContext) -> Callable[[Tensor], Tensor] | None:
    """Make a network that answers as a teacher does."""
    if not variant.taught:
        return None
    network = build_network(ModelConfig(width=common.SCALE.width), CLASSES).eval().requires_grad_(False)
    network.to(ctx.device).to(memory_format=torch.channels_last)
    predict = Predictor(network, Normalise(MEAN, STD, ctx.device), cfg, ctx.device)
    return lambda images: predict(images)[:, torch.arange(CLASSES, device=ctx.device)]
