"""Packs written to an S3 server, and made from one: the same bytes as on a disk, also after a stop."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common.address import Address, parse_address
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.storage import store
from tests.conftest import KINDS, picture
from tests.support import object_stores

OPTIONS = PackConfig(short_side=40, shard_size="7")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_stores.moto("packs") as address:
        yield address


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    base = tmp_path_factory.mktemp("images")
    for split, count in (("train", 30), ("val", 8)):
        for number in range(count):
            file = base / split / f"class {number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(KINDS["plain.jpg"](picture(50, 50 + number, number)))
    (base / "train/class 0/broken.jpg").write_bytes(KINDS["plain.jpg"](picture(50, 50))[:-90])
    return DataConfig(str(base))


@pytest.fixture(scope="module")
def on_disk(images: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pack(images, dst := tmp_path_factory.mktemp("packs") / "pack", OPTIONS, workers=2)
    return dst


def objects(address: str) -> dict[str, bytes]:
    folder = parse_address(address, "address")
    return {name: store.read(folder / name) for name, _ in store.list_below(folder)}


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pack_in_a_bucket_is_that_on_a_disk_also_after_a_stop(
    bucket: str, images: DataConfig, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = store.write

    def counted(address: Address, data: bytes | Path) -> None:
        written.append(str(address))
        write(address, data)

    def stopped(address: Address, data: bytes | Path) -> None:
        if len(written) == 6:
            raise KeyboardInterrupt  # as by a user; a kill leaves no less
        counted(address, data)

    dst = parse_address(f"{bucket}/deep/pack", "DST")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "write", stopped)
        pack(images, dst, OPTIONS, workers=2)
    assert not objects(str(dst)).keys() & {"manifest.json"}
    with pytest.raises(UserError, match="is a pack that is not finished"):
        open_catalog(DataConfig(str(dst)), "train")
    with pytest.raises(UserError, match="--short-side was 40, now None"):
        pack(images, dst, PackConfig(shard_size="7"), workers=2)
    done = [name for name in written if name.endswith(".tar")]
    assert len(done) > 1
    with monkeypatch.context() as patch:
        written.clear()
        patch.setattr(store, "write", counted)
        pack(images, dst, OPTIONS, workers=1)
        assert not set(done[:-1]) & set(written)
        again = len(written)
        assert pack(images, dst, OPTIONS, workers=1)[0]["splits"]["train"]["images"] == 30
        assert len(written) == again  # it was there already
    assert objects(str(dst)) == files(on_disk)
    assert objects(f"{bucket}/deep/pack.partial") == {}


def test_a_pack_is_made_from_one_in_a_bucket(bucket: str, on_disk: Path, tmp_path: Path) -> None:
    source = object_stores.upload(on_disk, f"{bucket}/source")
    smaller = PackConfig(short_side=20, shard_size="7")
    pack(DataConfig(source), tmp_path / "from bucket", smaller, workers=2)
    pack(DataConfig(str(on_disk)), tmp_path / "from disk", smaller, workers=2)
    assert files(tmp_path / "from bucket") == files(tmp_path / "from disk")


@pytest.mark.parametrize(
    ("dst", "why"),
    [
        ("https://host/pack", "is on a web server"),
        ("s3://packs", "is a whole bucket"),
        ("BUCKET/foreign", r"holds notes\.txt and is no pack"),
    ],
)
def test_nothing_foreign_is_written_over(dst: str, why: str, bucket: str, images: DataConfig) -> None:
    store.write(parse_address(f"{bucket}/foreign/notes.txt", "address"), b"mine")
    with pytest.raises(UserError, match=why):
        pack(images, parse_address(dst.replace("BUCKET", bucket), "DST"), OPTIONS, workers=1)
