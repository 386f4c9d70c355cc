"""Whatever is wrong with a file is found, named by its kind, and written where training can leave it out."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.image_headers import BadImage
from data_pipeline.sources.pack_format import Pack
from data_pipeline.sources.pil_decode import decode
from data_pipeline.sources.quarantine import Fault, quarantined, read_quarantine, write_quarantine
from data_pipeline.verify.cli import verify
from tests.conftest import KINDS, encode, picture
from tests.support import warm
from tests.support.runs import environment


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return warm.run("data_pipeline.verify", *map(str, arguments), environment=environment())


def damaged(data: bytes, at: int, length: int = 60) -> bytes:
    return data[:at] + bytes(length) + data[at + length :]


JPEG, PNG = encode(picture(60, 80), "JPEG"), encode(picture(60, 80), "PNG")

BROKEN = {
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"It says it is an image.\n" * 40, "not a JPEG"),
    "gif renamed.jpg": (encode(picture(20, 20).convert("P"), "GIF"), "not a JPEG"),
    "garbage.png": (np.random.default_rng(0).bytes(3000), "not a JPEG"),
    "zeros.jpg": (bytes(3000), "not a JPEG"),
    "header only.jpg": (JPEG[:20], "cut off"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut.png": (PNG[: len(PNG) // 2], "truncated"),
    "damaged.png": (damaged(PNG, len(PNG) // 2), "damaged image data"),
    "huge.png": (PNG[:16] + (100_000).to_bytes(4, "big") * 2 + PNG[24:], "claims"),
}
SOUND = {
    **{name: KINDS[name](picture(60, 80)) for name in ("trailer.jpg", "progressive.jpg", "cmyk.jpg", "turned.jpg")},
    "wide.jpg": encode(picture(16, 2000).resize((20_000, 16)), "JPEG"),
    "wide.png": encode(picture(16, 2000).resize((20_000, 16)), "PNG"),
    "sixteen bits.png": encode(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "PNG"),
    "really a png.jpg": PNG,
    "plain.jpg": JPEG,
}


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """Every file of BROKEN and SOUND in both splits, with what only a file system can hold beside them."""
    root = tmp_path / "it's odd"
    for split in ("train", "val"):
        below = root / split / "a class ü"
        below.mkdir(parents=True)
        for name, (data, _) in BROKEN.items():
            (below / name).write_bytes(data)
        for name, data in SOUND.items():
            (below / name).write_bytes(data)
        (below / "nothing there.jpg").symlink_to("nowhere.jpg")
        (below / "secret.jpg").write_bytes(JPEG)
        (below / "secret.jpg").chmod(0)
        (below / "folder.jpg").mkdir()
        (below / "notes.txt").write_text("not an image, and none by its name")
    return root


def expected(root: Path) -> dict[str, str]:
    """Path -> part of the reason, for all that must be found in the odd folder."""
    why = {name: reason for name, (_, reason) in BROKEN.items()} | {"nothing there.jpg": "No such file"}
    if not os.access(root / "train/a class ü/secret.jpg", os.R_OK):  # nothing is secret from root
        why["secret.jpg"] = "Permission denied"
    return {f"{split}/a class ü/{name}": reason for split in ("train", "val") for name, reason in why.items()}


def test_every_kind_of_broken_file_is_found(odd_folder: Path) -> None:
    outcome = verify(DataConfig(path=str(odd_folder)))
    wanted = expected(odd_folder)
    found = {fault.path: fault.why for fault in outcome.faults if not fault.path.endswith("/folder.jpg")}
    assert found.keys() == wanted.keys()
    for path, reason in wanted.items():
        assert reason in found[path], path
    assert len(found) == len([fault for fault in outcome.faults if not fault.path.endswith("/folder.jpg")])
    assert not outcome.damage


def test_command_tells_kinds_and_writes_the_list(odd_folder: Path, tmp_path: Path) -> None:
    wanted = expected(odd_folder)
    done = run(odd_folder, "--quarantine", tmp_path / "bad files.txt")
    assert (done.returncode, done.stderr) == (1, "")
    rows = [line for line in done.stdout.splitlines() if line.startswith("not a JPEG, PNG, BMP or WebP stream")]
    assert len(rows) == 2 and "6" in rows[0].split() and ", but GIF      2 " in rows[1]
    assert "claims … x … pixels" in done.stdout
    listed = read_quarantine(tmp_path / "bad files.txt")
    assert {path for path in listed if not path.endswith("/folder.jpg")} == wanted.keys()
    cfg = DataConfig(path=str(odd_folder), quarantine=str(tmp_path / "bad files.txt"))
    for split in ("train", "val"):
        root = open_catalog(DataConfig(path=str(odd_folder)), split).root
        below = {path.removeprefix(f"{split}/") for path in wanted if path.startswith(split)}
        assert below <= quarantined(cfg, root)


def test_clean_folder_is_clean(folder: Path, tmp_path: Path) -> None:
    done = run(folder, "--quarantine", tmp_path / "none.txt", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "72 images checked, 0 cannot be decoded" in done.stdout
    assert read_quarantine(tmp_path / "none.txt") == set()


def test_undivided_folder_is_checked_whole(tmp_path: Path) -> None:
    for number in range(60):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged(PNG, len(PNG) // 2) if number % 10 == 3 else PNG)
    outcome = verify(DataConfig(path=str(tmp_path / "images")))
    assert outcome.images == 60
    assert sorted(fault.path for fault in outcome.faults) == sorted(
        f"class 1/{number}.png" for number in range(3, 60, 10)
    )


def test_decoder_refuses_what_dali_gives_up() -> None:
    """Damage that neither header nor end betrays; each kind at many places."""
    draw, agreed = np.random.default_rng(0), set()
    for data in (PNG, SOUND["progressive.jpg"], encode(picture(60, 80), "WEBP", lossless=True)):
        for at in draw.integers(700, len(data) - 40, 8):
            stream = damaged(data, int(at), 20)
            ours = decodes(stream)
            assert ours == dali_decodes(stream)
            agreed.add(ours)
    assert agreed == {True, False}


def decodes(data: bytes) -> bool:
    try:
        decode(data)
    except BadImage:
        return False
    return True


def dali_decodes(data: bytes) -> bool:
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        encoded = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)])
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    pipeline.build()
    try:
        pipeline.run()
    except RuntimeError as error:
        assert "Failed to decode" in str(error)
        return False
    return True


# ---- the list


def test_list_keeps_any_name(tmp_path: Path) -> None:
    names = [
        "train/a/x.jpg",
        "#1.jpg",
        '"quoted".jpg',
        "two\nlines.jpg",
        " spaces ",
        "ü 猫",
        os.fsdecode(b"\xff.jpg"),
        "r\r",
    ]
    write_quarantine(tmp_path / "list", [Fault(name, f"for reason {n}") for n, name in enumerate(names)])
    assert read_quarantine(tmp_path / "list") == set(names)
    assert (tmp_path / "list").read_bytes().count(b"# for reason \xe2\x80\xa6\n") == 1


def test_list_may_be_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"# mine\r\n\r\ntrain/a/x.jpg\r\n./val//a/y.jpg\n")
    cfg = DataConfig(path=str(tmp_path / "data"), quarantine=str(tmp_path / "list"))
    assert read_quarantine(tmp_path / "list") == {"train/a/x.jpg", "val/a/y.jpg"}
    assert quarantined(cfg, tmp_path / "data/train") == {"a/x.jpg", "../val/a/y.jpg"}
    assert quarantined(DataConfig(path=str(tmp_path)), tmp_path) == set()


@pytest.mark.parametrize("content", [None, b'"no end\n'])
def test_unreadable_list_is_a_mistake(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.quarantine: .*list"):
        read_quarantine(tmp_path / "list")


# ---- packs


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    pack(DataConfig(path=str(folder)), tmp_path / "a pack", PackConfig(short_side=40, shard_size="30"))
    return tmp_path / "a pack"


def test_whole_pack_is_clean(packed: Path) -> None:
    done = run(packed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "72 images checked, 0 cannot be decoded\n" in done.stdout


def test_flipped_byte_is_found(packed: Path) -> None:
    """Wherever in a shard it is."""
    shard = packed / "train/000001.tar"
    whole = shard.read_bytes()
    for at in (3, 520, len(whole) // 2, len(whole) - 5):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        outcome = verify(DataConfig(path=str(packed)))
        assert "its checksum is not that of the manifest" in {
            f.why for f in outcome.damage if f.path == "train/000001.tar"
        }
        assert {f.path for f in outcome.damage} == {"train/000001.tar"}
    shard.write_bytes(whole)
    assert not verify(DataConfig(path=str(packed))).damage


def test_damaged_image_of_a_pack_is_named_by_its_path(packed: Path, tmp_path: Path) -> None:
    index = Pack.open(packed).index("val")
    shard, start = packed / "val/000000.tar", int(index.offset[5])
    data = bytearray(shard.read_bytes())
    data[start : start + 30] = bytes(30)
    shard.write_bytes(data)
    done = run(packed, "--quarantine", tmp_path / "list.txt")
    assert done.returncode == 1
    assert "1 cannot be decoded; 1 of the pack's files are damaged" in done.stdout
    assert read_quarantine(tmp_path / "list.txt") == {f"val/{index.paths[5]}"}
    assert quarantined(DataConfig(path=str(packed), quarantine=str(tmp_path / "list.txt")), packed / "val") == {
        index.paths[5]
    }


def test_missing_and_exchanged_files_are_found(packed: Path) -> None:
    index = Pack.open(packed).index("train")
    shutil.copy(packed / "train/index.npz", packed / "val/index.npz")
    (packed / "train/000000.tar").unlink()
    outcome = verify(DataConfig(path=str(packed)))
    assert {(fault.path, fault.why) for fault in outcome.damage} == {
        ("val/index.npz", "its checksum is not that of the manifest"),
        ("train/000000.tar", "No such file or directory"),
    }
    assert [fault.path for fault in outcome.faults] == [f"train/{path}" for path in index.paths[:30]]


def test_index_that_tells_something_else_is_found(packed: Path) -> None:
    """At first the checksum gives it away; then that agrees too."""
    index, manifest = Pack.open(packed).index("val"), json.loads((packed / "manifest.json").read_bytes())
    index.label[4] += 1
    index.width[7] += 1
    (packed / "val/index.npz").write_bytes(index.to_bytes())
    outcome = verify(DataConfig(path=str(packed)))
    assert [(f.path, f.why) for f in outcome.damage] == [("val/index.npz", "its checksum is not that of the manifest")]
    manifest["splits"]["val"]["index"]["sha256"] = hashlib.sha256(index.to_bytes()).hexdigest()
    (packed / "manifest.json").write_text(json.dumps(manifest))
    outcome = verify(DataConfig(path=str(packed)))
    assert [(f.path, f.why) for f in outcome.damage] == [("val/000000.tar", "its members are not those of the index")]
    assert [fault.path for fault in outcome.faults] == [f"val/{index.paths[7]}"]


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere"),
        (("FOLDER", "--quarantine", "here.txt"), "--quarantine: here.txt exists"),
        (("FOLDER", "--quarantine", "nowhere/x.txt"), "--quarantine: nowhere is not a folder"),
        (("FOLDER", "--workers", "many"), "--workers: many does not fit"),
        (("FOLDER", "--data.val_share", "3"), "data.val_share: 3.0"),
        (("not a pack",), "not of a pack of version 1"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "FOLDER").symlink_to(folder)
    (tmp_path / "here.txt").write_text("mine")
    (tmp_path / "not a pack").mkdir()
    (tmp_path / "not a pack/manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert (tmp_path / "here.txt").read_text() == "mine"
