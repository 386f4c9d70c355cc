"""A run under way: its position, and its work between optimizer steps."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from data_pipeline.common.errors import UserError, printable
from data_pipeline.coverage import first_fault
from data_pipeline.loader import Batch, Cursor, Loader
from trainer.checkpoint.async_writer import Saver
from trainer.checkpoint.mirror import Mirror
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.snapshots import Snapshots
from trainer.checkpoint.store import Store
from trainer.config import Config
from trainer.distributed import DistContext
from trainer.engine.base import Engine
from trainer.model.flops import flops_per_image
from trainer.model.resnet import freeze
from trainer.multi_label import LabelScores
from trainer.optim.extension import extension_of
from trainer.optim.swa import averaged_before
from trainer.resilience.sanity_checks import NonFinite, find_nonfinite, limit_bad
from trainer.resilience.slow_ranks import SlowRank, SlowRanks
from trainer.resilience.watchdog import heartbeat
from trainer.scoring import best_by, evaluate
from trainer.tracking.meter import Meter, beats, named
from trainer.tracking.profiler import Trace
from trainer.tracking.tracker import Tracker

LONG_S = 5.0
"""Time of a validation above which it is worth a checkpoint of its own."""


@dataclass
class Session:
    """Parts of a run while it trains (see `setup.opening.open_session`). Every rank must call each method in the same way."""

    cfg: Config
    ctx: DistContext
    loader: Loader
    val_loader: Loader
    store: Store
    engine: Engine
    tracker: Tracker
    saver: Saver
    trace: Trace
    progress: Progress
    metadata: dict[str, str]
    """Metadata saved with the weights."""
    total_steps: int
    flops_per_s: float
    """FLOP/s of a large matrix product, on all ranks together."""
    scaled: bool
    """True where losses are scaled, so that a gradient may be infinite now and then."""
    snapshots: Snapshots | None = None
    """Snapshots in the memory of the run's nodes; None if it keeps none."""
    mirror: Mirror | None = None
    """Second place for its checkpoints; on rank 0 alone, and only if it has one."""
    meter: Meter = field(init=False)
    next_row: dict[str, float] = field(default_factory=dict)
    """Figures for the next row of metrics: the duration of the last checkpoint, or the cost of an interruption."""
    validation_s: float = math.inf
    """Time of this process's latest validation."""
    steps_back: Counter[int] = field(default_factory=Counter)
    """Steps back, by the number of steps in the checkpoint that they led to."""

    _failed_saves: int = 0
    """Saves that were given up, as far as the best was put back for them."""
    _thresholds: dict[str, str] = field(default_factory=dict)
    """Metadata that a validation has just found for the present weights, where images have several classes."""

    def __post_init__(self) -> None:
        self.classes = self.loader.catalog.classes
        self.images = len(self.loader.catalog)
        self._flops: dict[int, float] = {}  # of an image, by its size
        self.slow_ranks = SlowRanks(self.cfg.run.slow_pct, self.ctx.places)
        self._alerts: list[tuple[str, str, SlowRank]] = []  # of slow ranks, for after the next row
        run = self.cfg.run
        self.extension = extension_of(run.extend_lr, run.extend_from, self.loader.steps_per_epoch)
        self.resume(self.progress)

    def resume(self, progress: Progress) -> None:
        """Take over the position `progress`; the engine has been restored to it."""
        self.progress = progress
        self._reduced = progress.step  # the step up to which the meter has been read
        self.meter = Meter(
            self.ctx,
            progress.sums,
            len(self.classes),
            progress.train_s,
            scaled=self.scaled,
            multi_label=self.loader.catalog.multi_label,
        )

    @property
    def epoch_read(self) -> bool:
        return self.progress.cursor.seen >= self.images

    @property
    def validation_missed(self) -> bool:
        """True where a stop has left a validation within the epoch to the process that goes on."""
        progress = self.progress
        within = 0 < progress.cursor.seen < self.images
        return within and progress.validated_step < progress.step and self.cfg.run.validation_due(progress.step)

    @property
    def epoch(self) -> float:
        """Epochs trained so far, with the part of the current one."""
        return self.progress.cursor.epoch + self.progress.cursor.seen / self.images

    def begin_epoch(self) -> None:
        """Go to the position where the epoch begins or goes on, and freeze what stays unchanged in it."""
        heartbeat("data", self.progress.step, fresh=True)
        freeze(self.engine.module, self.cfg.model, self.progress.cursor.epoch)
        self.loader.seek(self.progress.cursor)

    def log(self, lr: float, stop: bool) -> bool:
        """Write a row of metrics. Returns True where any rank was asked to stop. Collective."""
        scalars, stopping = self.reduce(stop)
        scalars |= {**self._position_figures(), "train/lr": lr}
        self.tracker.log(scalars, self.progress.step, self.epoch)
        self._name_slow_ranks()
        return stopping

    def _name_slow_ranks(self) -> None:
        for title, text, facts in self._alerts:
            self.tracker.alert(title, text, facts._asdict())
        self._alerts = []

    def reduce(self, stop: bool) -> tuple[dict[str, float], bool]:
        """Compute metrics since the last call, and if any rank was asked to stop. Collective. Raises `NonFinite`."""
        heartbeat("all-reduce")
        # One reduction for metrics, the wish to stop and the bad images: each makes all ranks wait for the slowest.
        self.name_bad(self.loader)
        bad = self.loader.bad_images
        scalars, (stops, bad_images) = self.meter.reduce(stop or self.tracker.stop_requested, bad)
        heartbeat("report")
        since, self._reduced = self._reduced, self.progress.step
        if self.meter.nonfinite:
            # The meter has counted the steps that were made, and not those passed over.
            update, what = self.meter.nonfinite
            trained = [step for step in range(since + 1, self.progress.step + 1) if step not in self.progress.skipped]
            raise NonFinite(trained[update - 1], what)
        self.progress = replace(self.progress, sums=self.meter.epoch_sums, train_s=self.meter.train_s)
        limit_bad(self.loader, int(bad_images))
        scalars |= {"data/bad_images": bad_images + len(self.loader.catalog.bad)}
        # What came up between two rows goes into the next one: `next_row` holds what a restart and each save cost.
        scalars |= {**self.next_row, **self.saver.take_scalars(), **self._mfu(scalars)}
        self.next_row = {}
        # They are told by whoever writes the row, after it, so that a reader finds the figures that an alert names.
        self._alerts += self.slow_ranks.look(self.meter.rank_times)
        if self.ctx.world > 1:
            scalars |= {"perf/slow_ranks": len(self.slow_ranks.named)}
        return scalars, stops > 0

    def _position_figures(self) -> dict[str, float]:
        cursor, scale = self.progress.cursor, self.engine.loss_scale
        samples = {"train/samples": float(cursor.epoch * self.images + cursor.seen)}
        return samples | ({} if scale is None else {"train/loss_scale": scale})

    def _mfu(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B), by a measured peak."""
        if not (self.ctx.primary and "perf/images_per_s" in scalars):
            return {}
        data, epoch = self.cfg.data, self.progress.cursor.epoch
        size_px = data.augment.seen_px(data.size_at(epoch, self.cfg.run.epochs))
        if size_px not in self._flops:
            self._flops[size_px] = flops_per_image(self.cfg.model, len(self.classes), size_px)
        return {"perf/mfu_pct": 100 * scalars["perf/images_per_s"] * self._flops[size_px] / self.flops_per_s}

    def name_bad(self, loader: Loader) -> None:
        for path, why in loader.take_bad():
            line = f"rank {self.ctx.rank} cannot read {path}: {why}; the image does not count"
            if self.ctx.primary:
                self.tracker.note(line)
            else:
                print(printable(line), flush=True)  # a tracker elsewhere has no console

    def prove_coverage(self) -> None:
        """Check that the ranks together read every image of this epoch exactly once. Collective."""
        fault = first_fault(self.ctx.gather(torch.from_numpy(self.loader.coverage_sums())).numpy())
        if fault:
            raise UserError(f"data.path: {fault}")

    def save(self, best: bool = False) -> None:
        """Write a checkpoint while training goes on; it costs the training only the time of a copy. Collective.

        Raises `NonFinite`, and `UserError` where the ranks' weights have come apart; then nothing is written.
        """
        self._begin_save("ckpt", best, None)

    def keep_snapshot(self) -> None:
        """Write a snapshot into the memory of every node, unless a checkpoint is still being written. Collective.

        Raises as `save` does.
        """
        heartbeat("save")
        busy = self.ctx.sum(torch.tensor(float(self.saver.busy), device=self.ctx.device))
        if self.snapshots and not busy.item():
            self._begin_save("snapshot", False, self.snapshots)

    def _begin_save(self, what: str, best: bool, snapshots: Snapshots | None) -> None:
        start = time.perf_counter()
        heartbeat("save")
        # One at a time: the copy in the host's memory is that of the checkpoint before until it is on disk.
        self.wait_for_checkpoint()
        # Weights that are lost must not take the place of the last good ones.
        lost = find_nonfinite(self.engine.module, self.ctx)
        if lost:
            raise NonFinite(self.progress.step, f"weight {lost}")
        self.saver.start(
            self.progress,
            self.engine.capture_state({**self.metadata, **self._thresholds}),
            best=best,
            snapshots=snapshots,
        )
        self._thresholds = {}
        self.next_row[f"perf/{what}_save_s"] = time.perf_counter() - start
        self.meter.pause()

    def wait_for_checkpoint(self) -> None:
        """Wait for the current checkpoint. Where it failed, the best is again the one on disk. Collective."""
        self.saver.wait()
        # Once for each failure: by the next save a validation may have found a better one.
        if self.saver.failed > self._failed_saves:
            self._failed_saves, saved = self.saver.failed, self.saver.saved
            self.progress = replace(
                self.progress,
                best_top1_pct=saved.best_top1_pct,
                best_map_pct=saved.best_map_pct,
                best_score=saved.best_score,
            )

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Collective. Raises `UserError` where it is not."""
        heartbeat("save")
        failure = self.saver.wait()
        if failure:
            raise failure
        if self.snapshots:
            self.snapshots.remove()

    def average(self) -> None:
        """Bring the average of `optim.swa` up to date, from the end of an epoch's weights, or else where it is empty yet.

        Its time counts as evaluation. Collective.
        """
        cursor = self.progress.cursor
        count = averaged_before(cursor.epoch, self.cfg.optim, self.cfg.run.epochs, self.progress.averaged)
        if self.cfg.optim.swa == 0 or (count > 0 and not self.epoch_read):
            return
        heartbeat("average", fresh=True)
        self.loader.seek(Cursor(cursor.epoch))  # the next epoch seeks its own place
        self.engine.average(count, self._with_heartbeat(self.loader))
        self.progress = replace(self.progress, averaged=count + 1)
        self.meter.pause()

    def _with_heartbeat(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            heartbeat("average", fresh=False)

    def save_before_validation(self) -> None:
        """Save before a validation that may not come to its end; a run that is resumed here validates at once. Collective.

        The first of a process takes memory for images of its own, and reads files that nobody has read. A long one may outlast
        the patience of whoever asks the run to stop: a signal is looked at after it.
        """
        doubtful = self.ctx.broadcast_from_rank0(lambda: self.validation_s > LONG_S)
        step = self.progress.step
        # A run that has reached `run.max_steps` would not validate when it is resumed.
        if doubtful and step != self.cfg.run.max_steps and self.saver.saved.step != step:
            self.save()

    def validate(self) -> tuple[dict[str, float], bool]:
        """Score the validation images; returns the metrics, and True where they are the best so far. Collective."""
        heartbeat("save")
        self.wait_for_checkpoint()
        heartbeat("evaluate", fresh=True)
        start = time.perf_counter()
        # Each rank has statistics of its own; scored are those that are saved.
        self.engine.sync_buffers()
        scores = evaluate(self._predict, self.val_loader, self.ctx)
        self.validation_s = time.perf_counter() - start
        heartbeat("report")
        self.name_bad(self.val_loader)
        unread = len(self.val_loader.catalog) - scores.images
        if unread:
            self.tracker.note(f"{unread} of {unread + scores.images} validation images cannot be read and do not count")
            limit_bad(self.val_loader, unread)
        if not math.isfinite(scores.loss):
            self.tracker.alert("bad validation", f"val loss is {scores.loss}; these weights are not taken for the best")
        run, progress = self.cfg.run, self.progress
        by = best_by(run, self.val_loader.catalog)
        best = beats(scores, progress.to_beat, by)
        if best:
            progress = replace(progress, best_by=by, best_score=scores.by(by))
        # One that `run.max_steps` alone has brought about counts for no patience: an uninterrupted run has none there.
        due = run.validation_due(progress.step, progress.cursor.epoch + 1 if self.epoch_read else None)
        since_best = 0 if best else progress.since_best + due
        progress = replace(
            progress, since_best=since_best, validated_step=progress.step if due else progress.validated_step
        )
        self.progress = replace(progress, finished=progress.over(run.epochs, run.patience))
        self.meter.pause()
        if isinstance(scores, LabelScores):
            self._thresholds = {"thresholds": json.dumps(scores.thresholds.tolist())}
            if best:
                self.progress = replace(self.progress, best_map_pct=scores.map_pct)
            return {**named("val", scores.figures()), "val/best_map_pct": self.progress.best_map_pct or 0.0}, best
        if best:
            self.progress = replace(self.progress, best_top1_pct=scores.top1_pct)
        return {
            **named("val", scores.figures(len(self.classes))),
            "val/best_top1_pct": self.progress.best_top1_pct,
        }, best

    def _predict(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.engine.predict(images)
        heartbeat("evaluate", fresh=False)  # for each batch, as a long validation is no hang
        return logits

    def close_epoch(self, rest: dict[str, float]) -> None:
        """Evaluate where due, report with the `rest` of the metrics, move on to the next epoch and save. Collective."""
        epoch, run = self.progress.cursor.epoch + 1, self.cfg.run
        due = self.progress.step == run.max_steps or run.validation_due(self.progress.step, epoch)
        if due:
            self.save_before_validation()
        self.average()
        scalars, best = self.validate() if due else ({}, False)
        perf = {name: value for name, value in rest.items() if not name.startswith("train/")}  # of the last steps
        self.tracker.epoch({**perf, **self.meter.end_epoch(), **scalars}, self.progress.step, epoch, best)
        self._name_slow_ranks()
        self.tracker.weights(self.engine.module.named_parameters(), self.progress.step, epoch)
        # Only now does the position move on: a run that is killed in its validation validates again.
        progress = replace(self.progress, cursor=Cursor(epoch), sums=self.meter.epoch_sums)
        self.progress = replace(progress, finished=progress.over(run.epochs, run.patience))
        self.save(best)
