"""Command lines of every command: parse, and say in one line of ours what a parser complains of."""

import argparse
import re
from argparse import ArgumentError
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from data_pipeline.common.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser  # a command without options of `DataConfig` works without it

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text, in quotes",
    "list": "a list",
    "NoneType": "null",
}


def parse(parser: "ArgumentParser", arguments: list[str]) -> Any:
    """Parse the options, `data` among them as a dictionary. Raises `UserError`."""
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(remedy(str(error), parser.prog, dashes="--")) from None
    parsed.data = vars(parsed.data)
    return parsed


def plain_parser(prog: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser of a command's own options, whose mistakes `parse_plain` and `parse_known` say in one line."""
    return _PlainParser(prog, description=description, epilog=epilog, allow_abbrev=False, exit_on_error=False)


class _PlainParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise where `exit_on_error` does not reach before Python 3.12: an argument that is missing or unknown."""
        raise ArgumentError(None, message)


def parse_plain(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse the options of a command that has none of `DataConfig`. Raises `UserError`."""
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(remedy(str(error), parser.prog)) from None


def parse_known(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command's own options, and return the other arguments beside them. Raises `UserError`."""
    try:
        return parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise UserError(remedy(str(error), parser.prog)) from None


def remedy(message: str, prog: str, *, dashes: str = "", unknown: Callable[[str], str] | None = None) -> str:
    """One line of ours for what a parser complains of: the option, the value, what to give.

    `dashes` go before an option's name; `unknown` says what to do about an option that does not exist, in place of
    pointing to the help of `prog`.
    """
    message = " ".join(message.split())
    stray = re.search(r"unrecognized arguments: ([^\s=]+)", message)
    if stray:
        return unknown(stray[1]) if unknown else f"{stray[1]}: no such option; see {prog} --help"
    wrong = re.match(r'Parser key "([\w.]+)":.*[Vv]alue: (.*)', message)
    if not wrong:
        return f"{message.removeprefix('the ').removeprefix('argument ')}; see {prog} --help"
    name = wrong[1].replace("_", "-") if dashes and "." not in wrong[1] else wrong[1]
    return f"{dashes}{name}: {wrong[2]} does not fit; give {_wanted(message)}"


def _wanted(message: str) -> str:
    """The kinds of value that an option takes, in words, from a parser's message."""
    words = []
    for kind in re.findall(r"Expected an? (<class '\w+'>|typing\.Literal\[.*?\]|tuple with \d elements)", message):
        name = re.sub(r"^<class '|'>$", "", kind)
        name = re.sub(r"^typing\.Literal\[(.*)\]$", r"one of \1", name)
        name = re.sub(r"^tuple with (\d) elements$", r"a list of \1 values", name)
        words.append(_WORDS.get(name, name))
    return " or ".join(dict.fromkeys(words)) or "another value"
