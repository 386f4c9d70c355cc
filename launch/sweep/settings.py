"""The file of a sweep: its runs and their names.

config: imagenette              # a recipe or a file; `builtin` if not given
options:                        # the same in all runs
  data.path: /data/imagenette
grid:                           # a run for each combination
  optim.lr: [0.5, 1.0]
  run.seed: [0, 1, 2]

`list:` takes the place of `grid:` where the runs are no grid: tables of options, one for each run.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.errors import UserError, require
from data_pipeline.common.safe_yaml import load_yaml, read_text
from trainer.config import Config, as_meant, load

Setting = dict[str, Any]
"""Dotted option -> value."""

LONGEST = 100  # characters of a run's name: a folder's name may have 255 bytes


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    setting: Setting
    """Options in which this run differs from others."""
    arguments: list[str]
    """Command line for the trainer."""
    cfg: Config


@dataclass(frozen=True)
class Sweep:
    """Sweep as its file asks for it."""

    file: Path
    config: str
    options: Setting
    settings: list[Setting]
    """Setting of each run, in the file's order; the last option of a grid changes first."""
    grid: dict[str, list[Any]]
    """Values of each option of a grid; empty for a list."""

    @property
    def fixed(self) -> Setting:
        """Options that all runs have in common."""
        return {"config": self.config, **self.options}

    def members(self, folder: Path) -> list[Member]:
        """List the runs, each in its own folder in `folder`. Raises `UserError` with the name of the first that is wrong."""
        return [self._member(name, setting, folder) for name, setting in zip(self.names, self.settings, strict=True)]

    def _member(self, name: str, setting: Setting, folder: Path) -> Member:
        own = {"run.name": f"{folder.name} {name}", "run.dir": str(folder / name)}
        options = {**self.options, **setting, **own}
        arguments = ["--config", self.config, *(f"--{key}={argument(value)}" for key, value in options.items())]
        try:
            return Member(name, setting, arguments, load(arguments))
        except UserError as error:
            raise UserError(f"{self.file}, run {name}: {error}") from None

    @property
    def names(self) -> list[str]:
        """Name of each run, such as lr=0.1,seed=0. A name stays when runs are added; a run's number in the file does not."""
        keys = list(dict.fromkeys(key for setting in self.settings for key in setting))
        last = [key.rpartition(".")[2] for key in keys]
        short = {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
        plain = [label({short[key]: value for key, value in setting.items()}) for setting in self.settings]
        names = [re.sub(r"[^\w.=,+-]+", "-", name, flags=re.ASCII) for name in plain]
        clear = {
            name for name in names if len(name) <= LONGEST and [one.lower() for one in names].count(name.lower()) == 1
        }
        return [
            name if name in clear else f"{name[:LONGEST]}-{_digest(setting)}"
            for name, setting in zip(names, self.settings, strict=True)
        ]


def label(setting: Setting) -> str:
    """Word a setting, such as lr=0.1,seed=0."""
    return ",".join(f"{key}={shown(value)}" for key, value in setting.items()) or "as it is"


def shown(value: Any) -> str:
    """Write a value for people, such as 64-96-128 for a list."""
    return "-".join(map(shown, value)) if isinstance(value, list) else argument(value)


def argument(value: Any) -> str:
    """Write a value for a command line: text unchanged, anything else as JSON, which is also YAML."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _digest(setting: Setting) -> str:
    return hashlib.sha256(json.dumps(setting, sort_keys=True, default=str).encode()).hexdigest()[:6]


def read_sweep(file: Path) -> Sweep:
    """Read a sweep's file; of the options only the form of their names is checked. Raises `UserError`."""
    try:
        tree = load_yaml(as_meant(read_text(file), around=("options", "grid", "list")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"FILE: {file} cannot be read as YAML: {error}") from None
    require(isinstance(tree, dict), f"{file}: it is no table; give config, options, and grid or list")
    for key in tree:
        require(
            key in ("config", "options", "grid", "list"),
            f"{file}: {key!r} has no meaning here; give config, options, and grid or list",
        )
    require(("grid" in tree) != ("list" in tree), f"{file}: give either grid or list, which say what the runs are")
    config, options = tree.get("config", "builtin"), tree.get("options") or {}
    require(isinstance(config, str), f"{file}: config: {config!r} is no recipe's name")
    _check_options(options, f"{file}: options")
    settings = _grid(tree["grid"], file) if "grid" in tree else _list(tree["list"], file)
    for number, setting in enumerate(settings):
        require(setting not in settings[:number], f"{file}: {label(setting)} is there twice; leave one out")
    return Sweep(file, config, options, settings, tree.get("grid", {}))


def _grid(table: Any, file: Path) -> list[Setting]:
    """Expand a grid into all its combinations."""
    _check_options(table, f"{file}: grid")
    require(bool(table), f"{file}: grid: it is empty; give options and lists of values")
    for key, values in table.items():
        require(
            isinstance(values, list) and bool(values), f"{file}: grid: {key}: {values!r} is no list of values; give one"
        )
    return [dict(zip(table, values, strict=True)) for values in product(*table.values())]


def _list(tables: Any, file: Path) -> list[Setting]:
    require(isinstance(tables, list) and bool(tables), f"{file}: list: it is no list of tables of options; give one")
    for number, table in enumerate(tables, start=1):
        _check_options(table, f"{file}: list: entry {number}")
    return list(tables)


def _check_options(table: Any, place: str) -> None:
    require(isinstance(table, dict), f"{place}: {table!r} is no table of options; write them as in optim.lr: 0.1")
    for key in table:
        require(
            isinstance(key, str) and re.fullmatch(r"\w+(\.\w+)+", key) is not None,
            f"{place}: {key!r} is no option's name; write it with its section, as in optim.lr",
        )
        require(key not in ("run.name", "run.dir"), f"{place}: {key} is chosen by the sweep; leave it out")
