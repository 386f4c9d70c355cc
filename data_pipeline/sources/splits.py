"""Find a dataset's splits, folders or shards, by the names that people give them."""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from data_pipeline.common.errors import require

Role = Literal["train", "val", "test"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainval", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}
_BESIDE = r"(?:seg|data|sets?|images?|imgs?|splits?|the|shards?|public|private)?"
_WORD = re.compile(rf"{_BESIDE}({'|'.join(_ROLES)}){_BESIDE}")
"""Word that names a split, written together with one that adds nothing, as in "trainset"."""


class Splits(NamedTuple):
    """Name of each split's folder; None where there is none."""

    train: str | None = None
    val: str | None = None
    test: str | None = None


def find_splits(names: Iterable[str], where: object) -> Splits:
    """Find the splits among the folders `names` of a folder `where`. Raises `UserError` where two could be the same one.

    Beside their split, names may hold words that all of them share, as in `asl_alphabet_train` and `asl_alphabet_test`.
    """
    sets: dict[str, dict[Role, list[str]]] = {}
    for name in names:
        role, rest = _parsed(name)
        if role:
            sets.setdefault(rest, {}).setdefault(role, []).append(name)
    whole = [found for rest, found in sets.items() if rest == "" or ("train" in found and len(found) > 1)]
    require(
        len(whole) < 2,
        f"data.path: {where} holds several datasets ({', '.join(found['train'][0] for found in whole if 'train' in found)}"
        ", …); give a folder with one of them",
    )
    return Splits(**{role: _only(same, role, where) for role, same in _needed(whole[0]).items()}) if whole else Splits()


def _needed(found: dict[Role, list[str]]) -> dict[Role, list[str]]:
    """Drop the split for tests, however many there are, where there is one for validation."""
    return {role: same[:1] if role == "test" and "val" in found else same for role, same in found.items()}


def _only(names: list[str], role: Role, where: object) -> str:
    """Pick the one folder of a role; the plain word wins over one with other words beside it."""
    plain = [name for name in names if name.lower() in _ROLES] or names
    require(
        len(plain) == 1,
        f"data.path: {where} has {' and '.join(plain)}, which both look like {role}/; rename one of them",
    )
    return plain[0]


def role_of(name: str) -> Role | None:
    """Find the split that a file's name mentions, among any other words; None where it mentions none, or several."""
    return _parsed(name)[0]


def _parsed(name: str) -> tuple[Role | None, str]:
    """Divide a name into the split that it mentions, and its other words."""
    words = re.findall(r"[a-z]+", name.lower())
    roles = [match[1] for word in words if (match := _WORD.fullmatch(word))]
    rest = [word for word in words if not _WORD.fullmatch(word) and not re.fullmatch(_BESIDE, word)]
    return (_ROLES[roles[0]] if len(roles) == 1 else None), " ".join(rest)
