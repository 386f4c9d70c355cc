"""fit(): the training loop, and what it needs to be opened."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data_pipeline.catalog import Catalog, open_catalog
from data_pipeline.errors import UserError
from data_pipeline.loader import Batch, Cursor, Loader
from data_pipeline.proof import first_fault
from trainer.checkpoint import Progress, Store, check_run, claim_run, read_progress, record_run
from trainer.config import Config, first_difference, to_yaml
from trainer.engine import Engine, Normalise, check_device, keep_compiled, read_metadata
from trainer.engine_ddp import DdpEngine
from trainer.evaluate import evaluate
from trainer.layers import Layer, layers
from trainer.machine import Machine
from trainer.meter import Meter
from trainer.optim import lr_at
from trainer.preempt import StopFlag
from trainer.resnet import ResNet, build_resnet, freeze
from trainer.saver import Saver, check_room, checkpoint_bytes
from trainer.trace import Trace
from trainer.tracker import Tracker
from trainer.weights import load_weights_to_start


def fit(cfg: Config, machine: Machine, stop: StopFlag) -> Progress:
    """Train until all epochs are done, `run.max_steps` is reached or `stop` is raised; resume the run that is there.

    Collective. Raises `UserError`, on every rank, for what a user can mend.
    """
    machine.on_primary(lambda: check_run(cfg.folder, lambda saved: first_difference(saved, cfg)))
    check_device(cfg.engine, machine.device)
    train, val = machine.agree(lambda: _open_data(cfg, machine))
    store = Store(cfg.folder, cfg.run.keep, cfg.run.keep_every)
    found = machine.agree(lambda: _resume_point(store, train.catalog) if machine.primary else None)
    newest, progress = machine.as_primary(lambda: found or (None, Progress()))
    if progress.finished or progress.step >= (cfg.run.max_steps or math.inf):
        if machine.primary:
            done = "is finished" if progress.finished else f"has reached run.max_steps {cfg.run.max_steps}"
            print(
                f"{cfg.folder} {done}: best val top-1 {progress.best_top1_pct:.2f} %; to train anew give another --run.name"
            )
        return progress
    for loader in (train, val):
        limit_bad(loader)
    machine.on_primary(lambda: _check_room(cfg, store, len(train.catalog.classes), machine))
    machine.on_primary(lambda: record_run(cfg.folder, to_yaml(cfg)))
    keep_compiled(cfg.engine, cfg.folder)
    with machine.agree(lambda: claim_run(cfg.folder) if machine.primary else nullcontext()):
        machine.on_primary(store.prepare)
        session = Session(cfg, machine, train, val, store, newest, progress)
        with session.tracker, session.trace, session.saver:
            return _train(cfg, session, stop)


def _train(cfg: Config, session: "Session", stop: StopFlag) -> Progress:
    loader, engine, meter = session.loader, session.engine, session.meter
    while not session.progress.finished:
        session.freeze()
        loader.seek(session.progress.cursor)
        for micro_batches in _grouped(meter.waiting(loader), cfg.optim.accumulate):
            lr = lr_at(session.progress.step, cfg.optim, session.total_steps)
            meter.add(engine.step(micro_batches, lr))
            step = session.progress.step + 1
            session.trace.step(step)
            session.progress = replace(session.progress, step=step, cursor=loader.cursor)
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
        if session.progress.step == cfg.run.max_steps:
            return session.say_early()
    session.finish()
    return session.progress


class Session:
    """A run opened for training: its parts, and what happens between its steps."""

    def __init__(
        self,
        cfg: Config,
        machine: Machine,
        train: Loader,
        val: Loader,
        store: Store,
        newest: Path | None,
        progress: Progress,
    ) -> None:
        self.cfg, self.machine, self.progress = cfg, machine, progress
        self.loader, self.val_loader = train, val
        self.images, classes = len(train.catalog), train.catalog.classes
        self.total_steps = sum(train.updates(epoch) for epoch in range(cfg.run.epochs))
        model, started = fresh_model(cfg, len(classes)), None
        if cfg.model.weights and not newest:
            started = load_weights_to_start(model, cfg.model, classes, machine)
        self.engine = engine_for(cfg, model, machine)
        if newest:
            self.engine.load(newest)
        self.metadata = {
            "model": cfg.model.name,
            "classes": json.dumps(classes),
            "data": train.catalog.fingerprint(),
        }
        self.tracker = machine.agree(self._open_tracker)
        for checkpoint, why in store.passed_over.items():
            self.tracker.note(f"passed over {checkpoint}: {why}")
        for catalog in (train.catalog, val.catalog):
            for path, why in catalog.bad.items():
                self.tracker.note(f"left out {catalog.root / path}: {why}")
        if started:
            self.tracker.note(started)
        if not progress.step:
            self.tracker.graph(lambda: network_layers(cfg, len(classes)))
        if newest:
            self.tracker.note(f"resuming {cfg.folder} at step {progress.step} of {self.total_steps}")
        self.meter = Meter(machine, progress.sums, progress.train_s)
        self.trace = Trace(cfg.run.profile, cfg.folder / "profile", machine, done=progress.step)
        self.saver = Saver(store, machine, progress, self.tracker.note)
        self.save_time: dict[str, float] = {}  # of the last checkpoint, for the next row of metrics

    def _open_tracker(self) -> Tracker:
        return Tracker(
            self.cfg.tracking,
            self.cfg.folder,
            name=self.cfg.run.name,
            run_config=asdict(self.cfg),
            total_steps=self.total_steps,
            epochs=self.cfg.run.epochs,
            resume_step=self.progress.step,
            primary=self.machine.primary,
        )

    @property
    def epoch_read(self) -> bool:
        return self.progress.cursor.seen >= self.images

    @property
    def epoch(self) -> float:
        """Epochs trained so far, with the part of the one under way."""
        return self.progress.cursor.epoch + self.progress.cursor.seen / self.images

    def freeze(self) -> None:
        """Freeze what stays as it is in the epoch that begins or goes on."""
        freeze(self.engine.module, self.cfg.model, self.progress.cursor.epoch)

    def log(self, lr: float, stop: bool) -> bool:
        """Write a row of metrics; whether any rank was asked to stop. Collective."""
        scalars, stopping = self.reduce(stop)
        self.tracker.log({**scalars, "train/lr": lr}, self.progress.step, self.epoch)
        return stopping

    def reduce(self, stop: bool) -> tuple[dict[str, float], bool]:
        """Metrics since the last call, and whether any rank was asked to stop. Collective."""
        self.name_bad(self.loader)
        bad = self.loader.bad_images
        scalars, (stops, bad_images) = self.meter.reduce(stop or self.tracker.stop_requested, bad)
        self.progress = replace(self.progress, sums=self.meter.epoch_sums, train_s=self.meter.train_s)
        limit_bad(self.loader, int(bad_images))
        scalars |= {"data/bad_images": bad_images + len(self.loader.catalog.bad)}
        scalars |= {**self.save_time, **self.saver.take_scalars()}
        self.save_time = {}
        return scalars, stops > 0

    def name_bad(self, loader: Loader) -> None:
        for path, why in loader.take_bad():
            line = f"rank {self.machine.rank} cannot read {path}: {why}; the image does not count"
            if self.machine.primary:
                self.tracker.note(line)
            else:
                print(line, flush=True)  # a tracker elsewhere has no console

    def prove_shares(self) -> None:
        """Make sure that the ranks together read every image of this epoch exactly once. Collective."""
        fault = first_fault(self.machine.gather(torch.from_numpy(self.loader.tally())).numpy())
        if fault:
            raise UserError(f"data.path: {fault}")

    def save(self, best: bool = False) -> None:
        """Write a checkpoint while training goes on; what it costs the training is the time of a copy. Collective."""
        start = time.perf_counter()
        self.settle()
        self.saver.start(self.progress, self.engine.snapshot(self.metadata), best=best)
        self.save_time = {"perf/ckpt_save_s": time.perf_counter() - start}
        self.meter.pause()

    def settle(self) -> None:
        """Wait for the checkpoint under way. Where it failed, the best is again the one on disk. Collective."""
        if self.saver.wait():
            self.progress = replace(self.progress, best_top1_pct=self.saver.saved.best_top1_pct)

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Collective. Raises `UserError` where it is not."""
        failure = self.saver.wait()
        if failure:
            raise failure

    def validate(self) -> tuple[dict[str, float], bool]:
        """Scores on the validation images, and whether they are the best so far. Collective."""
        self.settle()
        self.engine.agree()
        scores = evaluate(self.engine.predict, self.val_loader, self.machine)
        self.name_bad(self.val_loader)
        unread = len(self.val_loader.catalog) - scores.images
        if unread:
            self.tracker.note(f"{unread} of {unread + scores.images} validation images cannot be read and do not count")
            limit_bad(self.val_loader, unread)
        best = scores.top1_pct > self.progress.best_top1_pct
        if best:
            self.progress = replace(self.progress, best_top1_pct=scores.top1_pct)
        self.meter.pause()
        return {**scores.named("val"), "val/best_top1_pct": self.progress.best_top1_pct}, best

    def end_epoch(self, stop: bool) -> bool:
        """Evaluate, report, move on to the next epoch, save; whether any rank was asked to stop. Collective.

        One that is to stop leaves the evaluation to the run that goes on, for it may be short of time.
        """
        rest, stopping = self.reduce(stop)
        self.prove_shares()
        if stopping:
            self.save()
            return True
        scalars, best = self.validate()
        epoch = self.progress.cursor.epoch + 1
        perf = {name: value for name, value in rest.items() if not name.startswith("train/")}  # of the last steps
        self.tracker.epoch({**perf, **self.meter.end_epoch(), **scalars}, self.progress.step, epoch, best)
        self.tracker.weights(self.engine.module.named_parameters(), self.progress.step, epoch)
        self.progress = replace(
            self.progress, cursor=Cursor(epoch), sums=self.meter.epoch_sums, finished=epoch == self.cfg.run.epochs
        )
        self.save(best)
        return False

    def end_early(self) -> Progress:
        """`run.max_steps` is reached within an epoch: evaluate and save as it stands. Collective."""
        scalars, best = self.validate()
        self.tracker.log(scalars, self.progress.step, self.epoch)
        self.save(best)
        return self.say_early()

    def say_early(self) -> Progress:
        self.finish()
        self.tracker.note(
            f"stopped after run.max_steps: {self.progress.step} of {self.total_steps} steps, "
            f"best val top-1 {self.progress.best_top1_pct:.2f} %, saved in {self.cfg.folder}"
        )
        return self.progress

    def hand_over(self) -> Progress:
        self.finish()
        self.tracker.alert("asked to stop", f"saved step {self.progress.step}; the same command goes on from there")
        return self.progress


def build_engine(cfg: Config, classes: int, machine: Machine) -> Engine:
    """A network with freshly drawn weights, the same on all ranks, and what trains it. Collective."""
    return engine_for(cfg, fresh_model(cfg, classes), machine)


def fresh_model(cfg: Config, classes: int) -> ResNet:
    """A network with freshly drawn weights, the same on all ranks, of which all is frozen that is never trained."""
    torch.manual_seed(cfg.run.seed)
    model = build_resnet(cfg.model, classes)
    freeze(model, cfg.model, epoch=cfg.run.epochs)
    return model


def engine_for(cfg: Config, model: ResNet, machine: Machine) -> Engine:
    """What trains `model`. Collective."""
    normalise = Normalise(cfg.data.mean, cfg.data.std, machine.device)
    if cfg.engine.name == "deepspeed":
        from trainer.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, normalise, cfg.engine, cfg.optim, machine)
    return DdpEngine(model, normalise, cfg.engine, cfg.optim, machine)


def network_layers(cfg: Config, classes: int) -> list[Layer]:
    """The layers of the run's network as dashboards show them, for one image. Touches no weights and draws nothing."""
    with torch.device("meta"):
        size_px = max(cfg.data.sizes_px)
        return layers(build_resnet(cfg.model, classes), torch.empty(1, 3, size_px, size_px))


def limit_bad(loader: Loader, found: int = 0) -> None:
    """Raise `UserError` where more images of a split are bad than may be; all ranks together `found` so many on reading."""
    catalog, cfg = loader.catalog, loader.cfg
    bad, images = found + len(catalog.bad), len(catalog) + len(catalog.bad)
    example = next((f", as {path}: {why}" for path, why in catalog.bad.items()), "")
    told = f"{bad} of the {images} images in {catalog.root} cannot be read{example}"
    if bad and cfg.on_error == "fail":
        raise UserError(f"data.on_error: {told}; mend them, or let them be skipped")
    if bad > cfg.max_bad_share * images:
        raise UserError(f"data.max_bad_share: {told}; mend them, or allow more than {cfg.max_bad_share:.2%}")


def _open_data(cfg: Config, machine: Machine) -> tuple[Loader, Loader]:
    """What reads the training and the validation images."""
    train = open_catalog(cfg.data, "train")
    val = open_catalog(cfg.data, "val", train.classes)
    return training_loader(cfg, train, machine), Loader(val, cfg.data, machine, training=False)


def training_loader(cfg: Config, catalog: Catalog, machine: Machine) -> Loader:
    """What reads the images that a run trains on. Raises `UserError`."""
    return Loader(
        catalog,
        cfg.data,
        machine,
        training=True,
        seed=cfg.run.seed,
        epochs=cfg.run.epochs,
        accumulate=cfg.optim.accumulate,
    )


def _check_room(cfg: Config, store: Store, classes: int, machine: Machine) -> None:
    """Raise `UserError` where the disk has no room for the run's checkpoints."""
    with torch.device("meta"):
        model = fresh_model(cfg, classes)
    size = checkpoint_bytes(model, cfg.optim, cfg.engine.compression, machine.world)
    check_room(store, size, cfg.run.epochs)


def _resume_point(store: Store, train: Catalog) -> tuple[Path | None, Progress]:
    """The checkpoint to go on from, if there is one, and how far it had come."""
    newest = store.newest()
    if newest and read_metadata(newest).get("data") != train.fingerprint():
        raise UserError(
            f"data.path: {train.root} holds other images or classes than when {store.folder.parent} was started; "
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
