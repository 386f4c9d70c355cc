"""Packs in object stores: every image arrives whole or the run ends in one line, and the cache keeps its bounds."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.bench.range_server import RangeServer
from data_pipeline.common.address import Address
from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.pack.cli import PackConfig, pack
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.storage import block_cache, lookahead, objects, store
from data_pipeline.sources.storage.block_cache import BlockCache
from data_pipeline.sources.storage.credentials import s3_options
from data_pipeline.verify.cli import verify
from tests.conftest import KINDS, picture
from tests.support import object_stores
from tests.support.object_stores import SECRET

IMAGES = 40


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bucket `b`, which holds a pack of two shards and more."""
    base = tmp_path_factory.mktemp("images")
    for split, count in (("train", IMAGES), ("val", 4)):
        for number in range(count):
            file = base / split / f"class {number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(KINDS["plain.jpg"](picture(40, 50 + number, number)))
    root = tmp_path_factory.mktemp("buckets")
    pack(DataConfig(str(base)), root / "b/pack", PackConfig(shard_size="100KB"), workers=1)
    return root


@pytest.fixture
def server(buckets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A server without faults yet, small blocks, little patience and an empty cache."""
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "PATIENCE_S", 1.5)
    monkeypatch.setattr(store, "_FIRST_S", 0.01)
    monkeypatch.setattr(store, "_CLIENT", {"connect_timeout": "1s", "read_timeout": "300ms", "timeout": "2s"})
    for module in (block_cache, objects, lookahead):
        monkeypatch.setattr(module, "BLOCK", 8192)
    with object_stores.faulty(buckets) as server:
        server.stall_s = 0.6
        yield server


def local(buckets: Path) -> Catalog:
    return open_catalog(DataConfig(str(buckets / "b/pack")), "train")


def assert_whole(catalog: Catalog, wanted: Catalog) -> None:
    catalog.prefetch(np.arange(len(catalog)))
    assert catalog.paths == wanted.paths and catalog.labels.tolist() == wanted.labels.tolist()
    assert [catalog.read(row) for row in range(len(catalog))] == [wanted.read(row) for row in range(len(wanted))]


def googles_key(url: str, folder: Path) -> Path:
    """Key of an account that asks an emulator of Google's store for no token."""
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    fields = {"gcs_base_url": url, "private_key": private.decode(), "disable_oauth": True, "type": "service_account"}
    file = folder / "key.json"
    file.write_text(json.dumps({**fields, "client_email": "", "private_key_id": ""}))
    return file


def complaint(work: Callable[[], object]) -> str:
    """The one line of a mistake, which shows no secret."""
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
@pytest.mark.parametrize("scheme", ["s3", "http", "gs"])
def test_every_image_arrives_from_every_kind_of_store(
    scheme: str, cache_gb: float, server: RangeServer, buckets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(googles_key(server.url, tmp_path)))
    path = f"{server.url}/b/pack" if scheme == "http" else f"{scheme}://b/pack"
    catalog = open_catalog(DataConfig(path, cache_gb=cache_gb), "train")
    assert_whole(catalog, local(buckets))
    assert catalog.fingerprint() == local(buckets).fingerprint()
    asked = len(server.seen)
    assert_whole(catalog, local(buckets))
    assert (len(server.seen) == asked) == (cache_gb > 0)


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "stall"])
def test_a_fault_that_passes_costs_nothing_but_time(fault: str, server: RangeServer, buckets: Path) -> None:
    failed: set[str] = set()

    def once(method: str, path: str) -> str | None:
        if path in failed or "tar" not in path:
            return None
        failed.add(path)
        return fault

    catalog = open_catalog(DataConfig("s3://b/pack"), "train")
    server.fault = once
    assert_whole(catalog, local(buckets))
    assert len(failed) == len(catalog.shards) > 1


@pytest.mark.parametrize("fault", ["500", "cut", "stall"])
def test_a_fault_that_lasts_ends_in_a_line_with_the_objects_name(fault: str, server: RangeServer) -> None:
    loader = Loader(DataConfig("s3://b/pack", batch=8, size_px=16), seed=1)
    server.fault = lambda method, path: fault if path.endswith("000001.tar") else None
    assert complaint(lambda: list(loader)).startswith(
        "s3://b/pack/train/000001.tar: cannot be reached, after trying for "
    )


def test_an_object_replaced_in_mid_run_is_refused(server: RangeServer, buckets: Path) -> None:
    catalog = open_catalog(DataConfig("s3://b/pack"), "train")
    shard = buckets / "b/pack/train/000001.tar"
    os.utime(shard, ns=(1, time.time_ns()))
    first = int(np.flatnonzero(catalog.spans[:, 0] == 1)[0])
    assert complaint(lambda: catalog.read(first)).startswith("s3://b/pack/train/000001.tar: it was replaced since")
    assert_whole(open_catalog(DataConfig("s3://b/pack"), "train"), local(buckets))


def test_missing_credentials_are_told_at_once(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.url)  # where no machine of Amazon's answers
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
        store.forget_connections()
        told = complaint(lambda: open_catalog(DataConfig("s3://b/pack"), "train"))
        assert told.startswith("s3://b/pack/manifest.json: no credentials are found; set AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    store.forget_connections()
    assert len(open_catalog(DataConfig("s3://b/pack"), "train")) == IMAGES


def test_refused_credentials_and_wrong_addresses_are_told(server: RangeServer) -> None:
    assert "neither a pack nor" in complaint(lambda: open_catalog(DataConfig("s3://b/elsewhere"), "train"))
    assert "no manifest.json" in complaint(lambda: open_catalog(DataConfig(f"{server.url}/b/elsewhere"), "train"))
    server.fault = lambda method, path: "403"
    told = complaint(lambda: open_catalog(DataConfig("s3://b/pack"), "train"))
    assert told.startswith("s3://b/pack/manifest.json: access is refused (")


@pytest.mark.parametrize(
    ("names", "path", "told"),
    [
        (
            ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"],
            "",
            "FOLDER/ILSVRC2012_img_train.tar and others cannot",
        ),
        (
            ["set.zip"],
            "/set.zip",
            "FOLDER/set.zip cannot be read from a distance, where only packs and tar shards are;",
        ),
        (["data/train-00000-of-00001.parquet"], "", "FOLDER/data/train-00000-of-00001.parquet cannot"),
        (["train/cat/1.jpg", "train.csv"], "", "FOLDER/train.csv and others cannot be read from a distance"),
        (
            ["train-0.tar"],
            "/train-0.tar",
            "FOLDER/train-0.tar is one tar; give the address of the folder that it lies in, FOLD",
        ),
    ],
)
def test_what_is_read_on_a_disk_alone_is_told(
    names: list[str], path: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        (tmp_path / "b/set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b/set" / name).write_bytes(b"of any kind")
    with object_stores.faulty(tmp_path):
        line = complaint(lambda: open_catalog(DataConfig(f"s3://b/set{path}"), "train"))
    assert line.startswith(f"data.path: {told.replace('FOLDER', 's3://b/set').replace('FOLD', 's3')}")
    assert "ILSVRC" not in line or line.endswith(
        "pack the copy once: python -m data_pipeline.pack COPY s3://BUCKET/PACK"
    )


def test_a_pack_at_an_address_is_verified_as_a_copy(server: RangeServer) -> None:
    line = complaint(lambda: verify(DataConfig("s3://b/pack")))
    assert line.startswith("PATH: s3://b/pack is in an object store") and line.endswith(
        "copy it here, and give the copy"
    )


@pytest.mark.parametrize(
    "path", [f"https://me:{SECRET}@host/x", f"https://host/x?X-Amz-Signature={SECRET}", "s3://", "s3://b/../c"]
)
def test_an_address_with_a_secret_or_nowhere_is_refused(path: str) -> None:
    assert complaint(lambda: DataConfig(path)).startswith("data.path: ")


def test_credentials_come_from_the_files_of_the_aws_command(tmp_path: Path) -> None:
    with object_stores.environment("http://nowhere") as patch:
        assert s3_options() == {}
        (tmp_path / "credentials").write_text(f"[work]\naws_access_key_id = me\naws_secret_access_key = {SECRET}\n")
        (tmp_path / "config").write_text("[profile work]\nregion = eu-west-1\n")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        patch.setenv("AWS_PROFILE", "work")
        assert s3_options() == {"region": "eu-west-1"}  # the environment's own key goes before
        patch.delenv("AWS_ACCESS_KEY_ID")
        assert s3_options() == {"region": "eu-west-1", "access_key_id": "me", "secret_access_key": SECRET}
        patch.setenv("AWS_PROFILE", "other")
        assert complaint(s3_options).startswith("AWS_PROFILE: other is in neither")


# ---- ahead of the batches -------------------------------------------------------------------------------------------


def blocks_asked(server: RangeServer, count: int) -> list[tuple[str, int]]:
    """Wait for `count` requests of blocks, and a little for one too many. Object and block of each, in their order."""

    def asked() -> list[tuple[str, int]]:
        return [(path[-10:], int(span[6:].split("-")[0]) // 8192) for _, path, span in server.seen if span]

    until = time.monotonic() + 60
    while len(asked()) < count and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    return asked()


def first_uses(catalog: Catalog, order: list[int]) -> list[tuple[str, int]]:
    """Each block once, in the order in which images read in `order` first need it."""
    needed = [
        (catalog.shards[shard], block)
        for shard, offset, length in catalog.spans[order].tolist()
        for block in range(offset // 8192, (offset + length - 1) // 8192 + 1)
    ]
    return list(dict.fromkeys(needed))


def test_blocks_are_fetched_ahead_in_the_order_of_their_first_use(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookahead, "_AT_A_TIME", 1)
    catalog = open_catalog(DataConfig("s3://b/pack", cache_gb=13 * 8192 / 0.25 / 1e9), "train")
    order = np.random.default_rng(0).permutation(IMAGES)
    server.seen.clear()
    ahead = catalog.look_ahead(order[5:], np.arange(5, IMAGES))
    assert ahead
    wanted = first_uses(catalog, order[5:].tolist())
    assert blocks_asked(server, 13) == wanted[:13]  # the cache bears no more
    ahead.reach(20)
    wanted = wanted[: len(first_uses(catalog, order[5:20].tolist())) + 13]  # all of them, perhaps
    assert blocks_asked(server, len(wanted)) == wanted and len(wanted) > 13


def test_blocks_that_made_room_are_fetched_ahead_in_the_next_epoch(server: RangeServer, buckets: Path) -> None:
    catalog = open_catalog(DataConfig("s3://b/pack"), "train")
    assert_whole(catalog, local(buckets))
    assert catalog.objects
    gone = first_uses(catalog, list(range(IMAGES)))[::3]
    for name, block in gone:
        os.unlink(catalog.objects._path(catalog.shards.index(name), block))
    server.seen.clear()
    catalog.look_ahead(np.arange(IMAGES), np.arange(IMAGES))
    assert sorted(blocks_asked(server, len(gone))) == gone


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_processes_share_the_cache_and_fetch_each_block_once(server: RangeServer, buckets: Path) -> None:
    catalogs = [open_catalog(DataConfig("s3://b/pack"), "train") for _ in range(3)]  # as of three ranks
    server.seen.clear()
    server.delay_s = 0.01
    for catalog in catalogs:
        catalog.prefetch(np.arange(IMAGES))
    for catalog in catalogs:
        assert_whole(catalog, local(buckets))
    assert len(server.seen) == len(set(server.seen)) > 10


def test_the_least_recently_used_blocks_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlockCache(tmp_path, 100_000)
    paths = [f"{cache.folder_of(Address('s3:', 'b', str(number)), 'v')}/0" for number in range(120)]
    for number, path in enumerate(paths):
        assert cache.fetched(path, 1000, lambda number=number: b"%04d" % number * 250) == b"%04d" % number * 250  # type: ignore[misc]
        os.utime(path, (number, number + 1e9))
        cache._used.clear()
        assert cache.read(paths[0], 4, 4) == b"0000"  # in use all the time
    held = [number for number, path in enumerate(paths) if os.path.exists(path)]
    assert sum(os.path.getsize(paths[number]) for number in held) <= 100_000 and len(held) > 70
    assert held == [0, *range(120 - len(held) + 1, 120)]


def test_half_blocks_of_killed_processes_are_not_read_and_go(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1e6)
    path = f"{cache.folder_of(Address('s3:', 'b', 'x'), 'v')}/0"
    os.makedirs(os.path.dirname(path))
    for name, age_s in ((f"{path}.1.partial", 7200), (f"{path}.2.partial", 0)):
        Path(name).write_bytes(b"half")
        os.utime(name, (time.time() - age_s,) * 2)
    Path(path).write_bytes(b"cut")  # by a machine that lost its power
    assert cache.fetched(path, 6, lambda: b"abcdef") == b"abcdef" and cache.read(path, 2, 2) == b"cd"
    BlockCache(tmp_path, 1e6)
    assert not os.path.exists(f"{path}.1.partial") and os.path.exists(f"{path}.2.partial")
