"""YAML of options as it is meant: where an option is text or one of some words, it is what is written there.

YAML itself takes `off` and `no` for false, 064 for 52 (to base eight), 12:30 for 750 (to base sixty) and 2024-01-01 for a date.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import get_loader, set_loader

from data_pipeline.common.errors import require
from data_pipeline.common.safe_yaml import compose_yaml

_SWITCHES = (
    ({"off", "no", "n", "false"}, ("off", "no", "none", "false")),
    ({"on", "yes", "y", "true"}, ("on", "yes", "true")),
    ({"null", "none", "~"}, ("none", "off", "no")),
)
"""Spellings of a word, and the words that an option may have for it."""


_ZEROS = re.compile(r"[-+]?0[0-9_]+")
"""Whole numbers that YAML 1.1 reads to base eight, or as text where they have an 8 or 9."""
_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
"""Numbers that it reads to base sixty."""


_plain = get_loader("yaml")
_known: dict[str, Any] = {}


def read_as_meant(kinds: Mapping[str, Any]) -> None:
    """Let command lines and their files be read by `quoted`, with these options beside those of earlier calls.

    A process has one such reader, so parts that each set their own would undo what the other keeps.
    """
    _known.update(kinds)
    set_loader("yaml", lambda text: _plain(quoted(text, _known)), (yaml.YAMLError,))  # text that is no YAML is text


@cache
def option_kinds(section: type) -> dict[str, Any]:
    """Dotted name -> type of each option of a dataclass of dataclasses."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind) and isinstance(kind, type):
            kinds |= {f"{name}.{inner}": its for inner, its in option_kinds(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def quoted(text: str, kinds: Mapping[str, Any], around: Container[str] = ()) -> str:
    """YAML `text` with quotation marks around values of options that are words; options may stand in tables `around` them.

    A number with zeros before it is to base ten; one with colons is text (see `check_base`). Raises yaml.YAMLError.
    """
    root = compose_yaml(text)
    if root is None or (isinstance(root, yaml.ScalarNode) and not _SIXTIES.fullmatch(root.value)):
        return text
    _quote(root, "", kinds, around, set())
    return str(yaml.serialize(root))


def _quote(node: yaml.Node, path: str, kinds: Mapping[str, Any], around: Container[str], seen: set[int]) -> None:
    if id(node) in seen:
        return  # an alias
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value)
            outside = not path and (name in around or name == "<<")
            _quote(value, path if outside else f"{path}{'.' * bool(path)}{name}", kinds, around, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _quote(item, path, kinds, around, seen)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        word = _word(node, kinds[path]) if path in kinds else None
        if word is None and _SIXTIES.fullmatch(node.value):
            word = node.value
        if word is not None:
            node.value, node.tag, node.style = word, "tag:yaml.org,2002:str", '"'
        elif _ZEROS.fullmatch(node.value):
            node.value = re.sub(r"^([-+]?)[0_]+(?=[0-9])", r"\1", node.value)


def check_base(option: str, kind: Any, written: Any) -> None:
    """Raise `UserError` where an option for numbers, or for lists of them, is given one that YAML reads to base sixty."""
    wrong = [part for part in re.split(r"[\[\],\s'\"]+", str(written)) if _SIXTIES.fullmatch(part)]
    text = get_origin(kind) is Literal or str in _alternatives(kind)
    require(text or not wrong, f"{option}: {''.join(wrong[:1])} does not fit; give a number without colons")


def _alternatives(kind: Any) -> list[Any]:
    return [kind] if get_origin(kind) is Literal else [kind, *get_args(kind)]


def _word(node: yaml.ScalarNode, kind: Any) -> str | None:
    """Read a value as text or as one of an option's words; None where it is neither, or nothing."""
    kinds = _alternatives(kind)
    words = [word for one in kinds if get_origin(one) is Literal for word in get_args(one) if isinstance(word, str)]
    nothing = node.tag == "tag:yaml.org,2002:null" and (NoneType in kinds or node.value in ("", "~"))
    if nothing or not (words or str in kinds):
        return None
    written = node.value.lower()
    same = [word for word in words if word == written]
    meant = [word for spellings, names in _SWITCHES if written in spellings for word in names if word in words]
    # An item of a list is none of the words, and neither is a number.
    otherwise = None if float in kinds or any(get_origin(one) is list for one in kinds) else node.value
    return next(iter([*same, *meant]), otherwise)
