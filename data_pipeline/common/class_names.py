"""Compare the names of classes: the same word written in two ways, and words that stand for no class, are probably mistakes."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

_NO_CLASS = frozenset(
    ["nan", "none", "null", "n/a", "na", "<na>", "#n/a", "nat", "?", "-1", "undefined", "unlabeled", "unlabelled"]
)
"""Words for a missing class, in small letters."""
_SIGNS = frozenset(["-1", "0", "1"])
"""Classes of which -1 is one."""
_ALPHABET = 20
"""Classes of one character from which on they are characters, of which no two are the same."""
_LISTS = 0.1
"""Share of the classes from which on names of several words are lists of others; below, there is "ski mask" beside "ski"."""
_SHOWN, _WIDTH = 3, 40


def lacking(name: str, classes: list[str]) -> str:
    """Say what `classes` has in place of `name`, which it lacks: the same word written otherwise, or its first classes."""
    same = next((other for other in classes if _written_alike(other) == _written_alike(name)), None)
    if same is None:
        few = ", ".join(other[:_WIDTH] for other in classes[:_SHOWN])
        return f"training has {few}{', …' * (len(classes) > _SHOWN)}"
    return f"training has {_quoted([name, same])[1][:_WIDTH]}, perhaps the same"


def doubts(classes: list[str]) -> list[str]:
    """Say in a line each which classes are probably one, and which none."""
    alphabet = sum(len(name) == 1 for name in classes) >= _ALPHABET
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[name if alphabet and len(name) == 1 else _written_alike(name)].append(name)
    missing = _NO_CLASS - ({"?"} if alphabet else set()) - ({"-1"} if {*classes} <= _SIGNS else set())
    found = {
        "classes that differ only in how they are written, and count as different ones": [
            " and ".join(_quoted(names)) for names in alike.values() if len(names) > 1
        ],
        "named as if it were missing, and taken for a class": [name for name in classes if name.lower() in missing],
        "named like a list of other classes, and taken for one of its own": _lists(classes),
    }
    return [f"{what}: {_few(names)}" for what, names in found.items() if names]


def _lists(classes: list[str]) -> list[str]:
    """Return the names that consist of other classes' names."""
    known = {_bare(name) for name in classes}
    lists = [name for name in classes if len(parts := _parts(name)) > 1 and {*parts} <= known]
    if len(lists) < _LISTS * len(classes):
        return [name for name in lists if re.search(r"[|;,]", _bare(name))]
    return lists


def _written_alike(name: str) -> str:
    """Reduce names that differ only in case, spaces, quotes, the form of characters or of a whole number to one."""
    text = _visible(name).casefold()
    text = text.strip(" \t\r\n'\"`") or text
    number = re.fullmatch(r"(-?)0*(\d+)(\.0*)?", text, re.ASCII)
    return number[1] + number[2] if number else re.sub(r"(?<=[^\W\d_])[\s_-]+(?=[^\W\d_])", "", text)


def _visible(name: str) -> str:
    """Reduce names that look the same to one."""
    return "".join(char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) != "Cf")


def _bare(name: str) -> str:
    """Cut brackets, quotes and separators from the ends of a name, as of "['cat']"."""
    return name.strip(" []{}()'\"|;,")


def _parts(name: str) -> list[str]:
    return [part for part in map(_bare, re.split(r"[|;, ]+", _bare(name))) if part]


def _quoted(names: list[str]) -> list[str]:
    """Quote names; with escapes where they look the same."""
    looks = {*map(_visible, names)}
    return [repr(name) if len(looks) == len(names) else ascii(name) for name in names]


def _few(texts: Iterable[str]) -> str:
    found = [text[: 2 * _WIDTH] for text in texts]
    return ", ".join(found[:_SHOWN]) + f" and {len(found) - _SHOWN} more" * (len(found) > _SHOWN)
