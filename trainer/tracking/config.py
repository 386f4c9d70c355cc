"""Options of a run's destinations of metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_pipeline.common.errors import UserError


@dataclass(frozen=True)
class TrackingConfig:
    """Destinations of a run's metrics besides the console and `metrics.jsonl`."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases. `auto` obeys WANDB_MODE and WANDB_DISABLED where they are set; otherwise it is online where an API
    key is configured, and offline, to be uploaded later, where none is."""
    project: str = "sluice"
    """W&B project."""
    entity: str | None = None
    """W&B team or user that owns the project; null means the account's default."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder's `tensorboard`."""
    histograms_every: int = 1
    """Epochs between two histograms of each layer's weights, with their norms, in TensorBoard and W&B; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise UserError(
                f"tracking.project: {self.project!r} is no W&B project name; give 1 to 128 characters, none of /\\#?%:"
            )
        if self.histograms_every < 0:
            raise UserError(
                f"tracking.histograms_every: {self.histograms_every} is negative; give a number of epochs, or 0 for none"
            )


def wandb_mode(environment: Mapping[str, str]) -> str:
    """Read the mode of W&B from the environment, with the words of older versions: online, offline, off or auto.

    Raises `UserError` for an unknown WANDB_MODE.
    """
    if environment.get("WANDB_DISABLED", "").lower() not in ("", "0", "false", "no", "off"):
        return "off"
    word = environment.get("WANDB_MODE", "").strip().lower()
    modes = {"": "auto", "run": "online", "dryrun": "offline", "disabled": "off", "dry-run": "offline"}
    mode = modes.get(word, word)
    if mode not in ("auto", "online", "offline", "off"):
        raise UserError(f"WANDB_MODE: {word!r} is unknown; set online, offline or disabled, or unset it")
    return mode
