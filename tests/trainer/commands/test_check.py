"""The check of a machine: every item passes here, or says what is missing; and one that crashes or hangs is told."""

import json
import sys
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from trainer.check import cli, items
from trainer.check.cli import FAIL, PASS, Result, run_item
from trainer.check.names import NAMES

SLOW = {"loader speed", "optimizers", "step speed", "kill and resume"}
"""Items that take more than ten seconds."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_an_item(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "BATCH", 4)
    monkeypatch.setattr(items, "SIZE_PX", 32)
    try:
        assert items.ITEMS[name]()
    except items.Skip as why:
        pytest.skip(str(why))


def test_every_item_is_named() -> None:
    assert items.ITEMS.keys() == NAMES.keys()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("kill -SEGV $$", "signal SIGSEGV: it said nothing"),
        ("echo warning; echo the last words; exit 3", "exit code 3: the last words"),
        ("sleep 60", "it took longer than 0.5 s"),
    ],
)
def test_a_crash_and_a_hang_are_findings(
    program: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    found = run_item("worlds", limit_s=0.5)
    assert (found.state, found.told) == (FAIL, told)


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"worlds": Result("worlds", PASS, "the same", 1.0), "capture": Result("capture", FAIL, "a | b", 2.0)}
    monkeypatch.setattr(cli, "run_item", lambda name, _: found[name])
    monkeypatch.setattr(sys, "argv", ["", "--only", "worlds", "capture", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "1 of 2 failed: capture" in capsys.readouterr().err
    saved = json.loads((tmp_path / "out/check.json").read_text())
    assert [result["state"] for result in saved["results"]] == [PASS, FAIL] and "torch" in saved["about"]
    assert "| capture | FAIL | a / b | 2.0 |" in (tmp_path / "out/check.md").read_text()
    with pytest.raises(UserError, match=r"^--out: .* holds a check already; give another folder$"):
        cli.main()


def test_an_unknown_item_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--only", "nope"])
    with pytest.raises(UserError, match=r"^--only: there is no item nope; choose from decode kinds, "):
        cli.main()
