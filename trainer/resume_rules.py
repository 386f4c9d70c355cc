"""Options that a resumed run may change, and what a user may want who changes another."""

import json
import os
import shlex
from dataclasses import asdict, fields, is_dataclass
from itertools import count
from pathlib import Path
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
    # An option that is newer than the folder was at its default.
    old = {**flat(asdict(Config())), **flat(tree_of(saved, str(cfg.folder / "config.yaml")))}
    new = flat(asdict(cfg))
    changed = {key: value for key, value in new.items() if _differs(key, old[key], value, cfg)}
    first = next(iter(changed), None)
    return Difference(f"{first} was {old[first]}, now {new[first]}", _ways_on(changed, old, cfg)) if first else None


def _differs(key: str, old: Any, new: Any, cfg: Config) -> bool:
    if old == new or may_change(key):
        return False
    match key:
        case "run.epochs":
            return cfg.run.extend_to is None or old > new
        case "run.best_by":  # not given, it is one of these, as the images have one class each or several
            return not {old, new} <= {None, "top1", "map"}
        case "optim.teacher":  # it may have moved: the digest of its weights tells that it is the same
            return None in (old, new)
    return True


FITTING = ("model.freeze_until", "model.head_only", "model.freeze_bn")
"""Options of the network that leave its weights as they are."""
MOST = 6
"""Changed options that a command repeats; more are another recipe."""


def _ways_on(changed: dict[str, Any], old: dict[str, Any], cfg: Config) -> str:
    """Name the commands for what a user may want who changes these options of a run."""
    here = {} if _recorded_folder(old) == cfg.folder else {"run.dir": str(cfg.folder)}  # it was moved
    ways = [f"to resume it: {_command(cfg, here)}"]
    epochs, before = changed.get("run.epochs", 0), old["run.epochs"]
    if epochs:
        length = {"run.extend_to": None, "run.extend_from": None, "run.extend_lr": "schedule"}
        changed = {**{key: value for key, value in length.items() if old.get("run.extend_to")}, **changed}
    if list(changed)[-1:] == ["run.epochs"] and epochs > before:
        ways.append(f"to train it on: {_command(cfg, {'run.extend_to': epochs, **here})}")
    if len(changed) > MOST:
        return "; ".join([*ways, "to train anew give another --run.name"])
    trained = (cfg.folder / "checkpoints" / "last").exists()
    if trained and all(key in FITTING or key.startswith(("data.", "optim.")) for key in changed):
        from_weights = _copy(cfg, old, {**changed, "model.weights": str(cfg.folder)})
        ways.append(f"to go on from its weights as a run of its own: {from_weights}")
    return "; ".join([*ways, f"to train anew: {_copy(cfg, old, changed)}"])


def _copy(cfg: Config, old: dict[str, Any], changed: dict[str, Any]) -> str:
    """Word the command of a new run with the options of the old one, but for those changed."""
    names = (cfg.folder.with_name(f"{cfg.folder.name}-{number}") for number in count(2))
    free = next(name for name in names if not name.exists())
    by_name = not old["run.dir"] and _recorded_folder(old) == cfg.folder
    return _command(cfg, {**changed, **({"run.name": free.name} if by_name else {"run.dir": str(free)})})


def _recorded_folder(old: dict[str, Any]) -> Path:
    return Path(old["run.dir"] or f"runs/{old['run.name']}")


def _command(cfg: Config, options: dict[str, Any]) -> str:
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    words = [part for key, value in written.items() for part in (f"--{key}", value)]
    return shlex.join(["python", "-m", "trainer", "--config", str(cfg.folder / "config.yaml"), *words])
