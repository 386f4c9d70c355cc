"""fit(): the training loop, and what it needs to be opened."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.config import require
from data_pipeline.loader import Batch, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.torchvision_sets import NAMED
from data_pipeline.summary import refuse_single_class
from trainer.checkpoint.async_writer import check_room
from trainer.checkpoint.files import read_metadata
from trainer.checkpoint.store import Progress, Store, check_run, claim_run, read_progress, record_run
from trainer.config import Config, first_difference, to_yaml
from trainer.distributed import DistContext
from trainer.engine.arithmetic import choose_arithmetic
from trainer.engine.base import Engine
from trainer.engine.checkpoint_size import checkpoint_bytes
from trainer.engine.compilation import check_device
from trainer.engine.compile_cache import keep_compiled
from trainer.optim.optimizer import lr_at
from trainer.resilience.sanity_checks import NonFinite, limit_bad
from trainer.resilience.signals import StopFlag
from trainer.resilience.watchdog import heartbeat
from trainer.session import Session, engine_for, fresh_model


def fit(cfg: Config, ctx: DistContext, stop: StopFlag, started: Callable[[], None] = lambda: None) -> Progress:
    """Train until all epochs are done, `run.max_steps` is reached or `stop` is raised; resume the run that is there.

    `started` is called when all is open, before the run's own console speaks.

    Collective. Raises `UserError`, on every rank, for what a user can mend.
    """
    check = partial(check_run, cfg.folder, partial(first_difference, cfg=cfg))
    if not (os.path.lexists(cfg.data.path) or cfg.data.path in ("builtin", *NAMED)):
        ctx.raise_together(lambda: open_catalog(cfg.data, "train"))  # first of all, it says so
    ctx.run_on_rank0(check)  # at once, for to read the images may take minutes
    check_device(cfg.engine, ctx.device)
    train, val = ctx.raise_together(lambda: _open_data(cfg, ctx))
    store = Store(cfg.folder, cfg.run.keep, cfg.run.keep_every)
    with ExitStack() as held:
        ctx.run_on_rank0(lambda: held.enter_context(claim_run(cfg.folder)))
        ctx.run_on_rank0(check)  # anew: from here on nobody else writes to the folder
        found = ctx.raise_together(lambda: _resume_point(store, train.catalog) if ctx.primary else None)
        newest, progress = ctx.broadcast_from_rank0(lambda: found or (None, Progress()))
        progress = replace(progress, finished=progress.cursor.epoch >= cfg.run.epochs)  # it may have been extended
        if progress.finished or progress.step >= (cfg.run.max_steps or math.inf):
            if ctx.primary:
                print(_nothing_left(cfg, progress))
            return progress
        _check_extension(cfg, train, progress)
        _check_batches(cfg, len(train.catalog.classes), ctx)
        for loader in (train, val):
            limit_bad(loader)
        ctx.run_on_rank0(lambda: _check_room(cfg, store, len(train.catalog.classes), ctx))
        keep_compiled(cfg.engine, ctx)
        engine, arithmetic, lines = choose_arithmetic(cfg.engine, ctx, progress.arithmetic)
        held.callback(torch.set_num_threads, torch.get_num_threads())
        if ctx.device.type == "cpu":
            torch.set_num_threads(arithmetic.threads[ctx.rank])
        ctx.run_on_rank0(lambda: record_run(cfg.folder, to_yaml(cfg)))
        ctx.run_on_rank0(store.prepare)
        progress = replace(progress, arithmetic=arithmetic)
        session = Session(cfg, engine, ctx, train, val, store, newest, progress, lines)
        started()
        with session.opened():
            return _train(cfg, session, stop)


def _nothing_left(cfg: Config, progress: Progress) -> str:
    best = f"best val top-1 {progress.best_top1_pct:.2f} %"
    if progress.finished:
        return (
            f"{cfg.folder} is finished: {best}; to train it on give --run.extend_to with more than {cfg.run.epochs} "
            "epochs, to train anew another --run.name"
        )
    return f"{cfg.folder} has reached run.max_steps {cfg.run.max_steps}: {best}; to go on give more, or leave it out"


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
    """Raise `UserError` where batch norm would see one value a channel, of which there is no variance."""
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


def _train(cfg: Config, session: Session, stop: StopFlag) -> Progress:
    while not session.progress.finished:
        try:
            if _train_epoch(cfg, session, stop):
                return session.progress
        except NonFinite as found:
            session.step_back(found)
    session.finish()
    session.say_finished()
    return session.progress


def _train_epoch(cfg: Config, session: Session, stop: StopFlag) -> bool:
    """Train from the cursor to the end of its epoch. Whether the training ends there, or even before."""
    loader, engine, meter = session.loader, session.engine, session.meter
    session.begin_epoch()
    for micro_batches in _grouped(meter.waiting(loader), cfg.optim.accumulate):
        lr = lr_at(session.progress.step, cfg.optim, session.total_steps)
        step = session.progress.step + 1
        heartbeat("update")
        if step not in session.progress.skipped:
            meter.add(engine.step(micro_batches, lr))
        session.trace.step(step)
        session.progress = replace(session.progress, step=step, cursor=loader.cursor)
        heartbeat("update", step, fresh=False)
        if session.epoch_read:
            continue  # the loader ends here, and the end of the epoch reports and saves

        save_due = step % cfg.run.save_every == 0
        last_step = step == cfg.run.max_steps
        if step % cfg.run.log_every == 0 or save_due or last_step:
            stopping = session.log(lr, stop.raised)
            if last_step:
                return session.end_early()
            if save_due or stopping:
                session.save()
            if stopping:
                return session.hand_over()
    if session.end_epoch(stop.raised):
        return session.hand_over()
    return session.progress.step == cfg.run.max_steps and session.say_early()


def build_engine(cfg: Config, classes: int, ctx: DistContext) -> Engine:
    """A network with freshly drawn weights, the same on all ranks, and what trains it. Collective."""
    return engine_for(cfg, fresh_model(cfg, classes), ctx)


def _open_data(cfg: Config, ctx: DistContext) -> tuple[Loader, Loader]:
    """What reads the training and the validation images."""
    train = open_catalog(cfg.data, "train")
    refuse_single_class(train)
    val = open_catalog(cfg.data, "val", train.classes)
    return training_loader(cfg, train, ctx), Loader(val, cfg.data, ctx, training=False)


def training_loader(cfg: Config, catalog: Catalog, ctx: DistContext) -> Loader:
    """What reads the images that a run trains on. Raises `UserError`."""
    return Loader(
        catalog,
        cfg.data,
        ctx,
        training=True,
        seed=cfg.run.seed,
        epochs=cfg.run.epochs,
        accumulate=cfg.optim.accumulate,
    )


def _check_room(cfg: Config, store: Store, classes: int, ctx: DistContext) -> None:
    """Raise `UserError` where the disk has no room for the run's checkpoints."""
    with torch.device("meta"):
        model = fresh_model(cfg, classes)
    size = checkpoint_bytes(model, cfg.optim, cfg.engine.compression, ctx.world)
    check_room(store, size, cfg.run.epochs)


def _resume_point(store: Store, train: Catalog) -> tuple[Path | None, Progress]:
    """The checkpoint to go on from, if there is one, and how far it had come."""
    newest = store.newest()
    if newest and read_metadata(newest).get("data") != train.fingerprint():
        divided = ", or was divided into training and validation otherwise" if train.taken.divided_from else ""
        raise UserError(
            f"data.path: {train.root} holds other images or classes than when {store.folder.parent} was started{divided}; "
            "restore them, or give another --run.dir"
        )
    return newest, read_progress(newest) if newest else Progress()


def _grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
