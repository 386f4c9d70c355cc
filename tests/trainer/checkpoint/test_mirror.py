"""A run's mirror: all of a checkpoint or nothing, whatever becomes of the mirror, of the process or of the run folder."""

import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_pipeline.bench.range_server import RangeServer
from data_pipeline.common.address import parse_address
from data_pipeline.common.errors import UserError
from data_pipeline.sources.storage import store as objects
from tests.end_to_end.test_faults import fill, mounted
from tests.support import object_stores
from tests.support.object_stores import SECRET
from tests.support.runs import tree
from tests.trainer.checkpoint.test_store import put
from trainer.checkpoint import mirror as mirroring
from trainer.checkpoint.manifest import Stamp, fault, write_stamped
from trainer.checkpoint.mirror import Mirror, copy_rest, grace_s
from trainer.checkpoint.mirror_restore import Mirrored
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store

NAME = "lr lr=0.5,ünicode %41 #1"
CONFIG = "run: {name: first}\n"


def writer(step: int, size: int = 200_000) -> Callable[[Path], dict[str, Stamp]]:
    names = ("model.safetensors", "training.pt")
    return lambda folder: {name: write_stamped(folder / name, bytes([step]) * size) for name in names}


def save(store: Store, step: int, best: bool = False, size: int = 200_000) -> None:
    put(store, Progress(step), writer(step, size), best)
    with (store.folder.parent / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps({"step": step}) + "\n")


def new_run(folder: Path, keep: int = 2) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "wandb_id.txt").write_text("abc\n")
    return Store(folder, keep)


def same(saved: str) -> tuple[str, str] | None:
    return None if saved == CONFIG else ("optim.lr was 1, now 2", "repeat them")


class Copying:
    """A mirror of a run whose lines are kept."""

    def __init__(self, place: Path | str, store: Store, name: str = NAME, claim: bool = True) -> None:
        self.lines: list[str] = []
        mirrored = Mirrored(str(place), name, store)
        if claim:
            mirrored.claim()
        mirrored.record()
        self.mirror = Mirror(mirrored, store, self.lines.append, lambda *texts: self.lines.append(": ".join(texts)))

    def __enter__(self) -> Mirror:
        return self.mirror.__enter__()

    def __exit__(self, *failure: object) -> None:
        self.mirror.__exit__(None, None, None)


def mirrored(place: Path | str, store: Store) -> list[str]:
    """Copy all of it. Returns the lines that it says."""
    with (copying := Copying(place, store)):
        pass
    return copying.lines


def restore(place: Path | str, store: Store, name: str = NAME) -> None:
    Mirrored(str(place), name, store).restore(same)


def wait_for(holds: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_stores.moto("runs") as address:
        yield address


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """A store on loopback whose faults can be chosen; it has the bucket `b`."""
    monkeypatch.setattr(objects, "_CLIENT", {"connect_timeout": "1s", "read_timeout": "1s", "timeout": "2s"})
    monkeypatch.setattr(objects, "PATIENCE_S", 0.5)
    monkeypatch.setattr(mirroring, "_FIRST_S", 0.05)
    monkeypatch.setattr(mirroring, "_LONGEST_S", 0.05)
    (tmp_path / "served/b").mkdir(parents=True)
    with object_stores.faulty(tmp_path / "served") as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A mirror on a disk, and one in a bucket."""
    if request.param == "folder":
        (tmp_path / "second disk").mkdir()
        return str(tmp_path / "second disk")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def there(place: str) -> dict[str, bytes]:
    """Files of the mirror."""
    if not place.startswith("s3"):
        return {name: data for name, data in tree(Path(place) / NAME).items() if isinstance(data, bytes)}
    root = parse_address(place, "place") / NAME
    return {name: objects.read(root / name) for name, _ in objects.list_below(root)}


def test_a_run_is_copied_and_restored(place: str, tmp_path: Path) -> None:
    """Best and last, rows and W&B's id; what the run folder keeps no longer, the mirror does not either."""
    store = new_run(tmp_path / "runs/first")
    with (copying := Copying(place, store)) as mirror:
        for step in (3, 6, 9, 12):
            save(store, step, best=step == 6)
            mirror.saved()
    assert copying.lines == [f"mirrored to {place}/{NAME}"]
    before = tree(store.folder.parent)
    files = there(place)
    assert {name.split("/")[1] for name in files if name.count("/") == 2} == {f"step-{n:08d}" for n in (6, 9, 12)}
    assert {n: d for n, d in files.items() if n.count("/") == 2} == {
        n: d for n, d in before.items() if n.count("/") == 2 and d
    }
    assert files["checkpoints/best"] == b"step-00000006\n", "as for who copies it by hand"

    shutil.rmtree(tmp_path / "runs")
    again = Store(tmp_path / "runs/first", keep=2)
    restore(place, again)
    assert tree(tmp_path / "runs/first") == before
    newest, best = again.newest(), again.chosen()
    assert newest and best and (newest.name, best.name) == ("step-00000012", "step-00000006")
    # Nothing is copied twice, and the same process that goes on may write again.
    assert mirrored(place, again) == [f"mirrored to {place}/{NAME}"]
    assert there(place).keys() == files.keys()


def test_a_folder_that_is_behind_is_brought_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a node that had the run before another one, or where the last checkpoint is damaged."""
    (tmp_path / "mirror").mkdir()
    store = new_run(tmp_path / "run")
    save(store, 3, best=True)
    mirrored(tmp_path / "mirror", store)
    shutil.copytree(tmp_path / "run", tmp_path / "old", symlinks=True)
    for step in (6, 9):
        save(store, step, best=step == 6)
    mirrored(tmp_path / "mirror", store)

    old = Store(tmp_path / "old")
    restore(tmp_path / "mirror", old)
    assert f"{tmp_path}/old is behind its mirror: restoring step 9 from " in capsys.readouterr().out
    assert tree(tmp_path / "old") == tree(tmp_path / "run")
    restore(tmp_path / "mirror", old)
    assert capsys.readouterr().out == "", "it has all of it"

    (store.folder / "step-00000009/training.pt").write_bytes(b"flipped")
    restore(tmp_path / "mirror", store)
    newest = store.newest()
    assert newest and newest.name == "step-00000009.1" and fault(newest) is None


@pytest.mark.parametrize("kind", ["503", "cut", "flip"])
def test_a_fault_that_passes_is_told_once(kind: str, server: RangeServer, tmp_path: Path) -> None:
    """Half of an answer, an error, a flipped bit on the way or there: it is copied again, and is the same in the end."""
    store, left = new_run(tmp_path / "run"), [3]
    save(store, 3, best=True)

    def fault(method: str, path: str) -> str | None:
        if "training.pt" not in path or not left[0] or (kind == "flip" and method != "PUT"):
            return None
        left[0] -= 1
        return kind

    with (copying := Copying("s3://b", store)):
        server.fault = fault
    assert left == [0]
    first, *rest = copying.lines
    assert first.startswith("not mirrored: ") and first.endswith("training goes on, and it is tried again")
    assert rest == [f"mirrored again to s3://b/{NAME}", f"mirrored to s3://b/{NAME}"]
    assert SECRET not in first
    shutil.rmtree(tmp_path / "run")
    restore("s3://b", store)
    newest = store.newest()
    assert newest and newest.name == "step-00000003"


def test_a_mirror_that_is_down_holds_nothing_up(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told now and then, the end waits a bounded time, and what is half copied is not restored."""
    monkeypatch.setattr(mirroring, "_REPEAT_S", 0.2)
    store = new_run(tmp_path / "run")
    save(store, 3)
    assert mirrored("s3://b", store) == [f"mirrored to s3://b/{NAME}"]
    with (copying := Copying("s3://b", store, claim=False)) as mirror:
        server.fault = lambda method, path: "503" if method == "PUT" and path.endswith("manifest.json") else None
        start_s = time.monotonic()
        save(store, 6, best=True)
        mirror.saved()
        assert time.monotonic() - start_s < 2
        wait_for(lambda: len(copying.lines) > 1)
        mirror.patience_s, end_s = 0.3, time.monotonic()
    assert time.monotonic() - end_s < 5
    said = [line.partition(":")[0] for line in copying.lines]
    most = 2 + (time.monotonic() - start_s) / 0.2
    assert said[:2] == ["not mirrored", "not mirrored"] and len(said) <= most, "one, and then at most one every 0.2 s"
    last = copying.lines[-1]
    assert last.startswith(f"not in the mirror s3://b/{NAME}: checkpoints/step-00000006, checkpoints/")
    assert last.endswith("; the same command copies it") and "answer 503" in last
    half = server.root / "b" / NAME / "checkpoints/step-00000006"
    assert (half / "training.pt").exists() and not (half / "manifest.json").exists()

    mirror._thread.join(60)  # its last attempt may be under way
    server.fault = lambda method, path: None
    shutil.copytree(tmp_path / "run", tmp_path / "kept", symlinks=True)
    shutil.rmtree(tmp_path / "run")
    restore("s3://b", store)
    newest = store.newest()
    assert newest and newest.name == "step-00000003"
    # The same command, where the run folder is still there: the rest is copied, also if nothing is left to train.
    kept = Store(tmp_path / "kept")
    copy_rest(Mirrored("s3://b", NAME, kept), kept)
    assert (half / "manifest.json").exists()


def test_a_slow_mirror_gets_whole_checkpoints(server: RangeServer, tmp_path: Path) -> None:
    """The run folder removes a checkpoint in the middle of its copy; then the newest is next, and none between."""
    store = new_run(tmp_path / "run", keep=1)
    save(store, 1)
    holding, go_on = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> str | None:
        if method == "PUT" and "step-00000001/training.pt" in path:
            holding.set()
            go_on.wait(60)
        return None

    server.fault = hold
    with (copying := Copying("s3://b", store)) as mirror:
        assert holding.wait(60)
        for step in range(2, 6):
            save(store, step)
            mirror.saved()
        assert not (store.folder / "step-00000001").exists()
        go_on.set()
        wait_for(lambda: (server.root / "b" / NAME / "checkpoints/last").exists())
    assert copying.lines == [f"mirrored to s3://b/{NAME}"]
    copied = {path.split("/")[4] for method, path, _ in server.seen if method == "PUT" and path.count("/") == 5}
    assert copied == {"step-00000001", "step-00000005"}


def test_a_signal_leaves_as_much_time_as_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert grace_s() == 25
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "110")
    assert grace_s() == 105


def test_a_full_disk_is_told_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirroring, "_LONGEST_S", 0.2)
    store = new_run(tmp_path / "run")
    with mounted(tmp_path / "a disk", "-t", "tmpfs", "-o", "size=20m", "none") as disk:
        with (copying := Copying(disk, store)) as mirror:
            save(store, 3, size=3_000_000)
            mirror.saved()
            wait_for(lambda: (disk / NAME / "checkpoints/last").exists())
            fill(disk)
            save(store, 6, size=3_000_000)
            mirror.saved()
            wait_for(lambda: copying.lines)
            assert copying.lines[0] == "not mirrored: No space left on device; training goes on, and it is tried again"
            (disk / "filler").unlink()
        assert copying.lines[1:] == [f"mirrored again to {disk}/{NAME}", f"mirrored to {disk}/{NAME}"]
        assert not list(disk.rglob(".partial*"))


def copy_for_ever(run: Path, place: Path, told: Connection) -> None:
    store = new_run(run)
    restore(place, store)
    with Copying(place, store) as mirror:
        for step in itertools.count(store.progress().step + 1):
            save(store, step, size=1_000_000)
            mirror.saved()
            told.send(step)


def test_killed_in_the_middle_of_copying(tmp_path: Path) -> None:
    """SIGKILL at four moments, each time with the run folder lost: what is restored is whole, and never older than before."""
    (tmp_path / "mirror").mkdir()
    fork, before = multiprocessing.get_context("fork"), 0
    for moment_s in (0.05, 0.1, 0.02, 0.15):
        told, tell = fork.Pipe(duplex=False)
        child = fork.Process(target=copy_for_ever, args=(tmp_path / "run", tmp_path / "mirror", tell))
        child.start()
        for _ in range(3):
            told.recv()
        time.sleep(moment_s)
        child.kill()
        child.join()
        shutil.rmtree(tmp_path / "run")
        store = Store(tmp_path / "run")
        restore(tmp_path / "mirror", store)
        newest = store.newest()
        assert (fault(newest) is None if newest else before == 0) and store.passed_over == {}
        assert store.progress().step >= before
        before = store.progress().step
    assert before > 0


# ---- whose mirror it is -----------------------------------------------------------------------------------------------


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    one, other = new_run(tmp_path / "one"), new_run(tmp_path / "other")
    save(one, 3)
    mirrored(tmp_path / "mirror", one)
    before = tree(tmp_path / "mirror")
    save(other, 9)
    line = rf"^run\.mirror: .* is that of another run than {other.folder.parent}; give another --run\.mirror or --run\.name$"
    with pytest.raises(UserError, match=line):
        restore(tmp_path / "mirror", other)
    # A mirror that was away when the run began.
    with (copying := Copying(tmp_path / "mirror", other, claim=False)):
        pass
    assert copying.lines[0].startswith("no longer mirrored: ") and "is that of another run" in copying.lines[0]
    assert copying.lines[-1].startswith(f"not in the mirror {tmp_path}/mirror/{NAME}: checkpoints/step-00000009")
    assert tree(tmp_path / "mirror") == before


def test_a_process_that_was_given_up_writes_no_more(tmp_path: Path) -> None:
    """Its machine had lost the network, and another one has restored the run and goes on."""
    (tmp_path / "mirror").mkdir()
    store = new_run(tmp_path / "run")
    save(store, 3)
    with (copying := Copying(tmp_path / "mirror", store)) as mirror:
        wait_for(lambda: (tmp_path / "mirror" / NAME / "checkpoints/last").exists())
        elsewhere = Store(tmp_path / "elsewhere")
        restore(tmp_path / "mirror", elsewhere)
        save(elsewhere, 6)
        assert mirrored(tmp_path / "mirror", elsewhere)
        before = tree(tmp_path / "mirror")
        save(store, 4)
        mirror.saved()
        wait_for(lambda: copying.lines)
    assert "was taken over by another process that trains the same run; training goes on" in copying.lines[0]
    assert tree(tmp_path / "mirror") == before


def test_other_options_restore_nothing(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    store = new_run(tmp_path / "run")
    save(store, 3)
    mirrored(tmp_path / "mirror", store)
    shutil.rmtree(tmp_path / "run")
    way_on = r"give that option as it was, or another --run\.name or --run\.mirror"
    words = rf"^run\.mirror: .* was started with other options \(optim\.lr was 1, now 2\); {way_on}$"
    with pytest.raises(UserError, match=words):
        Mirrored(str(tmp_path / "mirror"), NAME, store).restore(lambda saved: ("optim.lr was 1, now 2", "repeat them"))
    assert not (tmp_path / "run").exists()


def test_mistakes_are_told_before_the_first_step(server: RangeServer, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs/first")

    def said(place: str, name: str = NAME) -> str:
        with pytest.raises(UserError) as caught:
            mirrored = Mirrored(place, name, store)
            mirrored.restore(same)
            mirrored.claim()
        assert "\n" not in str(caught.value) and str(caught.value).startswith("run.mirror: ")
        return str(caught.value)

    assert "not mounted is no folder that is there; " in said(str(tmp_path / "not mounted"))
    assert "nothing can be written; give a folder" in said("http://127.0.0.1/b")
    store.folder.parent.mkdir(parents=True)
    assert "is where the run itself lies" in said(str(tmp_path / "runs"), "first")
    foreign = server.root / "b" / NAME / "notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    assert "holds notes.txt and is no mirror; give another place, or remove what is there" in said("s3://b")
    foreign.with_name("mirror.json").write_text("[]")
    assert "mirror.json is none of a mirror" in said("s3://b")
    server.fault = lambda method, path: "503"
    assert "answer 503" in said("s3://b") and "or leave run.mirror out to begin anew" in said("s3://b")
    assert list(store.folder.parent.iterdir()) == []
    save(new_run(store.folder.parent), 3)
    restore("s3://b", store)  # it can go on by itself, so nothing is refused


def test_damage_in_the_mirror_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mirror").mkdir()
    store = new_run(tmp_path / "run")
    for step in (3, 6):
        save(store, step)
    mirrored(tmp_path / "mirror", store)
    copies = tmp_path / "mirror" / NAME / "checkpoints"
    damaged = copies / "step-00000006/training.pt"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    shutil.rmtree(tmp_path / "run")
    restore(tmp_path / "mirror", store)
    assert f"passed over {copies}/step-00000006: training.pt does not match its checksum\n" in capsys.readouterr().out
    newest = store.newest()
    assert newest and newest.name == "step-00000003" and len(os.listdir(store.folder)) == 2

    shutil.rmtree(tmp_path / "run")
    outside = {"../../outside": {"bytes": 1, "sha256": ""}, "progress.json": {"bytes": 1, "sha256": ""}}
    (copies / "step-00000003/manifest.json").write_text(json.dumps(outside))
    with pytest.raises(UserError, match=r"^run\.mirror: no checkpoint in .* is whole; to begin anew give another"):
        restore(tmp_path / "mirror", store)
    assert "step-00000003: manifest.json is damaged\n" in capsys.readouterr().out


def test_damage_in_the_run_folder_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    store = new_run(tmp_path / "run")
    for step in (3, 6):
        save(store, step, best=step == 3)
    (store.folder / "step-00000003/training.pt").write_bytes(bytes(200_000))
    lines = mirrored(tmp_path / "mirror", store)
    why = f"{store.folder}/step-00000003: training.pt does not match its checksum"
    assert lines[0] == f"not mirrored: {why}" and len(lines) == 2
    assert lines[1].startswith(
        f"not in the mirror {tmp_path}/mirror/{NAME}: checkpoints/step-00000003, checkpoints/best;"
    )
    assert (tmp_path / "mirror" / NAME / "checkpoints/last").read_text() == "step-00000006\n"
