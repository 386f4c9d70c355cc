"""Item about the speed of optimizer steps, beside that of a large product of matrices. Without DALI."""

from collections.abc import Iterator
from functools import partial

from data_pipeline.batch import Batch
from data_pipeline.common.errors import UserError
from trainer.bench.roofline import matmul
from trainer.check.items import common
from trainer.check.items.common import CLASSES, make_engine, noise, rate
from trainer.check.results import Found
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.base import Engine
from trainer.engine.compilation import lacking
from trainer.engine.config import EngineConfig
from trainer.engine.precision import resolve_precision
from trainer.model.config import ModelConfig, ModelName
from trainer.model.flops import flops_per_image

MODELS: tuple[ModelName, ...] = ("resnet18", "resnet50")
WAYS = {
    "eager": EngineConfig(compile="off"),
    "compiled": EngineConfig(compile="on"),
    "graphed": EngineConfig(compile="on", compile_mode="reduce-overhead"),
}


def step_speed() -> Found:
    figures, told = {}, []
    with open_dist_context() as ctx:
        precision = resolve_precision("auto", ctx.device)
        multiply = matmul(precision, ctx)
        multiply()
        flops_per_s = rate(multiply, ctx)
        batch = noise(ctx)
        for name in MODELS:
            flops = flops_per_image(ModelConfig(name), CLASSES, common.SCALE.size_px)
            for way, config in ways(name, ctx):
                try:
                    engine = make_engine(ctx, engine=config, model=ModelConfig(name))
                except UserError as refusal:
                    told.append(f"{name} {way} is refused ({refusal})")
                    continue
                for _ in range(5 if ctx.device.type == "cuda" else 1):
                    steps(engine, batch)
                images_per_s = rate(partial(steps, engine, batch), ctx)
                figures[f"{name} {way}, images/s"] = images_per_s
                told.append(f"{name} {way} {images_per_s:.0f} (MFU {images_per_s * flops / flops_per_s:.0%})")
    setting = f"{common.SCALE.size_px} px, batch {common.SCALE.batch}, {precision}"
    return Found(f"images/s at {setting}: {', '.join(told)}; matmul {flops_per_s / 1e12:.2f} TFLOP/s", figures)


def ways(name: ModelName, ctx: DistContext) -> Iterator[tuple[str, EngineConfig]]:
    """Yield the ways to run a network here. On a CPU compiling takes a minute, so one network shows that it works."""
    yield "eager", WAYS["eager"]
    if ctx.device.type == "cuda":
        yield from ((way, WAYS[way]) for way in ("compiled", "graphed"))
    elif name == "resnet18" and common.SCALE.compiles and not lacking("cpu"):
        yield "compiled", WAYS["compiled"]


def steps(engine: Engine, batch: Batch) -> float:
    """Make a round of optimizer steps; returns its number of images."""
    for _ in range(common.SCALE.steps):
        engine.step([batch], 1e-3)
    return float(common.SCALE.steps * len(batch.labels))
