"""Configuration of a run: one dataclass for each part, files and dotted options on top, one line for a mistake."""

import difflib
import io
import os
import re
import shlex
from collections.abc import Container, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_dumper,
    set_parsing_settings,
)

from data_pipeline.common.cli import remedy
from data_pipeline.common.errors import UserError, require
from data_pipeline.common.launcher import launched_rank
from data_pipeline.common.option_files import check_base, option_kinds, quoted, read_as_meant
from data_pipeline.common.safe_yaml import load_yaml, read_text
from data_pipeline.config import FREE, DataConfig
from trainer.engine.config import EngineConfig, check_deepspeed
from trainer.model.config import ModelConfig
from trainer.optim.config import OptimConfig
from trainer.resilience.wandb_agent import trial_of
from trainer.run_config import RunConfig, validation_interval
from trainer.tracking.config import TrackingConfig

RECIPES = Path(__file__).parent / "recipes"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class Config:
    """Configuration of a training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig, metadata=FREE)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=FREE)

    def __post_init__(self) -> None:
        if self.run.name is None:
            object.__setattr__(self, "run", replace(self.run, name=_name_of(self.data.path)))
        check_deepspeed(self.engine, self.optim)
        require(
            self.data.balance == "none" or self.optim.class_weights != "balanced",
            f"optim.class_weights: balanced does again what data.balance {self.data.balance} does; leave one of them out",
        )
        require(
            not self.optim.swa or validation_interval(self.run.validate_every)[1] == "epochs",
            f"run.validate_every: {self.run.validate_every} is within epochs, and optim.swa averages the weights at their ends; "
            "give a number of epochs",
        )
        for option in ("freeze_until", "head_only", "freeze_bn"):
            value = getattr(self.model, option)
            require(
                not value or self.engine.name == "ddp",
                f"model.{option}: {value} is for DDP only; leave it out, or set engine.name to ddp",
            )
        require(
            self.model.freeze_until < self.run.epochs,
            f"model.freeze_until: {self.model.freeze_until} leaves none of {self.run.epochs} epochs to the rest of the "
            "network; lower it, or set model.head_only",
        )

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.run.name)

    @property
    def folder(self) -> Path:
        return Path(self.run.dir or f"runs/{self.name}")


def _name_of(data: str) -> str:
    """Name of a dataset: of its folder, or of the one that a table lies in."""
    path = Path(data)
    folder = path.parent if path.is_file() else path
    return folder.name.strip(".") or folder.absolute().resolve().name or "run"


def load(arguments: list[str]) -> Config:
    """Load the configuration of a command line; without --config, the recipe `builtin`. Raises `UserError`.

    Pretrained weights bring defaults of their own for `data`, WANDB_PROJECT and WANDB_ENTITY for `tracking`; any file or
    option overrides them. A run of a W&B sweep has its agent's project and entity, and WANDB_RUN_ID behind its name.
    """
    trial = trial_of(os.environ)
    arguments = _with_recipe(_of_agent(arguments) if trial else arguments)
    asked = [argument for argument in arguments if not argument.startswith("--print_config")]
    defaults = _of_environment(os.environ)
    cfg = _parse(asked, defaults)
    if trial:
        of_trial = {
            # All runs of a sweep have the same command but for the options swept over.
            "run.name": None if cfg.run.dir or cfg.name.endswith(trial.id) else f"{cfg.name}-{trial.id}",
            "tracking.project": trial.project,
            "tracking.entity": trial.entity,
        }
        added = [f"--{option}={value}" for option, value in of_trial.items() if value]
        arguments, asked = arguments + added, asked + added
        cfg = _parse(asked, defaults)
    _refuse_moved(asked, cfg)
    if cfg.model.weights is None and asked == arguments:
        return cfg
    return _parse(arguments, defaults | (_preprocessing(cfg.model.weights) if cfg.model.weights else {}))


def _refuse_moved(arguments: list[str], cfg: Config) -> None:
    """Check that the config.yaml of a trained run leads to that run: its folder may be moved or a copy. Raises `UserError`."""
    if any(argument.split("=")[0] in ("--run.name", "--run.dir") for argument in arguments):
        return
    for file in (Path(value) for option, value in pairwise(arguments) if option == "--config"):
        run = file.parent
        if file.name != "config.yaml" or not os.path.lexists(run / "checkpoints/last"):
            continue
        saved = flat(tree_of(_text_of(file), str(file)))
        require(
            run.resolve() == cfg.folder.resolve()
            or (saved.get("run.name"), saved.get("run.dir")) != (cfg.run.name, cfg.run.dir),
            f"--config: {file} is of a run that was moved or copied from {cfg.folder}, and would train there; "
            f"give --run.dir {shlex.quote(str(run))} to go on with it, or another --run.name to train anew",
        )


def _of_agent(arguments: list[str]) -> list[str]:
    """Arguments as an agent of a W&B sweep means them: it writes Python's None for null."""
    kinds = option_kinds(Config)
    empty = {f"--{option}=None" for option, kind in kinds.items() if NoneType in get_args(kind)}
    return [argument.removesuffix("None") + "null" if argument in empty else argument for argument in arguments]


def _of_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Defaults that environment variables give."""
    given = {"tracking.project": "WANDB_PROJECT", "tracking.entity": "WANDB_ENTITY"}
    return {option: environment[name] for option, name in given.items() if environment.get(name)}


def _preprocessing(weights: str) -> dict[str, Any]:
    from trainer.model.pretrained import (
        preprocessing,
    )  # imported here: torch takes seconds, and few runs start from weights

    return {f"data.{name}": value for name, value in preprocessing(weights).items()}


def run_folder(arguments: list[str], command: str) -> tuple[Path, list[str]]:
    """Split the run folder at the front of a command line from the options behind it. Raises `UserError`."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"RUN: no run folder given; call {command} RUN [--data.path FOLDER], as with runs/builtin")
    return Path(arguments[0]), arguments[1:]


def load_run(folder: Path, overrides: list[str]) -> Config:
    """Load the configuration that a run folder records, with dotted options on top. Raises `UserError`."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml; give one such as runs/builtin")
    _refuse_unknown(saved)
    if any(argument.split("=")[0] == "--config" for argument in overrides):
        raise UserError(f"--config: {folder} has a configuration of its own; leave it out, or give single options")
    return _parse(["--config", str(saved), *overrides])


def to_yaml(cfg: Config) -> str:
    """Write every option with its value, as `load_run` reads it back."""
    return _dump(asdict(cfg))


def _with_recipe(arguments: list[str]) -> list[str]:
    """Replace `--config NAME` by the recipe's file; NAME may be a shipped one, and without any it is `builtin`.

    A table such as {optim.lr: 0.1} takes a file's place, for agents of a W&B sweep, which give each run one value.
    """
    arguments = [part for argument in arguments for part in _split_config(argument)]
    files = [at + 1 for at, argument in enumerate(arguments) if argument == "--config" and at + 1 < len(arguments)]
    before = arguments[: files[-1] - 1] if files else []
    if any(argument.startswith("--") and argument not in ("--config", "--print_config") for argument in before):
        raise UserError("--config: it comes after other options and would undo them; put it first")
    for at in files:
        arguments[at] = _config_file(arguments[at])
    return arguments if "--config" in arguments else ["--config", str(RECIPES / "builtin.yaml"), *arguments]


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def recipes() -> list[str]:
    """Names of the shipped recipes, as --config takes them."""
    return sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml"))


def _config_file(name: str) -> str:
    """Find the file or shipped recipe of that name, or take a table as it is; check that every option in it exists."""
    if name.startswith("{"):
        _check_options(name, "--config")
        return name
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(recipes())
        raise UserError(f"--config: {name} is neither a file nor a recipe; the recipes are {shipped}")
    _refuse_unknown(path)
    return str(path)


def _refuse_unknown(file: Path) -> None:
    """Check that every option in a file exists. Raises `UserError`."""
    _check_options(_text_of(file), str(file))


def _text_of(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {file} cannot be read: {error}") from None


def _check_options(text: str, file: str) -> None:
    kinds = option_kinds(Config)
    for key, value in flat(tree_of(text, file)).items():
        if key not in flat(asdict(Config())):
            raise UserError(f"{file}: {_no_such_option(key)}")
        if key in kinds:
            check_base(f"{file}: {key}", kinds[key], value)
        if value is None and key in kinds and NoneType not in get_args(kinds[key]):
            raise UserError(f"{file}: {key}: nothing is given; give a value, or leave the option out")


def _check_bases(arguments: list[str]) -> None:
    """Check the numbers of a command line as those of a file (see `check_base`). Raises `UserError`."""
    kinds = option_kinds(Config)
    for words in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = "=".join(words).removeprefix("--").partition("=")
        if option in kinds:
            check_base(option, kinds[option], value.partition("=")[0])


def tree_of(text: str, file: str) -> dict[str, Any]:
    """Parse YAML `text`, a table of options. Raises `UserError`."""
    try:
        tree = load_yaml(as_meant(text))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: it is no YAML: {_one_line(str(error))}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: it holds no options; write them as in {RECIPES / 'builtin.yaml'}")
    return tree


def _parse(arguments: list[str], defaults: Mapping[str, Any] | None = None) -> Config:
    """Parse a command line; `defaults` are those of single options."""
    parser = ArgumentParser(
        prog="python -m trainer",
        description="Train a ResNet. A recipe or file comes first, dotted options override it.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="A YAML file, the name of a shipped recipe, or a table such as {optim.lr: 0.1}.",
    )
    parser.add_class_arguments(Config)
    parser.set_defaults(dict(defaults or {}))
    _check_bases(arguments)
    quiet = launched_rank() > 0 and any(a in ("-h", "--help", "--print_config") for a in arguments)
    try:
        with redirect_stdout(io.StringIO()) if quiet else nullcontext():
            options = parser.parse_args(arguments)
            given = any(argument.split("=")[0] == "--run.extend_from" for argument in arguments)
            if not given and (options["run.extend_to"] or 0) > options["run.epochs"]:
                options["run.extend_from"] = None  # a saved one is that of the extension before
            parts = parser.instantiate(options)
    except ArgumentError as error:
        raise UserError(remedy(str(error), "python -m trainer", unknown=_no_such_option)) from None
    cfg = Config(**{section.name: parts[section.name] for section in fields(Config)})
    return cfg if given else _extended(cfg)


def _extended(cfg: Config) -> Config:
    """Let an extension begin after the epochs that the run in the folder had, which may be more than those of its recipe."""
    saved = cfg.folder / "config.yaml"
    if cfg.run.extend_to is None or not saved.is_file():
        return cfg
    before = flat(tree_of(_text_of(saved), str(saved)))
    epochs, extended_to = before.get("run.epochs"), before.get("run.extend_to")
    begins = before.get("run.extend_from") if extended_to == cfg.run.extend_to else epochs
    fits = isinstance(begins, int) and 0 < begins <= cfg.run.epochs
    return replace(cfg, run=replace(cfg.run, extend_from=begins)) if fits else cfg


def _no_such_option(name: str) -> str:
    dashes = "--" if name.startswith("-") else ""
    options, wanted = list(flat(asdict(Config()))), name.lstrip("-").replace("-", "_")
    last = {option: option.rpartition(".")[2] for option in options}
    meant = [option for option in options if last[option] == wanted] or difflib.get_close_matches(
        wanted, options, 1, 0.7
    )
    if not meant and "." not in wanted:
        near = difflib.get_close_matches(wanted, last.values(), 1, 0.7)
        near = near or [name for name in last.values() if wanted.startswith(f"{name}_")]
        meant = [option for option in options if last[option] in near]
    if not meant:
        return f"{name}: no such option; see --help"
    return f"{name}: no such option; did you mean {' or '.join(dashes + option for option in meant)}?"


def option_names() -> list[str]:
    """Every dotted option of a run, in the order of the sections."""
    return list(flat(asdict(Config())))


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Dumper(yaml.SafeDumper):
    """Quotes text that the parser would read back as a number: it, unlike YAML 1.1, takes a run named 1e3 for one."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _dump(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def as_meant(text: str, around: Container[str] = ()) -> str:
    """YAML in which the options that are text are in quotation marks (see `option_files`). Raises yaml.YAMLError."""
    return quoted(text, option_kinds(Config), around)


read_as_meant(option_kinds(Config))  # for --config
set_dumper("yaml", _dump)  # for --print_config


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted option -> value of a table of tables; a tuple as the list that YAML makes of it."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
