"""Promises of the READMEs exist: links, commands, options; and the first page stays short."""

import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch.cli import COMMANDS
from tests.conftest import ROOT
from trainer.config import Config

PAGES = sorted(path for path in ROOT.rglob("*.md") if not {"runs", ".venv", "build"} & {*path.relative_to(ROOT).parts})
FILES = {"model.safetensors"}  # what looks like an option and is none
SECTIONS = ("run", "data", "model", "optim", "engine", "tracking")


def options(section: object = Config(), prefix: str = "") -> set[str]:
    """Every dotted option of a run."""
    found = set()
    for field in fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        found |= options(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name}
    return found


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_keeps_its_promises(page: Path) -> None:
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), f"link to {target}"
    for module in re.findall(r"-m ((?:trainer|data_pipeline|launch|tests)[\w.]*\w)", text):
        assert find_spec(module), f"python -m {module}"
    for command in re.findall(r"(?:python -m launch|`launch) ([a-z][\w-]*)", text):
        assert command in COMMANDS, f"launch {command}"
    known = options()
    for option in re.findall(
        rf"(?<![\w./-])(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)?)(?=[\s`=:,;)'\"])", text
    ):
        assert option in known | FILES, f"option {option}"


def test_every_command_is_on_the_first_page() -> None:
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"`launch {command}`" in text, command
    for main in sorted(ROOT.glob("*/*/__main__.py")):
        name = ".".join(main.parent.relative_to(ROOT).parts)
        if name.split(".")[0] in ("trainer", "data_pipeline"):
            assert f"`{name}" in text, name
            assert callable(import_module(f"{name}.__main__").main)
