"""fit(): the training loop, and what it needs to be opened."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.loader import Batch, Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.summary import refuse_single_class
from trainer.checkpoint.async_writer import check_room
from trainer.checkpoint.files import read_metadata
from trainer.checkpoint.store import Progress, Store, check_run, claim_run, read_progress, record_run
from trainer.config import Config, first_difference, to_yaml
from trainer.distributed import DistContext
from trainer.engine.base import Engine
from trainer.engine.checkpoint_size import checkpoint_bytes
from trainer.engine.compilation import check_device, keep_compiled
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
    check = partial(check_run, cfg.folder, lambda saved: first_difference(saved, cfg))
    ctx.run_on_rank0(check)  # at once, for to read the images may take minutes
    check_device(cfg.engine, ctx.device)
    train, val = ctx.raise_together(lambda: _open_data(cfg, ctx))
    store = Store(cfg.folder, cfg.run.keep, cfg.run.keep_every)
    with ExitStack() as claim:
        ctx.run_on_rank0(lambda: claim.enter_context(claim_run(cfg.folder)))
        ctx.run_on_rank0(check)  # anew: from here on nobody else writes to the folder
        found = ctx.raise_together(lambda: _resume_point(store, train.catalog) if ctx.primary else None)
        newest, progress = ctx.broadcast_from_rank0(lambda: found or (None, Progress()))
        if progress.finished or progress.step >= (cfg.run.max_steps or math.inf):
            if ctx.primary:
                done = "is finished" if progress.finished else f"has reached run.max_steps {cfg.run.max_steps}"
                print(
                    f"{cfg.folder} {done}: best val top-1 {progress.best_top1_pct:.2f} %; "
                    "to train anew give another --run.name"
                )
            return progress
        for loader in (train, val):
            limit_bad(loader)
        ctx.run_on_rank0(lambda: _check_room(cfg, store, len(train.catalog.classes), ctx))
        ctx.run_on_rank0(lambda: record_run(cfg.folder, to_yaml(cfg)))
        keep_compiled(cfg.engine, cfg.folder)
        ctx.run_on_rank0(store.prepare)
        session = Session(cfg, ctx, train, val, store, newest, progress)
        started()
        with session.opened():
            return _train(cfg, session, stop)


def _train(cfg: Config, session: Session, stop: StopFlag) -> Progress:
    while not session.progress.finished:
        try:
            if _train_epoch(cfg, session, stop):
                return session.progress
        except NonFinite as found:
            session.step_back(found)
    session.finish()
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
