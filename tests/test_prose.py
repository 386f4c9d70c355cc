"""Docstrings say first what a thing is or does."""

import ast
import re
from collections.abc import Iterator

from tests.conftest import ROOT

RIDDLES = {"What", "How", "Whether", "Who", "Whose", "Whom", "Where", "When", "Which", "Why"}
"""Words that make a riddle of a docstring's beginning."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes too."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def test_no_docstring_begins_with_a_riddle() -> None:
    found = []
    for folder in ("data_pipeline", "trainer", "launch", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for line, text in docstrings(ast.parse(path.read_text())):
                first = re.match(r"\w*", text.strip())
                if first and first[0] in RIDDLES:
                    found.append(f"{path.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}")
    assert not found, "begin with the thing itself, or with what it does: verb or noun first"
