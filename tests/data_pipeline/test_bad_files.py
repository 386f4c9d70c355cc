"""Training on a folder of broken and odd files: it ends, every broken one is named once, and the odd ones count."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import encode, picture
from tests.support import warm
from tests.support.runs import environment
from trainer.checkpoint.store import Store

JPEG = encode(picture(60, 80), "JPEG", quality=90)
PNG = encode(picture(60, 80), "PNG")


def with_thumbnail(cut: int) -> bytes:
    """A JPEG whose EXIF data hold a whole other JPEG, cut off within its own image."""
    thumbnail = encode(picture(16, 16), "JPEG")
    segment = b"Exif\0\0" + thumbnail
    return JPEG[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + JPEG[2:cut]


def exif(tag: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = tag
    return encode(picture(60, 80), "JPEG", exif=tags.tobytes())


def deep_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray((np.arange(4800, dtype=np.uint16) * 13).reshape(60, 80)).save(stream, "PNG")
    return stream.getvalue()


BROKEN = {
    "empty.jpg": b"",
    "garbage.jpg": np.random.default_rng(0).bytes(5000),
    "zeros.jpg": bytes(5000),
    "text.jpg": b"<html>404 Not Found</html>\n" * 20,
    "gif.jpg": encode(picture(60, 80), "GIF"),
    "tiff.jpg": encode(picture(60, 80), "TIFF"),
    "header only.jpg": JPEG[:20],
    "tables only.jpg": JPEG[:400],
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "cut at the end.jpg": JPEG[:-2],
    "cut behind a thumbnail.jpg": with_thumbnail(len(JPEG) // 2),
    "cut.png": PNG[: len(PNG) // 2],
    "header only.png": PNG[:33],
    "cut.webp": encode(picture(60, 80), "WEBP")[:-100],
    "cut.bmp": encode(picture(60, 80), "BMP")[:-100],
    "signature only.jpg": b"\xff\xd8\xff\xd9",
}
ODD = {
    "wide.jpg": encode(picture(10, 20_000), "JPEG"),
    "deep.png": deep_png(),
    "turned.jpg": exif(6),
    "cmyk.jpg": encode(picture(60, 80).convert("CMYK"), "JPEG"),
    "gray.jpg": encode(picture(60, 80).convert("L"), "JPEG"),
    "progressive.jpg": encode(picture(60, 80), "JPEG", progressive=True),
    "trailing garbage.jpg": JPEG + np.random.default_rng(1).bytes(3000),
    "one pixel.png": encode(picture(1, 1), "PNG"),
    "damaged.jpg": JPEG[:1500] + bytes(40) + JPEG[1540:],
    "png.jpg": PNG,
}


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for split, count in (("train", 110), ("val", 30)):
        for number, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for row in range(count):
                image = picture(40, 48, seed=2 * row + number)
                (root / split / name / f"{row}.jpg").write_bytes(encode(image, "JPEG"))
        for name, data in (BROKEN | ODD).items():
            (root / split / "a" / name).write_bytes(data)
        (root / split / "a" / "folder.jpg").mkdir()
        (root / split / "a" / "lost.jpg").symlink_to(root / "nowhere.jpg")
    return root


def test_training_goes_through_and_names_each_once(bad: Path, tmp_path: Path) -> None:
    broken = [*BROKEN, "folder.jpg", "lost.jpg"]
    closed = os.geteuid() != 0  # root reads everything
    if closed:
        broken.append("closed.jpg")
        for split in ("train", "val"):
            (bad / split / "a" / "closed.jpg").write_bytes(JPEG)
            (bad / split / "a" / "closed.jpg").chmod(0)
    options = {
        "run.dir": tmp_path / "run",
        "run.epochs": 2,
        "data.path": bad,
        "data.batch": 128,
        "data.size_px": 32,
        "model.width": 0.25,
        "data.max_bad_share": 0.5,
        "tracking.wandb": "off",
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    ended = warm.run("trainer", *arguments, environment=environment())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert Store(tmp_path / "run").progress().finished
    assert f"\ndata: {bad} (class folders in train/): " in f"\n{ended.stdout}"
    for split in ("train", "val"):
        for name in broken:
            named = ended.stdout.count(f"{bad / split / 'a' / name}: ")
            assert named == 1, f"{split}/a/{name} is named {named} times"
        for name in ODD:
            assert f"{split}/a/{name}:" not in ended.stdout, f"{name} is no bad file"


def test_too_many_end_the_run(bad: Path, tmp_path: Path) -> None:
    arguments = ["--data.path", str(bad), "--data.batch", "128"]
    arguments += ["--run.dir", str(tmp_path / "run"), "--tracking.wandb", "off"]
    for options, option in (([], "data.max_bad_share"), (["--data.on_error", "fail"], "data.on_error")):
        ended = warm.run("trainer", *arguments, *options, environment=environment())
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1].startswith(f"error: {option}: 18 of the 248 images in ")
        assert not (tmp_path / "run").exists()
