"""Options of a run itself: its folder, its length, its checkpoints, its guards."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.common.address import place
from data_pipeline.common.errors import require
from data_pipeline.config import free
from trainer.checkpoint.progress import BestBy


@dataclass(frozen=True)
class RunConfig:
    """Name and length of a run, and how often it reports and saves."""

    name: str | None = free(None)
    """Name of the run, in runs/NAME and on dashboards; if not given, the name of the folder that data.path gives."""
    dir: str | None = free(None)
    """Run folder; runs/NAME if not given. The same command resumes the run in it."""
    epochs: int = 8
    """Passes over the training images. The learning rate's schedule spans all of them."""
    extend_to: int | None = free(None)
    """Train an existing run on, to so many epochs in all; `extend_lr` says with which learning rate."""
    extend_lr: float | Literal["schedule", "cosine"] = free("schedule")
    """Learning rate of a run that `extend_to` trains on. schedule: from its present step on that of a run of so many epochs,
    to which it rises, to fall to its end anew. cosine: a warm-up and a cosine over the added epochs. A number: that, in all
    of them."""
    extend_from: int | None = free(None)
    """Epochs before those that `extend_to` adds; `epochs`, if not given. A run that is trained on again has those that it had
    until then."""
    patience: int | None = free(None)
    """End the run when so many validations in a row were no better than the best before by `best_by`."""
    validate_every: str = free("1")
    """Epochs between two validations, such as 4, or optimizer steps, such as 500 steps. The last epoch is always validated."""
    max_steps: int | None = free(None)
    """End after this many optimizer steps, evaluate and save: for a dry run, or to go on later."""
    seed: int = 0
    """Seed of the weights, the order and the augmentation."""
    log_every: int = free(10)
    """Optimizer steps between two rows of metrics; as often the ranks check for a request to stop."""
    save_every: int = free(200)
    """Optimizer steps between two checkpoints within an epoch; one is always written at its end."""
    snapshot_every: int | None = free(None)
    """Optimizer steps between two snapshots in the memory of every node, for restarts without the queue that lose seconds; none
    if not given."""
    snapshot_dir: str = free("/dev/shm")  # nosec B108 # a folder of one's own in it
    """Folder for snapshots, in memory or on a disk of each node's own."""
    keep: int = free(2)
    """Number of last checkpoints to keep, beside the best; with two, a damaged one is passed over for the one before."""
    best_by: BestBy | None = None
    """Validation score that chooses the weights kept as the best: top1, which it is if not given; macro_recall, the mean over
    the classes of the share of their images that is recognised, for classes of uneven numbers; or loss. Where images have
    several classes map, which it is then if not given; macro_f1; or loss."""
    keep_every: int | None = free(None)
    """Keep also the checkpoint at the end of every so many epochs."""
    mirror: str | None = free(None)
    """Second place for checkpoints and metrics, to which they are copied while the run trains: a folder on another disk, or
    an address such as s3://bucket/runs. Each run has a folder of its name there, and is restored from it if its own is gone."""
    profile: str | None = free(None)
    """Optimizer steps to trace, such as 10-12, counted from 1: each rank writes a file for Perfetto or TensorBoard to
    profile/ in the run folder."""
    on_nonfinite: Literal["stop", "back"] = free("stop")
    """Reaction to a loss, gradient or weight that is infinite or NaN: stop ends the run; back goes on from the last checkpoint
    and passes over the images of that optimizer step, at most three times until it has got further."""
    stall_s: float = free(600.0)
    """Seconds without any progress after which the run names the rank that it waits for, writes stacks/ in the run folder and
    ends with exit code 75; three times as many for an epoch's first optimizer step, which may compile. 0 waits for ever."""
    slow_pct: float = free(20.0)
    """Percent that a rank's own work on an image, without waiting for others, may take longer than the median of all ranks; a
    rank beyond it in five logging intervals in a row is named with its node and GPU. 0 for never."""

    def __post_init__(self) -> None:
        require(
            self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name),
            f"run.name: {self.name!r} is no folder name; give a word such as first",
        )
        require(self.dir != "", "run.dir: it is empty; give a folder, or leave it out for runs/NAME")
        require(self.epochs > 0, f"run.epochs: {self.epochs} is not positive; give the number of passes")
        require(
            self.extend_to is None or self.extend_to >= self.epochs,
            f"run.extend_to: {self.extend_to} is less than run.epochs {self.epochs}; give the number of epochs in all",
        )
        require(
            self.extend_to is not None or (self.extend_lr == "schedule" and self.extend_from is None),
            "run.extend_lr: it is for a run that is trained on; give run.extend_to too, the number of epochs in all",
        )
        rate = self.extend_lr
        require(
            isinstance(rate, str) or 0 < rate < math.inf,
            f"run.extend_lr: {rate} is not positive; give a learning rate above 0, schedule or cosine",
        )
        if self.extend_to is not None:
            object.__setattr__(self, "extend_from", self.extend_from or self.epochs)
            object.__setattr__(self, "epochs", self.extend_to)
        require(
            self.extend_from is None or 0 < self.extend_from <= self.epochs,
            f"run.extend_from: {self.extend_from} is none of {self.epochs} epochs; give the number before the added ones",
        )
        require(
            self.patience is None or self.patience > 0,
            f"run.patience: {self.patience} is not positive; give a number of validations, or leave it out",
        )
        object.__setattr__(self, "validate_every", str(self.validate_every))
        validation_interval(self.validate_every)
        require(
            self.max_steps is None or self.max_steps > 0,
            f"run.max_steps: {self.max_steps} is not positive; leave it out to train all epochs",
        )
        require(self.log_every > 0, f"run.log_every: {self.log_every} is not positive; give a number of steps")
        require(self.save_every > 0, f"run.save_every: {self.save_every} is not positive; give a number of steps")
        require(
            self.snapshot_every is None or self.snapshot_every > 0,
            f"run.snapshot_every: {self.snapshot_every} is not positive; give a number of steps, or leave it out",
        )
        require(self.keep > 0, f"run.keep: {self.keep} is not positive; give a number of checkpoints")
        require(
            self.best_by in (None, *get_args(BestBy)),
            f"run.best_by: {self.best_by!r} is unknown; choose one of {', '.join(get_args(BestBy))}",
        )
        require(
            self.keep_every is None or self.keep_every > 0,
            f"run.keep_every: {self.keep_every} is not positive; give a number of epochs, or leave it out",
        )
        if self.mirror is not None:
            require(self.mirror != "", "run.mirror: it is empty; give a folder or an address, or leave it out")
            place(self.mirror, "run.mirror")
        if self.profile is not None:
            chosen_steps(self.profile)
        require(
            0 <= self.stall_s < math.inf,
            f"run.stall_s: {self.stall_s} is no time; give seconds such as 600, or 0 for off",
        )
        require(
            0 <= self.slow_pct < math.inf,
            f"run.slow_pct: {self.slow_pct} is no percentage; give one such as 20, or 0 for off",
        )
        require(0 <= self.seed < 2**63, f"run.seed: {self.seed} is out of range; give a number from 0 to 2^63")

    def validation_due(self, step: int, epochs: int | None = None) -> bool:
        """Return True where validation is due after `step` optimizer steps, and at the end of an epoch after so many `epochs`."""
        every, unit = validation_interval(self.validate_every)
        if unit == "steps":
            return step % every == 0 or epochs == self.epochs
        return epochs is not None and (epochs % every == 0 or epochs == self.epochs)

    @property
    def profiled(self) -> range:
        """Optimizer steps, counted from 1, that `profile` names."""
        return chosen_steps(self.profile) if self.profile else range(0)


def chosen_steps(text: str) -> range:
    """Parse optimizer steps, counted from 1, such as "10-12" or "10". Raises `UserError`."""
    parts = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
    require(0 < first <= last, f"run.profile: {text!r} names no steps; give the first and the last, such as 10-12")
    return range(first, last + 1)


def validation_interval(text: str) -> tuple[int, str]:
    """Parse a number of epochs, such as "4", or of steps, such as "500 steps". Raises `UserError`."""
    parts = re.fullmatch(r"(\d+)(?: (epoch|step)s?)?", text)
    every, unit = (int(parts[1]), f"{parts[2] or 'epoch'}s") if parts else (0, "")
    require(
        every > 0, f"run.validate_every: {text!r} is no interval; give epochs such as 4, or steps such as '500 steps'"
    )
    return every, unit
