"""Datasets by name, in the true layout of their archives: downloaded by torchvision from a server of our own."""

import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets  # type: ignore[import-untyped]

from data_pipeline.common.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources import torchvision_sets
from data_pipeline.sources.builtin import make_once
from data_pipeline.sources.catalog import Catalog, open_catalog
from data_pipeline.sources.quarantine import quarantined, relative_to_data
from data_pipeline.sources.torchvision_sets import NAMED, dataset_root
from data_pipeline.verify.cli import verify
from tests.conftest import KINDS, ROOT, picture

WITHOUT_SCIPY = sorted(NAMED.keys() - {"flowers102"})
Archive = dict[str, bytes]
"""Contents of a tar by the names of its members."""
Patches = dict[str, dict[str, object]]
"""Attributes of torchvision's classes: JSON can carry them to another process."""


# The archives


def jpeg(seed: int) -> bytes:
    return KINDS["plain.jpg"](picture(20 + seed % 5, 30, seed))


def imagenette() -> Archive:
    wnids = datasets.Imagenette._WNID_TO_CLASS
    return {
        f"imagenette2-320/{split}/{wnid}/{wnid}_{number}.JPEG": jpeg(10 * label + number)
        for split, numbers in (("train", (1, 10, 2)), ("val", (3,)))
        for label, wnid in enumerate(wnids)
        for number in numbers
    }


def cifar10() -> Archive:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    rng = np.random.default_rng(0)
    members: dict[str, object] = {"batches.meta": {"label_names": names, "num_vis": 3072}}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        labels = rng.permutation(np.repeat(np.arange(10), 2)).tolist()
        members[name] = {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": labels}
    return {f"cifar-10-batches-py/{name}": pickle.dumps(value) for name, value in members.items()}


def flowers102() -> dict[str, Archive | bytes]:
    matlab = pytest.importorskip("scipy.io")

    def mat(**arrays: list[int]) -> bytes:
        stream = io.BytesIO()
        matlab.savemat(stream, arrays, do_compression=True)
        return stream.getvalue()

    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 103), 4))
    ids = {int(label): (np.flatnonzero(labels == label) + 1).tolist() for label in np.unique(labels)}
    places = {"trnid": (0, 1), "valid": (2,), "tstid": (3,)}
    parts = {key: [ids[label][at] for label in ids for at in ats] for key, ats in places.items()}
    return {
        "102flowers.tgz": {f"jpg/image_{number:05d}.jpg": jpeg(number) for number in range(1, len(labels) + 1)},
        "imagelabels.mat": mat(labels=labels.tolist()),
        "setid.mat": mat(**parts),
    }


def oxford_pets() -> dict[str, Archive | bytes]:
    breeds = ["Abyssinian", "american_bulldog", "american_pit_bull_terrier", "Bengal"]
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    images: Archive = {}
    for label, breed in enumerate(breeds, 1):
        for number, part in ((1, "test"), (100, "trainval"), (11, "trainval"), (2, "test")):
            lists[part].append(f"{breed}_{number} {label} {2 - breed[0].isupper()} {label}\n")
            images[f"images/{breed}_{number}.jpg"] = jpeg(7 * label + number)
    notes = {f"annotations/{part}.txt": "".join(lines).encode() for part, lines in lists.items()}
    trimap = {"annotations/trimaps/Bengal_1.png": KINDS["grayscale.png"](picture(8, 8))}
    return {"images.tar.gz": images, "annotations.tar.gz": {**notes, **trimap}}


def food101() -> Archive:
    members: Archive = {"food-101/meta/classes.txt": b"apple_pie\nbaby_back_ribs\nwaffles\n"}
    for part, numbers in (("train", (1005649, 1014775, 23893)), ("test", (1011328,))):
        table = {
            name: [f"{name}/{number}" for number in numbers] for name in ("waffles", "apple_pie", "baby_back_ribs")
        }
        members[f"food-101/meta/{part}.json"] = json.dumps(table).encode()
        for at, path in enumerate(path for paths in table.values() for path in paths):
            members[f"food-101/images/{path}.jpg"] = jpeg(at + len(part))
    return members


# The server


class Server(ThreadingHTTPServer):
    """Serves a folder on the loopback and remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.requests: list[str] = []
        self.halting, self.halted = False, threading.Event()
        self.going_on = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error here."""

    def offer(self, name: str, content: Archive | bytes) -> tuple[str, str]:
        """Serve a file, or a gzipped tar: its address and checksum."""
        if isinstance(content, dict):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w:gz") as tar:
                for path, data in content.items():
                    info = tarfile.TarInfo(path)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            content = stream.getvalue()
        (self.folder / name).write_bytes(content)
        return self.url + name, hashlib.md5(content).hexdigest()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_request(self, code: object = "-", size: object = "-") -> None:
        self.server.requests.append(self.path.lstrip("/"))

    def log_message(self, *_: object) -> None: ...

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """The file, with a halt in the middle if there shall be one."""
        data = source.read()
        half = len(data) // 2 if self.server.halting else len(data)
        outputfile.write(data[:half])
        outputfile.flush()
        if self.server.halting:
            self.server.halted.set()
            self.server.going_on.wait(30)
        outputfile.write(data[half:])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Beside an empty cache."""
    (tmp_path / "served").mkdir()
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / 'a "cache"'))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.going_on.set()
        server.shutdown()


def patches(name: str, server: Server) -> Patches:
    """Offer a dataset, and make torchvision look for it there."""
    if name == "imagenette":
        return {"Imagenette": {"_ARCHIVES": {"320px": server.offer("imagenette2-320.tgz", imagenette())}}}
    if name == "cifar10":
        archive = cifar10()
        url, md5 = server.offer("cifar-10-python.tar.gz", archive)
        sums = {path.split("/")[1]: hashlib.md5(data).hexdigest() for path, data in archive.items()}
        meta = {"filename": "batches.meta", "key": "label_names", "md5": sums.pop("batches.meta")}
        train = [(batch, sums[batch]) for batch in sums if batch != "test_batch"]
        test = [("test_batch", sums["test_batch"])]
        return {"CIFAR10": {"url": url, "tgz_md5": md5, "train_list": train, "test_list": test, "meta": meta}}
    if name == "flowers102":
        sums = {file: server.offer(file, content)[1] for file, content in flowers102().items()}
        kinds = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
        files = {kind: (file, sums[file]) for kind, file in kinds.items()}
        return {"Flowers102": {"_download_url_prefix": server.url, "_file_dict": files}}
    if name == "oxford_pets":
        return {"OxfordIIITPet": {"_RESOURCES": [server.offer(*item) for item in oxford_pets().items()]}}
    url, md5 = server.offer("food-101.tar.gz", food101())
    return {"Food101": {"_URL": url, "_MD5": md5}}


def serve(name: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> Patches:
    found = patches(name, server)
    for dataset, attributes in found.items():
        for attribute, value in attributes.items():
            monkeypatch.setattr(getattr(datasets, dataset), attribute, value)
    return found


def start(name: str, found: Patches) -> "subprocess.Popen[str]":
    """Another process that opens the dataset and prints where it is, or what is wrong."""
    program = (
        "import json, sys; from torchvision import datasets; from data_pipeline.config import DataConfig\n"
        "for dataset, attributes in json.loads(sys.argv[2]).items():\n"
        "    for item in attributes.items(): setattr(getattr(datasets, dataset), *item)\n"
        "from data_pipeline.sources.torchvision_sets import dataset_root; print(dataset_root(DataConfig(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, name, json.dumps(found)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cached() -> list[str]:
    return sorted(os.listdir(Path(os.environ["SLUICE_CACHE"], "datasets")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pixels(catalog: Catalog, row: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(catalog.read(row))).convert("RGB"))


# What is in it


SPLITS: dict[str, dict[str, dict[str, object]]] = {
    "imagenette": {"train": {"split": "train", "size": "320px"}, "val": {"split": "val", "size": "320px"}},
    "cifar10": {"train": {"train": True}, "val": {"train": False}},
    "flowers102": {"train": {"split": "train"}, "val": {"split": "val"}},
    "oxford_pets": {"train": {"split": "trainval"}, "val": {"split": "test"}},
    "food101": {"train": {"split": "train"}, "val": {"split": "test"}},
}


@pytest.mark.parametrize("name", NAMED)
def test_samples_are_torchvisions(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    [(dataset, _)] = serve(name, server, monkeypatch).items()
    (tmp_path / "reference").mkdir()
    classes: list[str] | None = None
    for split, arguments in SPLITS[name].items():
        theirs = getattr(datasets, dataset)(tmp_path / "reference", download=True, **arguments)
        names = [entry if isinstance(entry, str) else entry[0] for entry in theirs.classes]
        capfd.readouterr()
        ours = open_catalog(DataConfig(name), split, classes)
        classes = ours.classes
        assert classes == sorted(names) and ours.bad == {}
        assert len(ours) == len(theirs) > 0
        for row, (image, label) in enumerate(theirs):
            assert classes[ours.labels[row]] == names[label]
            assert np.array_equal(pixels(ours, row), np.asarray(image)), ours.paths[row]
        said = capfd.readouterr().err
        root = Path(os.environ["SLUICE_CACHE"], "datasets", name)
        assert said == (f"Fetching {name}, once, into {root}\n" if split == "train" else "")
    assert ours.root == root and not [*root.rglob("*gz"), *root.rglob("*batch*")]
    assert cached() == [name, f"{name}.lock"]


def test_a_folder_of_that_name_goes_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve("food101", server, monkeypatch)
    for split in ("train", "val"):
        (tmp_path / "food101" / split / "a").mkdir(parents=True)
        (tmp_path / "food101" / split / "a" / "x.jpg").write_bytes(jpeg(0))
    monkeypatch.chdir(tmp_path)
    assert open_catalog(DataConfig("food101"), "val").paths == ["a/x.jpg"]
    assert server.requests == []


def test_what_is_in_the_cache_is_not_fetched_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve("oxford_pets", server, monkeypatch)
    table = dataset_root(DataConfig("oxford_pets"))
    before, requests = contents(table.parent), len(server.requests)
    server.shutdown()
    Path(f"{table.parent}.lock").unlink()
    assert dataset_root(DataConfig("oxford_pets")) == table
    assert (contents(table.parent), len(server.requests)) == (before, requests)
    assert cached() == ["oxford_pets"]


def test_verify_and_quarantine_know_it(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve("food101", server, monkeypatch)
    table = dataset_root(DataConfig("food101"))
    damaged = "food-101/images/waffles/1011328.jpg"
    (table.parent / damaged).write_bytes(b"no image")
    outcome = verify(DataConfig("food101"), workers=1)
    assert (outcome.images, [fault.path for fault in outcome.faults]) == (12, [damaged])
    (tmp_path / "list").write_text("food-101/images/waffles/23893.jpg\n")
    cfg = DataConfig("food101", quarantine=str(tmp_path / "list"))
    catalog = open_catalog(cfg, "train")
    assert catalog.bad == {"food-101/images/waffles/23893.jpg": "in quarantine"}
    assert {relative_to_data(cfg, catalog.root, path) for path in catalog.bad} == quarantined(cfg, catalog.root)


# What may go wrong


def complaint(name: str) -> str:
    with pytest.raises(UserError) as caught:
        open_catalog(DataConfig(name), "train")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", WITHOUT_SCIPY)
def test_a_wrong_checksum_is_refused(name: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(name, server, monkeypatch)
    for archive in server.folder.iterdir():
        archive.write_bytes(archive.read_bytes() + b"\0")
    says = rf"data\.path: {name} cannot be fetched \(File not found or corrupted\); .* give a folder with its images"
    assert re.fullmatch(says, complaint(name))
    assert cached() == [f"{name}.lock"]
    serve(name, server, monkeypatch)
    assert len(open_catalog(DataConfig(name), "train")) > 0


def test_an_address_that_is_gone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve("food101", server, monkeypatch)
    (server.folder / "food-101.tar.gz").unlink()
    assert "food101 cannot be fetched (HTTP Error 404: File not found); " in complaint("food101")


def test_a_server_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve("food101", server, monkeypatch)
    server.shutdown()
    server.server_close()
    assert "food101 cannot be fetched (Connection refused); " in complaint("food101")
    monkeypatch.setattr(datasets.Food101, "_URL", "http://nowhere.invalid/food-101.tar.gz")
    assert re.search(r"food101 cannot be fetched \(.*[Nn]ame.*\); ", complaint("food101"))


def test_a_server_that_says_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_sets, "_PATIENCE_S", 0.2)
    serve("food101", server, monkeypatch)
    server.halting = True
    assert "food101 cannot be fetched (timed out); " in complaint("food101")


def test_flowers_need_scipy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_sets, "find_spec", lambda _: None)
    assert complaint("flowers102").endswith("pip install scipy")
    assert cached() == ["flowers102.lock"]


# Several processes


def test_two_processes_download_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = serve("cifar10", server, monkeypatch)
    processes = [start("cifar10", found) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    table = Path(os.environ["SLUICE_CACHE"], "datasets/cifar10/labels.csv")
    assert [output for output, _ in outputs] == [f"{table}\n"] * 2
    assert sorted(error for _, error in outputs) == ["", f"Fetching cifar10, once, into {table.parent}\n"]
    together = server.requests.copy()
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "another"))
    alone = dataset_root(DataConfig("cifar10")).parent
    assert together * 2 == server.requests != []
    assert contents(alone) == contents(table.parent)


def test_a_killed_download_starts_over(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    found = serve("imagenette", server, monkeypatch)
    server.halting = True
    process = start("imagenette", found)
    partly = Path(os.environ["SLUICE_CACHE"], "datasets")
    assert server.halted.wait(60)
    # The first request only asks whether the address has moved: wait for the one that is written to a file.
    while not any(partly.glob("imagenette.partial-*/*.tgz")) and process.poll() is None:
        server.going_on.wait(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (partly / "imagenette").exists() and len(cached()) == 2
    server.halting = False
    assert len(open_catalog(DataConfig("imagenette"), "train")) == 30
    assert cached() == ["imagenette", "imagenette.lock"]


def test_who_waits_shares_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever comes later tries again."""
    folder, waiting, flock = tmp_path / "set", threading.Event(), fcntl.flock
    attempts: list[Path] = []
    others: list[threading.Thread] = []
    messages: list[str] = []

    def spy(file: Any, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            waiting.set()
        flock(file, operation)

    def fail(into: Path) -> None:
        attempts.append(into)
        other = threading.Thread(target=wait)
        other.start()
        others.append(other)
        assert waiting.wait(30)
        raise UserError("no network ü")

    def wait() -> None:
        with pytest.raises(UserError) as caught:
            make_once(folder, fail)
        messages.append(str(caught.value))

    monkeypatch.setattr(fcntl, "flock", spy)
    with pytest.raises(UserError, match="no network ü"):
        make_once(folder, fail)
    others[0].join(30)
    assert (messages, len(attempts)) == (["no network ü"], 1)
    assert make_once(folder, lambda into: (into / "x").touch()) == folder
    assert [file.name for file in folder.iterdir()] == ["x"]


def test_without_a_common_lock_the_first_to_finish_wins(tmp_path: Path) -> None:
    """Another machine then removes what this one has begun."""
    folder = tmp_path / "set"

    def overtaken(_: Path) -> None:
        folder.mkdir()
        raise UserError("cannot be fetched (No such file or directory)")

    assert make_once(folder, overtaken) == folder
    assert sorted(os.listdir(tmp_path)) == ["set", "set.lock"]
