"""Check a run that is new or there already, and claim its folder: a refused start has changed nothing."""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data_pipeline.common.address import is_address
from data_pipeline.common.errors import UserError, require
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.torchvision_sets import NAMED
from data_pipeline.summary import refuse_single_class
from trainer.checkpoint.async_writer import check_room
from trainer.checkpoint.files import read_metadata
from trainer.checkpoint.mirror_restore import Mirrored, open_mirror
from trainer.checkpoint.progress import Progress, read_progress
from trainer.checkpoint.run_folder import check_run, claim_run, forget_run, record_job, record_run
from trainer.checkpoint.snapshots import Snapshots
from trainer.checkpoint.store import Store
from trainer.config import Config, to_yaml
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.arithmetic import choose_arithmetic, deterministic_kernels
from trainer.engine.checkpoint_size import checkpoint_bytes
from trainer.engine.compilation import check_device, check_graphs, choose_compile
from trainer.engine.compile_cache import keep_compiled
from trainer.engine.config import EngineConfig
from trainer.engine.loss import fitted_to_classes
from trainer.model.network import check_network
from trainer.optim.config import OptimConfig
from trainer.resilience.sanity_checks import limit_bad
from trainer.resilience.watchdog import FRESH
from trainer.resume_rules import first_difference
from trainer.scoring import best_by
from trainer.setup.parts import fresh_model, loaded, training_loader


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

        held.enter_context(_recorded(cfg, mirrored, ctx))
        ctx.run_on_rank0(store.prepare)
        if snapshots:
            snapshots.open()
        progress = replace(progress, arithmetic=arithmetic)
        yield replace(start, engine=engine, optim=optim, progress=progress, lines=lines)


def _open_data(cfg: Config, ctx: DistContext) -> tuple[Loader, Loader]:
    """Open the training and the validation images."""
    train = open_catalog(cfg.data, "train")
    refuse_single_class(train)
    val = open_catalog(cfg.data, "val", train.classes)
    return training_loader(cfg, train, ctx), Loader(loaded(cfg), val, ctx, training=False)


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
        size_px = cfg.data.augment.seen_px(size_px)
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


def _check_room(cfg: Config, store: Store, classes: int, ctx: DistContext) -> None:
    """Raise `UserError` where the disk has no room for the run's checkpoints."""
    with torch.device("meta"):
        model = fresh_model(cfg, classes)
    size = checkpoint_bytes(model, cfg.optim, cfg.engine.compression, ctx.world)
    check_room(store, size, cfg.run.epochs)


@contextmanager
def _recorded(cfg: Config, mirrored: Mirrored | None, ctx: DistContext) -> Iterator[None]:
    """Record a run in its folder. A new one that is refused before it has trained anything leaves nothing there. Collective."""
    new = ctx.primary and not (cfg.folder / "config.yaml").exists()
    ctx.run_on_rank0(lambda: _record(cfg, mirrored))
    try:
        yield
    except UserError:  # as of weights that do not fit: the mended command is not that of another run
        if new:
            forget_run(cfg.folder)
        raise


def _record(cfg: Config, mirrored: Mirrored | None) -> None:
    """Record a run in its folder, and which mirror is its own. Raises `UserError`."""
    if mirrored:
        mirrored.claim()
    record_run(cfg.folder, to_yaml(cfg))
    if mirrored:
        mirrored.record()
    record_job(cfg.folder)


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
