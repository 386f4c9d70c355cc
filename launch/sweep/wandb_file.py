"""A sweep's file as W&B reads it: `wandb sweep` gives it to the server, whose agents train one run after another.

The method is a grid of the file's own values. Other methods, Hyperband and ranges in place of values are for its reader to add.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.errors import UserError
from launch.sweep.settings import Member, Setting, Sweep, argument
from trainer.config import Config

METRICS = {"top1": "val/best_top1_pct", "map": "val/best_map_pct", "loss": "val/loss"}
"""Metric of the scores that choose the best weights, where it is not val/SCORE_pct."""


def metric_of(cfg: Config) -> dict[str, str]:
    """Name the metric that chooses the best weights of a run, as far as its options tell: its images are not looked at."""
    by = cfg.run.best_by or ("map" if cfg.data.labels == "multi" else "top1")
    return {"name": METRICS.get(by, f"val/{by}_pct"), "goal": "minimize" if by == "loss" else "maximize"}


def write_wandb_file(sweep: Sweep, members: list[Member], ranks: int | None) -> Path:
    """Write the sweep for `wandb sweep` beside its own file, each run by so many processes. Raises `UserError`."""
    file = sweep.file.with_suffix(".wandb.yaml")
    text = f"# Made from {json.dumps(sweep.file.name)}.\n" + yaml.safe_dump(
        wandb_sweep(sweep, members, ranks), sort_keys=False, allow_unicode=True, width=10_000
    )
    try:
        if file.exists() and file.read_text() != text:
            raise UserError(f"--wandb: {file} is there already, with another content; move it away")
        file.write_text(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--wandb: cannot write {file}: {error}") from None
    return file


def wandb_sweep(sweep: Sweep, members: list[Member], ranks: int | None) -> dict[str, Any]:
    """Content of the file: the same runs, of which each gets the sweep's name and the id that W&B gives it."""
    cfg = members[0].cfg
    launch = ["${env}", "python", "-m", "launch", "local", *(["-n", str(ranks)] if ranks else [])]
    name = f"--run.name={sweep.file.stem}"
    if sweep.grid:
        parameters = {option: {"values": [_plain(value) for value in values]} for option, values in sweep.grid.items()}
        shared = [f"--{option}={argument(value)}" for option, value in sweep.options.items()]
        command = [*launch, "--config", sweep.config, *shared, name, "${args}"]
    else:
        # W&B has no list of tables: a run's options are one value.
        parameters = {"config": {"values": [_table(setting) for setting in sweep.settings]}}
        command = [*launch, "--config", sweep.config, "--config", _table(sweep.options), "${args}", name]
    place = {"project": cfg.tracking.project, "entity": cfg.tracking.entity}
    return {
        "name": sweep.file.stem,
        **{key: value for key, value in place.items() if value},
        "program": "launch",
        "method": "grid",
        "metric": metric_of(cfg),
        "parameters": parameters,
        "command": command,
    }


def _plain(value: Any) -> int | float | str:
    """A value that an agent writes on a command line as it is meant: not as Python's True or None."""
    return value if type(value) in (int, float) else argument(value)


def _table(setting: Setting) -> str:
    """Write options as one value for --config."""
    return json.dumps(setting, default=str)
