"""Nothing that is read can run code or lead out of its folder, and nothing that is written gives a secret away."""

import ast
import importlib.util
import io
import json
import os
import pickle
import stat
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.pack_format import MANIFEST, Pack
from tests.conftest import ROOT, config, encode, picture
from tests.support.runs import Job, dotted, place_checkpoint, settings_of
from tests.test_layers import dotted as dotted_name
from tests.test_layers import modules
from trainer import __main__ as training
from trainer import evaluate
from trainer.config import load

FORBIDDEN = {
    *(
        f"{module}.{name}"
        for module in ("pickle", "marshal", "dill", "joblib")
        for name in ("load", "loads", "Unpickler")
    ),
    *(
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "shelve.open",
        "pd.read_pickle",
        "torch.hub.load",
        "os.system",
    ),
    *("eval", "exec", "os.popen", "tempfile.mktemp"),
}
"""Calls that run what they read."""
PICKLED = ("get_state_dict", "load_state_dict_from_url")
"""Calls that run what they read, unless they are told weights_only=True."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


# ---- the sources -----------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for module, source in modules().items():
        for node in ast.walk(source):
            if isinstance(node, ast.Call):
                name = dotted_name(node.func) or getattr(node.func, "attr", "")
                yield f"{module}:{node.lineno}", name, node


def keywords(call: ast.Call) -> dict[str | None, Any]:
    return {word.arg: getattr(word.value, "value", None) for word in call.keywords}


def test_nothing_that_is_read_is_run() -> None:
    loads = 0
    for place, name, call in calls():
        assert name not in FORBIDDEN, f"{place} calls {name}"
        assert not keywords(call).get("allow_pickle"), f"{place} unpickles arrays"
        assert not keywords(call).get("shell"), f"{place} calls a shell"
        assert not name.endswith(".extractall"), f"{place} unpacks an archive"
        if name.rpartition(".")[2] in PICKLED or name == "torch.load":
            loads += 1
            assert keywords(call).get("weights_only") is True, f"{place} calls {name} without weights_only=True"
    assert loads >= 2, "the check sees what it is about"


def test_dependencies_have_a_lower_and_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in project["dependencies"]:
        assert ">=" in needed or "==" in needed, needed
    open_ended = [needed for needed in project["dependencies"] if "<" not in needed and "==" not in needed]
    assert open_ended == ["pillow>=11"], "each major version of Pillow drops old Pythons and no more"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Trap:
    """Leaves a file behind where it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def by_pickle(trap: Trap) -> bytes:
    return pickle.dumps(trap)


def by_torch(trap: Trap) -> bytes:
    stream = io.BytesIO()
    torch.save({"optimizer": trap}, stream)
    return stream.getvalue()


def refused(
    main: Callable[[], None], arguments: list[str], patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
) -> str:
    """The one line that a command answers with."""
    patch.setattr(sys, "argv", ["", *arguments])
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    out, err = capture.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
    return err


@pytest.mark.filterwarnings("error::UserWarning")  # which would stand before the line
@pytest.mark.parametrize("make", [by_pickle, by_torch])
def test_hostile_training_state_is_refused(
    make: Callable[[Trap], bytes],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The checkpoint is whole, checksums included: whoever made it could write those too."""
    mark = tmp_path / "mark"
    options = dotted(settings_of(base, tmp_path / "run"))
    cfg = load(options)
    train = open_catalog(cfg.data, "train")
    about = {"model": "resnet18", "classes": json.dumps(train.classes), "data": train.fingerprint()}
    weights = save({"x": torch.zeros(1)}, {"sluice": json.dumps(about)})
    run = place_checkpoint(tmp_path / "run", cfg, {"model.safetensors": weights, "training.pt": make(Trap(mark))})
    line = refused(training.main, options, monkeypatch, capfd)
    file = (run / "checkpoints/last").resolve() / "training.pt"
    assert line.startswith(f"error: {file}: it cannot be loaded (Weights only load failed")
    assert line.endswith("); restore it, or begin anew in another --run.dir\n")
    assert not mark.exists(), "nothing was run"
    with pytest.MonkeyPatch.context():
        pickle.loads(by_pickle(Trap(mark)))
    assert mark.exists(), "the trap works"


def test_hostile_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    run = place_checkpoint(tmp_path / "run", load([]), {"model.safetensors": by_torch(Trap(mark))})
    line = refused(evaluate.main, [str(run)], monkeypatch, capfd)
    assert f"{(run / 'checkpoints/best').resolve() / 'model.safetensors'}: it cannot be loaded (" in line
    assert not mark.exists()


# ---- archives and manifests ------------------------------------------------------------------------------------------


def shard(file: Path, members: list[tarfile.TarInfo | str]) -> None:
    """A tar of an image under each name, each followed by its label, and of members without content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    jpeg = encode(picture(20, 20), "JPEG")
    with tarfile.open(file, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            for name, content in ((f"{member}.jpg", jpeg), (f"{member}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "shown"),
    [
        ("../x", "../x.jpg"),
        ("a/../../x", "a/../../x.jpg"),
        ("/etc/x", "/etc/x.jpg"),
        (link("x.jpg", "/etc/passwd", tarfile.SYMTYPE), "x.jpg"),
        (link("x.cls", "../../secret", tarfile.LNKTYPE), "x.cls"),
        (link("x.jpg", "", tarfile.FIFOTYPE), "x.jpg"),
    ],
)
def test_shards_with_members_that_lead_elsewhere(member: tarfile.TarInfo | str, shown: str, tmp_path: Path) -> None:
    file = tmp_path / "data/train/000.tar"
    shard(file, ["good", member])
    shard(tmp_path / "data/val/000.tar", ["good"])
    with pytest.raises(UserError) as error:
        open_catalog(config(tmp_path / "data", batch=1), "train")
    assert str(error.value) == (f"data.path: the shard {file} has a member {shown!r} that leads elsewhere; remove it")


def test_shards_with_folders(tmp_path: Path) -> None:
    shard(tmp_path / "data/train/000.tar", [link("a", "", tarfile.DIRTYPE), "a/good..one", "./other"])
    shard(tmp_path / "data/val/000.tar", ["good"])
    assert len(open_catalog(config(tmp_path / "data", batch=1), "train")) == 2


@pytest.mark.parametrize("name", ["../x.jpg", "sub/../../x.jpg", "ABSOLUTE"])
def test_tables_with_images_elsewhere(name: str, tmp_path: Path) -> None:
    """A name that leaves the folder of the images counts as missing, though there is such a file."""
    (tmp_path / "x.jpg").write_bytes(encode(picture(20, 20), "JPEG"))
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    name = name.replace("ABSOLUTE", str(tmp_path / "x.jpg"))
    (folder / "table.csv").write_text(f"image,label\n{name},cat\n")
    with pytest.raises(UserError) as error:
        open_catalog(DataConfig(path=str(folder / "table.csv"), val_share=0.5), "train")
    assert str(error.value) == (
        f"data.images: 1 of the 1 images that {folder / 'table.csv'} names are not in {folder}: {name}; "
        "give the folder that they are in as --data.images"
    )


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "train/../../secret"])
@pytest.mark.parametrize("where", ["index", "shard"])
def test_packs_with_files_elsewhere(where: str, file: str, tmp_path: Path) -> None:
    entry = {"file": file, "sha256": "", "bytes": 0}
    good = {"file": "train/index.npz", "sha256": ""}
    part = {"index": entry if where == "index" else good, "shards": [entry] if where == "shard" else []}
    manifest = {"format": "sluice-pack", "version": 1, "splits": {"train": part, "val": {"index": good, "shards": []}}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        Pack.open(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / MANIFEST}: it names a file outside of the pack, ['{file}']; make the pack anew"
    )


# ---- what is written -------------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "5ec4e75ec4e75ec4e75ec4e75ec4e75ec4e75ec4",
    "HF_TOKEN": "hf_SECRETofNobody",
    "AWS_SECRET_ACCESS_KEY": "aws/SECRET+of/nobody",
    "SLUICE_PASSWORD": "a SECRET pass phrase",
}


def test_files_respect_the_umask_and_hold_no_secrets(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that writes all that a run can: checkpoints, metrics, TensorBoard, W&B, a trace, its log."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    run = tmp_path / "run"
    wanted = {"tracking.wandb": "offline", "tracking.tensorboard": "true", "run.max_steps": "3", "run.profile": "2-3"}
    before = os.umask(0o027)
    try:
        job = Job(1, tmp_path / "run.log", "trainer", *dotted(settings_of(base, run) | wanted))
    finally:
        os.umask(before)
    assert job.wait() == 0, job.output()

    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "model.safetensors", "training.pt", "run.log"} <= names
    assert any(name.endswith(".wandb") for name in names) and any("tfevents" in name for name in names)
    for path in files:
        if path.name == "run.log":
            continue
        content = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{path} holds {name}"
        assert not path.stat().st_mode & stat.S_IRWXO, f"{path} is open to all"
    assert not any(value in job.output() for value in SECRETS.values())
    for folder in (path for path in run.rglob("*") if path.is_dir() and not path.is_symlink()):
        assert not folder.stat().st_mode & stat.S_IRWXO, f"{folder} is open to all"


@pytest.mark.skipif(importlib.util.find_spec("bandit") is None, reason="bandit is not installed")
def test_bandit_finds_nothing_that_is_not_explained(tmp_path: Path) -> None:
    job = Job(1, tmp_path / "log", "bandit", "-q", "-r", "-c", str(ROOT / "pyproject.toml"),
              *(str(ROOT / layer) for layer in ("data_pipeline", "trainer", "launch")))  # fmt: skip
    assert job.wait() == 0, job.output()
