"""Options that a resumed run may change, and what a user may want who changes another."""

import os
import shlex
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NamedTuple

from trainer.checkpoint.run_folder import read_wandb_id
from trainer.config import Config, flat, tree_of
from trainer.resilience.wandb_agent import trial_of


class Difference(NamedTuple):
    """Difference between a configuration and that of the existing run."""

    what: str
    """The option and both of its values."""
    remedy: str


def may_change(option: str) -> bool:
    """Return True where a resumed run may change an option, such as run.keep, as its field says."""
    section: Any = Config
    for name in option.split("."):
        found = next((one for one in fields(section) if one.name == name), None)
        if found is None or found.metadata.get("resume") == "free":
            return found is not None
        if not is_dataclass(found.default_factory):
            return False
        section = found.default_factory
    return False


def first_difference(saved: str, cfg: Config) -> Difference | None:
    """Find the first option by which a saved configuration is another run than `cfg`."""
    trial, known = trial_of(os.environ), read_wandb_id(cfg.folder)
    if trial and known and known != trial.id:
        return Difference(
            f"its W&B run was {known}, now {trial.id}", "leave out --run.dir, which trials of a sweep share"
        )
    old, new = flat(tree_of(saved, str(cfg.folder / "config.yaml"))), flat(asdict(cfg))
    for options in (old, new):
        options["run.best_by"] = options.get("run.best_by") or "top1"  # which it always was, before it could be not given
    for key, value in new.items():
        extended = key == "run.epochs" and cfg.run.extend_to is not None and old.get(key, 0) < value
        if key in old and old[key] != value and not may_change(key) and not extended:
            return Difference(f"{key} was {old[key]}, now {value}", _way_on(key, old[key], value, cfg))
    return None


def _way_on(key: str, old: Any, new: Any, cfg: Config) -> str:
    """Suggest what a user may want who changes an option of a run, and how to get it."""
    if key == "run.epochs" and new > old:
        return f"to train it on give --run.extend_to {new}, to train anew another --run.name"
    if key.startswith(("data.", "optim.")):
        weights = f"--model.weights {shlex.quote(str(cfg.folder))}"
        return f"repeat them to resume; to go on from its weights as a run of its own: {weights} --run.name NEW"
    return "repeat them to resume, or give another --run.dir"
