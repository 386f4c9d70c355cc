"""The compile cache is code that the next start runs: only from a folder of one's own, and only if it is whole."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from tests.support.runs import SOLO
from trainer.engine.compile_cache import THREADS, VARIABLE, drop_damaged, keep_compiled
from trainer.engine.config import EngineConfig


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of this node; variables are as before afterwards."""
    monkeypatch.setenv(VARIABLE, "as it was")
    monkeypatch.setenv(THREADS, "as it was")
    monkeypatch.delenv(THREADS)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / f"tmp/sluice-compiled-{os.geteuid()}"


def test_nothing_is_made_where_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    for compile in ("off", "auto"):
        keep_compiled(EngineConfig(compile=compile), SOLO)
    assert os.environ[VARIABLE] == "as it was" and not (tmp_path / "cache").exists()


def test_a_node_works_in_a_folder_of_its_own(tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled from the shared one, and what is new comes back at the end: another node is warm."""
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    for cfg, shared in (
        (EngineConfig(compile="on"), tmp_path / "cache/compiled"),
        (EngineConfig(compile="on", compile_cache=str(tmp_path / "shared")), tmp_path / "shared"),
    ):
        (shared / "ab").mkdir(parents=True, mode=0o700)
        shared.chmod(0o700)
        (shared / "ab/old.py").write_text("old")
        end = keep_compiled(cfg, SOLO)
        assert Path(os.environ[VARIABLE]) == node and node.stat().st_mode & 0o777 == 0o700
        assert (node / "ab/old.py").read_text() == "old"
        (node / f"{shared.name}.py").write_text("new")
        (node / "one.lock").touch()
        (node / "ab/old.py").write_text("changed")
        end()
        assert (shared / f"{shared.name}.py").read_text() == "new" and (shared / "ab/old.py").read_text() == "old"
        assert not [*shared.rglob("*.lock")] and not [*shared.rglob(".*")]
        shutil.rmtree(node)
    assert os.environ[THREADS] == str(SOLO.cores)


def test_one_rank_of_a_node_copies(tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir(mode=0o700)
    (tmp_path / "shared/old.py").write_text("old")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(THREADS, "3")
    end = keep_compiled(EngineConfig(compile="on", compile_cache=str(tmp_path / "shared")), SOLO)
    assert os.environ[VARIABLE] == str(node) and not [*node.iterdir()] and os.environ[THREADS] == "3"
    (node / "new.py").write_text("new")
    end()
    assert not (tmp_path / "shared/new.py").exists()


@pytest.mark.parametrize("kind", ["open to all", "a link", "a file"])
def test_a_folder_of_the_node_that_others_made_is_not_used(
    kind: str, tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match kind:
        case "open to all":
            node.mkdir()
            node.chmod(0o777)
        case "a link":
            (tmp_path / "elsewhere").mkdir()
            node.symlink_to(tmp_path / "elsewhere")
        case _:
            node.touch()
    keep_compiled(EngineConfig(compile="on", compile_cache=str(tmp_path / "shared")), SOLO)()
    assert os.environ[VARIABLE] == str(tmp_path / "shared")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_write_to_is_refused(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path))
    for folder, option in ((tmp_path / "shared", "engine.compile_cache"), (tmp_path / "compiled", "cache")):
        folder.mkdir()
        folder.chmod(mode)
        given = str(folder) if option == "engine.compile_cache" else None
        with pytest.raises(UserError, match=f"{option}: .* may write to {folder}, and what lies there is run"):
            keep_compiled(EngineConfig(compile="on", compile_cache=given), SOLO)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to somebody else takes root")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    os.chown(folder, 12345, -1)
    with pytest.raises(UserError, match=f"engine.compile_cache: {folder} belongs to another user"):
        keep_compiled(EngineConfig(compile="on", compile_cache=str(folder)), SOLO)


@pytest.mark.skipif(shutil.which("g++") is None, reason="it takes a compiler")
def test_libraries_cut_short_are_dropped(tmp_path: Path) -> None:
    """Wherever a kill or a full disk has cut them."""
    whole = tmp_path / "whole.so"
    source = tmp_path / "source.cpp"
    source.write_text('extern "C" int f() { return 3; }')
    subprocess.run(["g++", "-shared", "-fPIC", "-o", whole, source], check=True)
    content = whole.read_bytes()
    for length in (0, 10, 64, len(content) // 2, len(content) - 1):
        (tmp_path / "ab").mkdir(exist_ok=True)
        (tmp_path / "ab" / f"{length}.so").write_bytes(content[:length])
    drop_damaged(tmp_path)
    assert [file.name for file in tmp_path.rglob("*.so")] == ["whole.so"]
