"""Read YAML from others: plain values, and no more of them than a file of options needs."""

from pathlib import Path
from typing import Any

import yaml

BYTES, DEPTH, NODES = 1 << 20, 20, 10_000
"""Limits of a file: its length in bytes, the depth of its values, and their number with each alias expanded."""


def load_yaml(text: str) -> Any:
    """Parse YAML into plain values. Raises `yaml.YAMLError`, also where it is too long, too deep, or refers to itself."""
    _check_length(text)
    loader = _Bounded(text)  # a safe loader
    try:
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:  # of a date in month 13, or a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of YAML, before it is decided what their values are. Raises `yaml.YAMLError` as `load_yaml` does."""
    _check_length(text)
    node: yaml.Node | None = yaml.compose(text, _Bounded)
    return node


def _check_length(text: str) -> None:
    if len(text) > BYTES:
        raise yaml.YAMLError(f"it has more than {BYTES >> 20} MiB")


def read_yaml(file: Path) -> Any:
    """Apply `load_yaml` to a file, without reading more than is allowed. Raises also OSError and UnicodeDecodeError."""
    return load_yaml(read_text(file))


def read_text(file: Path) -> str:
    """A file's text, or as much of it as `load_yaml` refuses. Raises OSError and UnicodeDecodeError."""
    with file.open() as stream:
        return stream.read(BYTES + 1)


class _Bounded(yaml.SafeLoader):
    """Loader that counts nodes while it composes them: a short text can stand for 10^9 of them by aliases of aliases."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # id of a composed node -> its size in nodes

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._nodes
        self._depth += 1
        if self._depth > DEPTH:
            raise yaml.YAMLError(f"its values lie more than {DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        elif id(node) in self._sizes:
            self._nodes += self._sizes[id(node)]
        else:
            raise yaml.YAMLError("it holds a value that contains itself")
        if self._nodes > NODES:
            raise yaml.YAMLError(f"it stands for more than {NODES} values")
        return node
