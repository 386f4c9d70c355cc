"""A run opened for training: its parts, and what happens between its steps."""

import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.coverage import first_fault
from data_pipeline.loader import Cursor, Loader
from data_pipeline.summary import summary
from trainer.checkpoint.async_writer import Saver
from trainer.checkpoint.files import WEIGHTS
from trainer.checkpoint.store import Progress, Store, read_progress
from trainer.config import Config
from trainer.distributed import DistContext
from trainer.engine.base import Engine
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.evaluate import evaluate
from trainer.model.normalize import Normalise
from trainer.model.pretrained import load_weights_to_start
from trainer.model.resnet import ResNet, build_resnet, freeze
from trainer.model.whitening import whiten_stem
from trainer.optim.optimizer import lr_at
from trainer.resilience.sanity_checks import STEPS_BACK, NonFinite, find_nonfinite, limit_bad
from trainer.resilience.watchdog import Watchdog, heartbeat
from trainer.tracking.meter import Meter
from trainer.tracking.model_summary import Layer, layers
from trainer.tracking.profiler import Trace
from trainer.tracking.tracker import Tracker


class Session:
    """What a run consists of while it trains. All of its methods are to be called on every rank alike."""

    def __init__(
        self,
        cfg: Config,
        engine: EngineConfig,
        ctx: DistContext,
        train: Loader,
        val: Loader,
        store: Store,
        newest: Path | None,
        progress: Progress,
        lines: list[str],
    ) -> None:
        self.cfg, self.ctx, self.store, self.progress = cfg, ctx, store, progress
        self.loader, self.val_loader = train, val
        self.images, self.classes = len(train.catalog), train.catalog.classes
        self.total_steps = sum(train.steps_per_epoch(epoch) for epoch in range(cfg.run.epochs))
        model, started = fresh_model(cfg, len(self.classes)), None
        if cfg.model.weights and not newest:
            started = load_weights_to_start(model, cfg.model, self.classes, ctx)
        if cfg.model.whiten and not newest:
            first_px = cfg.data.size_at(0, cfg.run.epochs)
            ctx.raise_together(lambda: whiten_stem(model, train.catalog, cfg.data, first_px, ctx))
        self.engine = engine_for(replace(cfg, engine=engine), model, ctx)
        self._scaled = engine.precision == "fp16"
        if newest:
            self.engine.load(newest)
        self.metadata = {
            "model": cfg.model.name,
            "classes": json.dumps(self.classes),
            "data": train.catalog.fingerprint(),
        }
        self.engine.capture_state(
            self.metadata
        )  # thrown away: it gets the memory for copies, which training would wait for
        self.tracker = ctx.raise_together(self._open_tracker)
        for checkpoint, why in store.passed_over.items():
            self.tracker.note(f"passed over {checkpoint}: {why}")
        for line in summary(cfg.data, train.catalog, val.catalog):
            self.tracker.note(line)
        for catalog in (train.catalog, val.catalog):
            for path, why in catalog.bad.items():
                self.tracker.note(f"left out {catalog.root / path}: {why}")
        if started:
            self.tracker.note(started)
        if not progress.step:
            self.tracker.graph(lambda: network_layers(cfg, len(self.classes)))
        if newest:
            self.tracker.note(f"resuming {cfg.folder} at step {progress.step} of {self.total_steps}")
            for line in [*lines, *self._of_extension()]:
                self.tracker.note(line)
        self.meter = self._start_meter()
        self.trace = Trace(cfg.run.profiled, cfg.folder / "profile", ctx, done=progress.step)
        self.saver = Saver(store, ctx, progress, lambda line: self.tracker.note(line))
        self.watchdog = Watchdog(
            cfg.run.stall_s, cfg.folder / "stacks", ctx, lambda line: self.tracker.alert("stalled", line)
        )
        self.save_time: dict[str, float] = {}  # of the last checkpoint, for the next row of metrics
        self._steps_back: Counter[int] = Counter()  # by the updates in the checkpoint that they led to

    def _of_extension(self) -> list[str]:
        if self.cfg.run.extend_to is None:
            return []
        lr = lr_at(self.progress.step, self.cfg.optim, self.total_steps)
        return [
            f"it goes on as a run of {self.cfg.run.epochs} epochs would from here: the learning rate is {lr:.3g} now, and "
            "ends as the schedule of all of them does"
        ]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While its parts are at work."""
        with ExitStack() as parts:
            self.tracker.__enter__()
            parts.push(lambda *error: self.tracker.__exit__(*error))  # whichever is there by then
            for part in (self.trace, self.saver, self.watchdog):
                parts.enter_context(part)
            yield

    def _start_meter(self) -> Meter:
        self._reduced = self.progress.step  # that far the meter has been read
        return Meter(self.ctx, self.progress.sums, len(self.classes), self.progress.train_s, scaled=self._scaled)

    def _open_tracker(self) -> Tracker:
        return Tracker(
            self.cfg.tracking,
            self.cfg.folder,
            name=self.cfg.name,
            run_config=asdict(self.cfg),
            total_steps=self.total_steps,
            epochs=self.cfg.run.epochs,
            resume_step=self.progress.step,
            primary=self.ctx.primary,
        )

    @property
    def epoch_read(self) -> bool:
        return self.progress.cursor.seen >= self.images

    @property
    def epoch(self) -> float:
        """Epochs trained so far, with the part of the one under way."""
        return self.progress.cursor.epoch + self.progress.cursor.seen / self.images

    def begin_epoch(self) -> None:
        """Go to where the epoch begins or goes on, and freeze what stays as it is in it."""
        heartbeat("data", self.progress.step, fresh=True)
        freeze(self.engine.module, self.cfg.model, self.progress.cursor.epoch)
        self.loader.seek(self.progress.cursor)

    def log(self, lr: float, stop: bool) -> bool:
        """Write a row of metrics; whether any rank was asked to stop. Collective."""
        scalars, stopping = self.reduce(stop)
        self.tracker.log({**scalars, "train/lr": lr}, self.progress.step, self.epoch)
        return stopping

    def reduce(self, stop: bool) -> tuple[dict[str, float], bool]:
        """Metrics since the last call, and whether any rank was asked to stop. Collective. Raises `NonFinite`."""
        heartbeat("all-reduce")
        self.name_bad(self.loader)
        bad = self.loader.bad_images
        scalars, (stops, bad_images) = self.meter.reduce(stop or self.tracker.stop_requested, bad)
        heartbeat("report")
        since, self._reduced = self._reduced, self.progress.step
        if self.meter.nonfinite:
            update, what = self.meter.nonfinite
            trained = [step for step in range(since + 1, self.progress.step + 1) if step not in self.progress.skipped]
            raise NonFinite(trained[update - 1], what)
        self.progress = replace(self.progress, sums=self.meter.epoch_sums, train_s=self.meter.train_s)
        limit_bad(self.loader, int(bad_images))
        scalars |= {"data/bad_images": bad_images + len(self.loader.catalog.bad)}
        scalars |= {**self.save_time, **self.saver.take_scalars()}
        self.save_time = {}
        return scalars, stops > 0

    def name_bad(self, loader: Loader) -> None:
        for path, why in loader.take_bad():
            line = f"rank {self.ctx.rank} cannot read {path}: {why}; the image does not count"
            if self.ctx.primary:
                self.tracker.note(line)
            else:
                print(line, flush=True)  # a tracker elsewhere has no console

    def prove_shares(self) -> None:
        """Make sure that the ranks together read every image of this epoch exactly once. Collective."""
        fault = first_fault(self.ctx.gather(torch.from_numpy(self.loader.coverage_sums())).numpy())
        if fault:
            raise UserError(f"data.path: {fault}")

    def save(self, best: bool = False) -> None:
        """Write a checkpoint while training goes on; what it costs the training is the time of a copy. Collective.

        Raises `NonFinite`, and `UserError` where the ranks' weights have come apart; then nothing is written.
        """
        start = time.perf_counter()
        heartbeat("save")
        self.settle()
        lost = find_nonfinite(self.engine.module, self.ctx)
        if lost:
            raise NonFinite(self.progress.step, f"weight {lost}")
        self.saver.start(self.progress, self.engine.capture_state(self.metadata), best=best)
        self.save_time = {"perf/ckpt_save_s": time.perf_counter() - start}
        self.meter.pause()

    def settle(self) -> None:
        """Wait for the checkpoint under way. Where it failed, the best is again the one on disk. Collective."""
        if self.saver.wait():
            self.progress = replace(self.progress, best_top1_pct=self.saver.saved.best_top1_pct)

    def step_back(self, found: NonFinite) -> None:
        """Go on from the last checkpoint, past the update that went wrong, or end the run. Collective. Raises `UserError`."""
        remedy = "lower optim.lr, set optim.clip_norm, or engine.precision to fp32"
        self.tracker.alert("bad update", str(found))
        if self.cfg.run.on_nonfinite == "stop":
            raise UserError(f"{found}; {remedy}, or pass over such updates by run.on_nonfinite back") from None
        self.settle()
        newest = self.ctx.raise_together(lambda: self.store.newest() if self.ctx.primary else None)
        newest, progress = self.ctx.broadcast_from_rank0(
            lambda: (newest, read_progress(newest) if newest else Progress())
        )
        trained = progress.step - sum(step <= progress.step for step in progress.skipped)
        self._steps_back[trained] += 1
        if newest is None:
            raise UserError(f"{found}, and there is no checkpoint to step back to; {remedy}") from None
        if self._steps_back[trained] > STEPS_BACK:
            raise UserError(f"{found}, and {STEPS_BACK} steps back have not helped; {remedy}") from None
        self.progress = replace(
            progress,
            skipped=sorted({*self.progress.skipped, found.step}),
            arithmetic=self.progress.arithmetic,
            finished=False,
        )
        self.engine.load(newest)
        self.meter = self._start_meter()
        self.tracker.close()
        self.tracker = self.ctx.raise_together(
            self._open_tracker
        )  # as in a resumed run: without the rows of what is undone
        self.tracker.__enter__()
        self.tracker.note(f"back to step {progress.step}, and on past the images of step {found.step}")

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Collective. Raises `UserError` where it is not."""
        heartbeat("save")
        failure = self.saver.wait()
        if failure:
            raise failure

    def validate(self) -> tuple[dict[str, float], bool]:
        """Scores on the validation images, and whether they are the best so far. Collective."""
        heartbeat("save")
        self.settle()
        heartbeat("evaluate", fresh=True)
        self.engine.sync_buffers()
        scores = evaluate(self._predict, self.val_loader, self.ctx)
        heartbeat("report")
        self.name_bad(self.val_loader)
        unread = len(self.val_loader.catalog) - scores.images
        if unread:
            self.tracker.note(f"{unread} of {unread + scores.images} validation images cannot be read and do not count")
            limit_bad(self.val_loader, unread)
        if not math.isfinite(scores.loss):
            self.tracker.alert("bad validation", f"val loss is {scores.loss}; these weights are not taken for the best")
        best = scores.beat(self.progress.best_top1_pct)
        if best:
            self.progress = replace(self.progress, best_top1_pct=scores.top1_pct)
        self.meter.pause()
        return {**scores.named("val", len(self.classes)), "val/best_top1_pct": self.progress.best_top1_pct}, best

    def _predict(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.engine.predict(images)
        heartbeat("evaluate", fresh=False)  # each batch, for a long validation does not stand still
        return logits

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

    def say_finished(self) -> None:
        """Where the weights are, and what comes next."""
        best = self.progress.best_top1_pct
        which, told = ("best", f"best val top-1 {best:.2f} %, ") if best >= 0 else ("last", "")
        weights = self.store.folder / which / WEIGHTS
        command = shlex.join(["python", "-m", "trainer.report", str(self.cfg.folder)])
        self.tracker.note(f"trained {self.cfg.run.epochs} epochs: {told}weights in {weights}; next: {command}")

    def end_early(self) -> Literal[True]:
        """`run.max_steps` is reached within an epoch: evaluate and save as it stands. Collective."""
        scalars, best = self.validate()
        self.tracker.log(scalars, self.progress.step, self.epoch)
        self.save(best)
        return self.say_early()

    def say_early(self) -> Literal[True]:
        self.finish()
        self.tracker.note(
            f"stopped after run.max_steps: {self.progress.step} of {self.total_steps} steps, "
            f"best val top-1 {self.progress.best_top1_pct:.2f} %, saved in {self.cfg.folder}"
        )
        return True

    def hand_over(self) -> Literal[True]:
        self.finish()
        self.tracker.alert("asked to stop", f"saved step {self.progress.step}; the same command goes on from there")
        return True


def fresh_model(cfg: Config, classes: int) -> ResNet:
    """A network with freshly drawn weights, the same on all ranks, of which all is frozen that is never trained."""
    torch.manual_seed(cfg.run.seed)
    model = build_resnet(cfg.model, classes)
    freeze(model, cfg.model, epoch=cfg.run.epochs)
    return model


def engine_for(cfg: Config, model: ResNet, ctx: DistContext) -> Engine:
    """What trains `model`. Collective."""
    normalise = Normalise(cfg.data.mean, cfg.data.std, ctx.device)
    if cfg.engine.name == "deepspeed":
        from trainer.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, normalise, cfg.engine, cfg.optim, ctx)
    return DdpEngine(model, normalise, cfg.engine, cfg.optim, ctx)


def network_layers(cfg: Config, classes: int) -> list[Layer]:
    """The layers of the run's network as dashboards show them, for one image. Touches no weights and draws nothing."""
    with torch.device("meta"):
        size_px = max(cfg.data.sizes_px)
        return layers(build_resnet(cfg.model, classes), torch.empty(1, 3, size_px, size_px))
