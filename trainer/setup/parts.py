"""Parts of a run that benchmarks need, too: its network, its engine and its loaders."""

from dataclasses import replace

import torch
from torch import nn

from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog
from trainer.config import Config
from trainer.distributed import DistContext
from trainer.engine.base import Engine
from trainer.engine.compilation import choose_compile
from trainer.engine.ddp import DdpEngine
from trainer.model.network import build_network
from trainer.model.normalize import Normalise
from trainer.model.resnet import freeze
from trainer.teacher import Teacher
from trainer.tracking.model_summary import Layer, layers


def fresh_model(cfg: Config, classes: int) -> nn.Module:
    """Build a network with freshly drawn weights, the same on all ranks; parameters that are never trained are frozen."""
    torch.manual_seed(cfg.run.seed)
    model = build_network(cfg.model, classes)
    freeze(model, cfg.model, epoch=cfg.run.epochs)
    return model


def engine_for(cfg: Config, model: nn.Module, ctx: DistContext, teacher: Teacher | None = None) -> Engine:
    """Make the engine that trains `model`, with a teacher if there is one. Collective."""
    cfg = replace(cfg, engine=choose_compile(cfg.engine, ctx))
    normalise = Normalise(cfg.data.mean, cfg.data.std, ctx.device)
    if cfg.engine.name == "deepspeed":
        from trainer.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, normalise, cfg.engine, cfg.optim, ctx, teacher)
    return DdpEngine(model, normalise, cfg.engine, cfg.optim, ctx, teacher)


def build_engine(cfg: Config, classes: int, ctx: DistContext) -> Engine:
    """Build a network with freshly drawn weights, the same on all ranks, and its engine without a teacher. Collective."""
    if cfg.optim.teacher:
        warn_on_rank0("optim.teacher: what is measured here is without it")
    return engine_for(cfg, fresh_model(cfg, classes), ctx)


def training_loader(cfg: Config, catalog: Catalog, ctx: DistContext) -> Loader:
    """Make the loader of the training images. Raises `UserError`."""
    return Loader(
        loaded(cfg),
        catalog,
        ctx,
        training=True,
        seed=cfg.run.seed,
        epochs=cfg.run.epochs,
        accumulate=cfg.optim.accumulate,
    )


def loaded(cfg: Config) -> DataConfig:
    """Options of a run's loaders. With `engine.deterministic` one decoder takes all images: of two, an image's batch chooses."""
    return replace(cfg.data, hw_decoder_load=0.0) if cfg.engine.deterministic else cfg.data


def network_layers(cfg: Config, classes: int) -> list[Layer]:
    """List the layers of the run's network for dashboards, for one image. Touches no weights and draws nothing."""
    with torch.device("meta"):
        model = build_network(cfg.model, classes)
    # On the CPU, with zeros: convolutions and norms on the device meta would import `torch._dynamo`, for two seconds.
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    size_px = max(cfg.data.sizes_px)
    return layers(model, torch.zeros(1, 3, size_px, size_px))
