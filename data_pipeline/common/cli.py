"""Command lines: what a parser complains of in one line, and for the data's own commands the options that choose images."""

import argparse
import re
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)

CHOOSING = ("val_share", "images", "image_column", "label_column", "split_column", "quarantine")
"""Fields of `DataConfig` that decide which images a split has."""


def command_line(prog: str, description: str, data: tuple[str, ...] = CHOOSING) -> ArgumentParser:
    """A parser that knows `--data.NAME` for each name in `data`."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(DataConfig, "data", skip={field.name for field in fields(DataConfig)} - set(data))
    return parser


def parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    """The values, `data` among them as a dictionary. Raises `UserError`."""
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(_remedy(str(error), parser.prog)) from None
    parsed.data = vars(parsed.data)
    return parsed


def parse_plain(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The values of a command that has no options of `DataConfig`. Raises `UserError`."""
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(_pointing_to_help(str(error), parser.prog)) from None


def parse_known(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The values of a command's own options, and the arguments that are no such option. Raises `UserError`."""
    try:
        return parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise UserError(_pointing_to_help(str(error).removeprefix("argument "), parser.prog)) from None


def _pointing_to_help(message: str, prog: str) -> str:
    return f"{' '.join(message.split())}; see {prog} --help"


def _remedy(message: str, prog: str) -> str:
    """The parser's message in our words."""
    message = " ".join(message.split())
    wrong = re.match(r'Parser key "([\w.]+)":.*[Vv]alue: (.*)', message)
    if wrong:
        choices = re.search(r"typing\.Literal\[(.*?)\]", message)
        kinds = dict.fromkeys(re.findall(r"<class '(\w+)'>", message))
        known = f"one of {choices[1]}" if choices else "another value"
        wanted = " or ".join(kind for kind in kinds if kind not in ("NoneType", "str")) or known
        return f"--{wrong[1].replace('_', '-') if '.' not in wrong[1] else wrong[1]}: {wrong[2]} does not fit; give {wanted}"
    unknown = re.search(r"unrecognized arguments: ([^\s=]+)", message)
    if unknown:
        return f"{unknown[1]}: no such option; see {prog} --help"
    return _pointing_to_help(message.removeprefix("the "), prog)
