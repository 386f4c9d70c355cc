"""Build a run or resume an existing one: check it, claim its folder, open its parts."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data_pipeline.common.address import is_address
from data_pipeline.common.errors import UserError, require
from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.config import DataConfig
from data_pipeline.gpu_memory import gpu_bytes
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.torchvision_sets import NAMED
from data_pipeline.summary import refuse_single_class, summary
from trainer.checkpoint.async_writer import Saver, check_room
from trainer.checkpoint.files import read_metadata
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.mirror_restore import Mirrored, open_mirror
from trainer.checkpoint.run_folder import check_run, claim_run, record_job, record_run
from trainer.checkpoint.snapshots import Snapshots
from trainer.checkpoint.store import Progress, Store, read_progress
from trainer.config import Config, to_yaml
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.arithmetic import choose_arithmetic, deterministic_kernels
from trainer.engine.base import Engine
from trainer.engine.checkpoint_size import checkpoint_bytes
from trainer.engine.compilation import check_device, check_graphs, choose_compile
from trainer.engine.compile_cache import keep_compiled
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.engine.loss import fitted_to_classes
from trainer.model.flops import matmul_flops_per_s
from trainer.model.network import build_network, check_network
from trainer.model.normalize import Normalise
from trainer.model.pretrained import load_weights_to_start
from trainer.model.resnet import freeze
from trainer.model.whitening import whiten_stem
from trainer.optim.config import OptimConfig
from trainer.optim.extension import extended_lr_at, extension_of
from trainer.resilience.interruption import interruption
from trainer.resilience.sanity_checks import STEPS_BACK, NonFinite, limit_bad
from trainer.resilience.signals import RESTARTED
from trainer.resilience.watchdog import FRESH, Watchdog
from trainer.resume_rules import first_difference
from trainer.scoring import best_by
from trainer.session import Session
from trainer.teacher import Teacher, check_teacher, open_teacher
from trainer.tracking.model_summary import Layer, layers
from trainer.tracking.profiler import Trace
from trainer.tracking.tracker import Tracker


@dataclass(frozen=True)
class Start:
    """A run that may begin or go on, its folder claimed."""

    cfg: Config
    engine: EngineConfig
    """Options as resolved: see `choose_arithmetic`."""
    optim: OptimConfig
    """Options with numbers for `class_weights`: see `fitted_to_classes`."""
    ctx: DistContext
    train: Loader
    val: Loader
    store: Store
    newest: Path | None
    """The checkpoint to go on from; None at the very beginning."""
    progress: Progress
    lines: list[str]
    """Lines for the user on the arithmetic of a resumed run."""
    snapshots: Snapshots | None = None
    mirrored: Mirrored | None = None
    """The run's mirror; on rank 0 alone, and only if it has one."""

    @property
    def nothing_left(self) -> bool:
        """True where all epochs are trained, or `run.max_steps` is reached."""
        return self.progress.finished or self.progress.step >= (self.cfg.run.max_steps or math.inf)


def join_run(cfg: Config) -> AbstractContextManager[DistContext]:
    """Join the processes of a run (see `open_dist_context`), as its options say."""
    return open_dist_context(
        device=cfg.engine.device, bind_cores=cfg.engine.bind_cores, patience_s=FRESH * cfg.run.stall_s
    )


@contextmanager
def start_run(cfg: Config, ctx: DistContext) -> Iterator[Start]:
    """Check a run, claim its folder and record its options there, in this order: a refused start has changed nothing.

    If nothing is left to train, nothing is recorded. Collective. Raises `UserError`, on every rank.
    """
    # First the cheap checks: reading the images may take minutes.
    differences = partial(first_difference, cfg=cfg)
    check = partial(check_run, cfg.folder, differences)
    if not (os.path.lexists(cfg.data.path) or cfg.data.path in ("builtin", *NAMED) or is_address(cfg.data.path)):
        ctx.raise_together(lambda: open_catalog(cfg.data, "train"))  # it raises the error, before any about options
    ctx.run_on_rank0(check)
    ctx.raise_together(lambda: check_device(cfg.engine, ctx.device))
    check_graphs(cfg.engine, ctx, cfg.optim.accumulate)
    ctx.raise_together(lambda: check_network(cfg.model))
    train, val = ctx.raise_together(lambda: _open_data(cfg, ctx))
    classes = len(train.catalog.classes)
    store = Store(cfg.folder, cfg.run.keep, cfg.run.keep_every)

    with ExitStack() as held:
        # From here on nobody else writes to the folder, so it is checked anew.
        ctx.run_on_rank0(lambda: held.enter_context(claim_run(cfg.folder)))
        mirrored = None
        if cfg.run.mirror is not None:
            opened = partial(open_mirror, cfg.run.mirror, cfg.name, store, differences)
            mirrored = ctx.raise_together(lambda: opened() if ctx.primary else None)
        ctx.run_on_rank0(check)
        found = ctx.raise_together(lambda: _resume_point(store, train.catalog) if ctx.primary else None)
        newest, progress = ctx.broadcast_from_rank0(lambda: found or (None, Progress()))
        # The run may have been extended, or given more patience.
        progress = replace(progress, finished=progress.over(cfg.run.epochs, cfg.run.patience))
        start = Start(cfg, cfg.engine, cfg.optim, ctx, train, val, store, newest, progress, [], mirrored=mirrored)
        if start.nothing_left:
            yield start
            return

        # A snapshot in memory may be newer than what is on disk.
        snapshots = Snapshots(cfg.folder, cfg.run.snapshot_dir, ctx) if cfg.run.snapshot_every else None
        newer = snapshots.newer_than(progress) if snapshots else None
        if newer and newer[1].step < (cfg.run.max_steps or math.inf):
            newest, progress = newer
            ctx.raise_together(lambda: _check_images(newer[0], store, train.catalog))
        start = replace(start, newest=newest, progress=progress, snapshots=snapshots)

        # Mistakes that would show only later.
        _check_extension(cfg, train, progress)
        _check_batches(cfg, classes, ctx)
        optim = fitted_to_classes(cfg.optim, train.catalog)
        best_by(cfg.run, train.catalog)
        for loader in (train, val):
            limit_bad(loader)
        ctx.run_on_rank0(lambda: _check_room(cfg, store, classes, ctx))
        engine = choose_compile(cfg.engine, ctx)
        held.callback(keep_compiled(engine, ctx))

        # The same precision and threads as before, while this run trains.
        engine, arithmetic, lines = choose_arithmetic(engine, ctx, progress.arithmetic)
        if engine.deterministic:
            held.enter_context(deterministic_kernels())
        held.callback(torch.set_num_threads, torch.get_num_threads())
        if ctx.device.type == "cpu":
            torch.set_num_threads(arithmetic.threads[ctx.rank])

        ctx.run_on_rank0(lambda: _record(cfg, mirrored))
        ctx.run_on_rank0(store.prepare)
        if snapshots:
            snapshots.open()
        progress = replace(progress, arithmetic=arithmetic)
        yield replace(start, engine=engine, optim=optim, progress=progress, lines=lines)


@contextmanager
def open_session(start: Start, opened: Callable[[], None]) -> Iterator[Session]:
    """Open the parts of a run. `opened` is called when all are there, before the console prints. Collective."""
    cfg, ctx, catalog, progress = start.cfg, start.ctx, start.train.catalog, start.progress

    # Weights: fresh, somebody else's, or those of the checkpoint.
    model, started = fresh_model(cfg, len(catalog.classes)), None
    if cfg.model.weights and not start.newest:
        started = load_weights_to_start(model, cfg.model, catalog.classes, ctx)
    if cfg.model.whiten and not start.newest:
        first_px = cfg.data.size_at(0, cfg.run.epochs)
        ctx.raise_together(lambda: whiten_stem(model, catalog, cfg.data, first_px, ctx))
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

    # The destinations of its metrics, which forget what is done anew, and its first lines.
    cost = interruption(cfg.folder / "metrics.jsonl", progress.step) if ctx.primary else None
    total_steps = sum(start.train.steps_per_epoch(epoch) for epoch in range(cfg.run.epochs))
    tracker = ctx.raise_together(
        lambda: Tracker(
            cfg.tracking,
            cfg.folder,
            name=cfg.name,
            run_config=asdict(cfg),
            total_steps=total_steps,
            epochs=cfg.run.epochs,
            resume_step=last_row(progress, len(catalog)),
            primary=ctx.primary,
        )
    )
    told = [line for line in (started, teacher.line if teacher else None) if line]
    for line in (*_first_lines(start, told, total_steps), *pieces):
        tracker.note(line)
    if cause := os.environ.get(RESTARTED):
        tracker.alert("restarted", f"{cause}; {cost}" if cost else cause)
    if not progress.step:
        tracker.graph(lambda: network_layers(cfg, len(catalog.classes)))

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


def _fit_memory(start: Start, engine: Engine) -> Iterator[str]:
    """Let the engine try each size of batch that the run has, before DALI takes its part; yields what came of it. Collective.

    All at once, because a run that was resumed later would find other parts of the memory taken.
    """
    ctx = start.ctx
    beside = ctx.raise_together(lambda: gpu_bytes(start.train) + gpu_bytes(start.val))
    for rows, size_px in start.train.shapes():
        pieces = engine.fit_memory(rows, size_px, beside)
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
        if cfg.run.extend_to is not None:
            extension = extension_of(cfg.run.extend_lr, cfg.run.extend_from, start.train.steps_per_epoch)
            now = f"it is {extended_lr_at(step, cfg.optim, total_steps, extension):.3g} now"
            follows = extension.words(cfg.optim.lr) if extension else "the learning rate is that of their schedule"
            yield f"it goes on to {cfg.run.epochs} epochs: {follows}; {now}"


def step_back(session: Session, found: NonFinite) -> None:
    """Resume from the last checkpoint, past the step that went wrong, or end the run. Collective. Raises `UserError`."""
    remedy = "lower optim.lr, set optim.clip_norm, or engine.precision to fp32"
    tracker, ctx, store = session.tracker, session.ctx, session.store
    tracker.alert("bad step", str(found))
    if session.cfg.run.on_nonfinite == "stop":
        raise UserError(f"{found}; {remedy}, or pass over such steps by run.on_nonfinite back") from None
    session.wait_for_checkpoint()
    newest = ctx.raise_together(lambda: store.newest() if ctx.primary else None)
    newest, progress = ctx.broadcast_from_rank0(lambda: (newest, read_progress(newest) if newest else Progress()))
    trained = progress.step - sum(step <= progress.step for step in progress.skipped)
    session.steps_back[trained] += 1
    if newest is None:
        raise UserError(f"{found}, and there is no checkpoint to step back to; {remedy}") from None
    if session.steps_back[trained] > STEPS_BACK:
        raise UserError(f"{found}, and {STEPS_BACK} steps back have not helped; {remedy}") from None
    session.engine.load(newest)
    if session.snapshots:
        session.snapshots.give_up()
    session.resume(
        replace(
            progress,
            skipped=sorted({*session.progress.skipped, found.step}),
            arithmetic=session.progress.arithmetic,
            finished=False,
        )
    )
    ctx.raise_together(
        lambda: tracker.reopen(last_row(progress, session.images))
    )  # without the rows of the undone steps
    tracker.note(f"back to step {progress.step}, and on past the images of step {found.step}")


def last_row(progress: Progress, images: int) -> int:
    """Step of the last row of metrics that a resumed run keeps. One that has not closed its epoch writes that row anew."""
    return progress.step - (progress.cursor.seen >= images)


def nothing_left(start: Start) -> str:
    """Say in a line why a run has nothing to train, and what the user may do."""
    cfg, best = start.cfg, f"best {start.progress.best}"
    if start.progress.cursor.epoch < cfg.run.epochs and start.progress.finished:
        return f"{cfg.folder} has ended early ({out_of_patience(start.progress)}): {best}; to go on give a larger --run.patience"
    if start.progress.finished:
        return (
            f"{cfg.folder} is finished: {best}; to train it on give --run.extend_to with more than {cfg.run.epochs} "
            "epochs, to train anew another --run.name"
        )
    return f"{cfg.folder} has reached run.max_steps {cfg.run.max_steps}: {best}; to go on give more, or leave it out"


def out_of_patience(progress: Progress) -> str:
    """Say why a run ends before its last epoch."""
    number = progress.since_best
    return f"none of the last {number} validations was better" if number > 1 else "the last validation was no better"


def _check_extension(cfg: Config, train: Loader, progress: Progress) -> None:
    """Raise `UserError` where the steps so far are not those that a run of all these epochs would have made."""
    if cfg.run.extend_to is None:
        return
    epoch, seen = progress.cursor.epoch, progress.cursor.seen
    steps = sum(map(train.steps_per_epoch, range(epoch))) + -(-seen // cfg.data.batch_at(epoch, cfg.run.epochs))
    require(
        progress.step == steps,
        f"run.extend_to: in {cfg.run.epochs} epochs data.batch {cfg.data.batch} would have come in another order; to go on "
        f"from its weights as a run of its own: --model.weights {cfg.folder} --run.name NEW",
    )


def _check_batches(cfg: Config, classes: int, ctx: DistContext) -> None:
    """Raise `UserError` where batch norm would see one value a channel, which has no variance."""
    shares = ctx.world * cfg.optim.accumulate
    if cfg.engine.sync_bn and ctx.world > 1:
        return  # it sees the images of all ranks
    for epoch in range(cfg.run.epochs):
        batch, size_px = cfg.data.batch_at(epoch, cfg.run.epochs), cfg.data.size_at(epoch, cfg.run.epochs)
        if batch == shares:
            with torch.device("meta"):
                model = fresh_model(cfg, classes).train()
            try:
                model(torch.empty(1, 3, size_px, size_px, device="meta"))
            except ValueError:
                raise UserError(
                    f"data.batch: {batch} is one image of {size_px} px for each rank and micro-batch, of which batch norm "
                    f"cannot tell a variance; give {2 * shares} or more"
                ) from None


def build_engine(cfg: Config, classes: int, ctx: DistContext) -> Engine:
    """Build a network with freshly drawn weights, the same on all ranks, and its engine without a teacher. Collective."""
    if cfg.optim.teacher:
        warn_on_rank0("optim.teacher: what is measured here is without it")
    return engine_for(cfg, fresh_model(cfg, classes), ctx)


def _open_data(cfg: Config, ctx: DistContext) -> tuple[Loader, Loader]:
    """Open the training and the validation images."""
    train = open_catalog(cfg.data, "train")
    refuse_single_class(train)
    val = open_catalog(cfg.data, "val", train.classes)
    return training_loader(cfg, train, ctx), Loader(loaded(cfg), val, ctx, training=False)


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


def _check_room(cfg: Config, store: Store, classes: int, ctx: DistContext) -> None:
    """Raise `UserError` where the disk has no room for the run's checkpoints."""
    with torch.device("meta"):
        model = fresh_model(cfg, classes)
    size = checkpoint_bytes(model, cfg.optim, cfg.engine.compression, ctx.world)
    check_room(store, size, cfg.run.epochs)


def _record(cfg: Config, mirrored: Mirrored | None) -> None:
    """Record a run in its folder, and which mirror is its own. Raises `UserError`."""
    if mirrored:
        mirrored.claim()
    record_run(cfg.folder, to_yaml(cfg))
    if mirrored:
        mirrored.record()
    record_job(cfg.folder)


def _resume_point(store: Store, train: Catalog) -> tuple[Path | None, Progress]:
    """Find the checkpoint to go on from, if there is one, and its progress."""
    newest = store.newest()
    if newest:
        _check_images(newest, store, train)
    return newest, read_progress(newest) if newest else Progress()


def _check_images(newest: Path, store: Store, train: Catalog) -> None:
    """Raise `UserError` where a checkpoint was trained on other images."""
    if read_metadata(newest).get("data") != train.fingerprint():
        divided = ", or was divided into training and validation otherwise" if train.taken.divided_from else ""
        raise UserError(
            f"data.path: {train.root} holds other images or classes than when {store.folder.parent} was started{divided}; "
            "restore them, or give another --run.dir"
        )


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
