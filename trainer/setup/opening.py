"""Open a run that may begin or go on: weights, engine, tracker, saver, and its first lines."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import nn

from data_pipeline.gpu_memory import gpu_bytes
from data_pipeline.summary import summary
from trainer.checkpoint.async_writer import Saver
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.progress import Progress
from trainer.engine.base import Engine
from trainer.model.flops import matmul_flops_per_s
from trainer.model.pretrained import load_weights_to_start
from trainer.model.whitening import whiten_stem
from trainer.optim.extension import extended_lr_at, extension_of
from trainer.resilience.interruption import interruption
from trainer.resilience.signals import RESTARTED
from trainer.resilience.watchdog import Watchdog
from trainer.session import Session
from trainer.setup.parts import engine_for, fresh_model, network_layers
from trainer.setup.start import Start
from trainer.teacher import check_teacher, open_teacher
from trainer.tracking.profiler import Trace
from trainer.tracking.tracker import Tracker


@contextmanager
def open_session(start: Start, opened: Callable[[], None]) -> Iterator[Session]:
    """Open the parts of a run. `opened` is called when all are there, before the console prints. Collective."""
    cfg, ctx, catalog, progress = start.cfg, start.ctx, start.train.catalog, start.progress

    # Weights: fresh, somebody else's, or those of the checkpoint.
    model, started = _model_to_start(start)
    teacher = open_teacher(cfg.optim.teacher, catalog.classes, start.engine, ctx) if cfg.optim.teacher else None
    engine = engine_for(replace(cfg, engine=start.engine, optim=start.optim), model, ctx, teacher)
    metadata = {
        "model": cfg.model.name,
        "classes": json.dumps(catalog.classes),
        "data": catalog.fingerprint(),
        **({"labels": catalog.taken.written} if catalog.multi_label else {}),
        **({"teacher": teacher.digest} if teacher else {}),
    }
    if start.newest:
        ctx.raise_together(partial(check_teacher, metadata, start.newest))
        engine.load(start.newest)
    pieces = [*_fit_memory(start, engine)] if start.engine.fit_memory else []
    flops_per_s = float(ctx.sum(torch.tensor(matmul_flops_per_s(ctx.device, engine.autocast.dtype), device=ctx.device)))
    engine.capture_state(metadata)  # dropped at once: it allocates the memory for copies, which training would wait for

    # The destinations of its metrics, and its first lines. The cost of an interruption is read before they forget the rows
    # of what is done anew.
    cost = interruption(cfg.folder / "metrics.jsonl", progress.step) if ctx.primary else None
    total_steps = sum(start.train.steps_per_epoch(epoch) for epoch in range(cfg.run.epochs))
    tracker = ctx.raise_together(lambda: _tracker_of(start, total_steps))
    told = [line for line in (started, teacher.line if teacher else None) if line]
    for line in (*_first_lines(start, told, total_steps), *pieces):
        tracker.note(line)
    if cause := os.environ.get(RESTARTED):
        tracker.alert("restarted", f"{cause}; {cost}" if cost else cause)
    if not progress.step:
        tracker.graph(lambda: network_layers(cfg, len(catalog.classes)))

    # What works beside the loop: threads that save and copy, the profiler, the watchdog.
    saver = Saver(start.store, ctx, progress, tracker.note)
    mirror = Mirror(start.mirrored, start.store, tracker.note, tracker.alert) if start.mirrored else None
    if mirror:
        saver.on_saved = mirror.saved
    trace = Trace(cfg.run.profiled, cfg.folder / "profile", ctx, done=progress.step)
    watchdog = Watchdog(cfg.run.stall_s, cfg.folder / "stacks", ctx, partial(tracker.alert, "stalled"))
    session = Session(
        cfg,
        ctx,
        start.train,
        start.val,
        start.store,
        engine,
        tracker,
        saver,
        trace,
        progress,
        metadata,
        total_steps,
        flops_per_s,
        scaled=start.engine.precision == "fp16",
        snapshots=start.snapshots,
        next_row={f"perf/{name}": float(value) for name, value in cost._asdict().items()} if cost else {},
        mirror=mirror,
    )
    opened()
    with tracker, mirror or nullcontext(), trace, saver, watchdog:
        yield session


def _model_to_start(start: Start) -> tuple[nn.Module, str | None]:
    """Build the network, with the weights that a new run begins with, and a line on those that it was given. Collective."""
    cfg, ctx, catalog = start.cfg, start.ctx, start.train.catalog
    model, started = fresh_model(cfg, len(catalog.classes)), None
    if start.newest:
        return model, started  # the checkpoint has all of it
    if cfg.model.weights:
        started = load_weights_to_start(model, cfg.model, catalog.classes, ctx)
    if cfg.model.whiten:
        first_px = cfg.data.size_at(0, cfg.run.epochs)
        ctx.raise_together(lambda: whiten_stem(model, catalog, cfg.data, first_px, ctx))
    return model, started


def _tracker_of(start: Start, total_steps: int) -> Tracker:
    """Open the destinations of the run's metrics, without the rows of what is done anew. Raises `UserError`."""
    cfg = start.cfg
    return Tracker(
        cfg.tracking,
        cfg.folder,
        name=cfg.name,
        run_config=asdict(cfg),
        total_steps=total_steps,
        epochs=cfg.run.epochs,
        resume_step=last_row(start.progress, len(start.train.catalog)),
        primary=start.ctx.primary,
    )


def _fit_memory(start: Start, engine: Engine) -> Iterator[str]:
    """Let the engine try each size of batch that the run has, before DALI takes its part; yields what came of it. Collective.

    All at once, because a run that was resumed later would find other parts of the memory taken.
    """
    ctx = start.ctx
    beside = ctx.raise_together(lambda: gpu_bytes(start.train) + gpu_bytes(start.val))
    for rows, size_px in start.train.shapes():
        pieces = engine.fit_memory(rows, start.cfg.data.augment.seen_px(size_px), beside)
        yield f"engine.fit_memory: {rows} images of {size_px} px on each rank, in {pieces} piece{'s' * (pieces > 1)}"


def _first_lines(start: Start, told: list[str], total_steps: int) -> Iterator[str]:
    """Yield the lines before the first optimizer step; `told` are those on networks that somebody else trained."""
    cfg, step = start.cfg, start.progress.step
    for checkpoint, why in start.store.passed_over.items():
        yield f"passed over {checkpoint}: {why}"
    yield from summary(cfg.data, start.train.catalog, start.val.catalog)
    for catalog in (start.train.catalog, start.val.catalog):
        for path, why in catalog.bad.items():
            yield f"left out {catalog.root / path}: {why}"
    if start.optim.loss != cfg.optim.loss:
        yield f"optim.loss: {start.optim.loss}, as images may have several classes"
    if cfg.optim.class_weights == "balanced":
        factors = start.optim.class_weights
        ends = sorted(zip(map(float, factors), start.train.catalog.classes, strict=True))[:: len(factors) - 1]
        yield "optim.class_weights balanced: " + " to ".join(f"{factor:.3g} ({name})" for factor, name in ends)
    yield from told
    if start.newest:
        of_memory = " from a snapshot in memory" if start.newest.parent != start.store.folder else ""
        yield f"resuming {cfg.folder} at step {step} of {total_steps}{of_memory}"
    yield from start.lines
    if start.newest and cfg.run.extend_to is not None:
        extension = extension_of(cfg.run.extend_lr, cfg.run.extend_from, start.train.steps_per_epoch)
        now = f"it is {extended_lr_at(step, cfg.optim, total_steps, extension):.3g} now"
        follows = extension.words(cfg.optim.lr) if extension else "the learning rate is that of their schedule"
        yield f"it goes on to {cfg.run.epochs} epochs: {follows}; {now}"


def last_row(progress: Progress, images: int) -> int:
    """Step of the last row of metrics that a resumed run keeps. One that has not closed its epoch writes that row anew."""
    return progress.step - (progress.cursor.seen >= images)
