"""Learning rate of a run that is trained on, to more epochs than it was started for."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from trainer.optim.config import OptimConfig
from trainer.optim.optimizer import lr_at


class Extension(NamedTuple):
    """Learning rate that follows the schedule of a run's first steps."""

    begins: int
    """Steps of that schedule."""
    lr: float | str
    """A learning rate that stays, or "cosine" (see `run.extend_lr`)."""

    def words(self, peak: float) -> str:
        """Say which learning rate follows; `peak` is `optim.lr`."""
        falls = f"is {peak:.3g} after a warm-up, and falls on a cosine"
        what = falls if isinstance(self.lr, str) else f"stays {self.lr:.3g}"
        return f"from step {self.begins + 1} on the learning rate {what}"


def extension_of(lr: float | str, from_epochs: int | None, steps_per_epoch: Callable[[int], int]) -> Extension | None:
    """Return what follows the schedule of the first `from_epochs` epochs; None where one schedule spans all epochs."""
    if from_epochs is None or lr == "schedule":
        return None
    return Extension(sum(map(steps_per_epoch, range(from_epochs))), lr)


def extended_lr_at(step: int, cfg: OptimConfig, total_steps: int, extension: Extension | None) -> float:
    """Compute the learning rate of step `step` of `total_steps`, counted from 0, of a run that may have been extended."""
    if extension is None:
        return lr_at(step, cfg, total_steps)
    if step < extension.begins:
        return lr_at(step, cfg, extension.begins)
    if isinstance(extension.lr, str):
        return lr_at(step - extension.begins, replace(cfg, schedule="cosine"), total_steps - extension.begins)
    return extension.lr
