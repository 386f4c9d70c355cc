"""Checkpoints are complete or not there, whenever the process dies and whatever the disk does."""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.loader import Cursor
from tests.support.runs import ROOT, tree
from trainer.checkpoint.manifest import Stamp, StateWriter, fault, write_stamped
from trainer.checkpoint.progress import Progress, read_progress
from trainer.checkpoint.run_folder import check_run, claim_run, record_run
from trainer.checkpoint.store import PARTIAL, Store

FILES = {"model.safetensors", "training.pt", "progress.json", "manifest.json"}


def progress(step: int) -> Progress:
    return Progress(step, Cursor(1, 12 * step), [1.5 * step, 0.1, 2.0, 3.0, 1e300], best_top1_pct=100 / 3)


def writer(step: int) -> StateWriter:
    """Two files, as an engine writes them."""
    names = ("model.safetensors", "training.pt")
    return lambda folder: {name: write_stamped(folder / name, content(step, name)) for name in names}


def content(step: int, name: str) -> bytes:
    return f"{name} of step {step}\n".encode() * 20_000


def save(store: Store, step: int, best: bool = False) -> None:
    put(store, progress(step), writer(step), best)


def put(store: Store, progress: Progress, write: StateWriter, best: bool = False) -> None:
    store.begin(progress.step)
    store.complete(progress, store.put(progress.step, write), best=best)


def assert_holds(store: Store, folder: Path | None, step: int) -> None:
    """The checkpoint is complete, and it is that of `step`."""
    assert folder is not None
    assert {file.name for file in folder.iterdir()} == FILES
    assert fault(folder) is None
    for name in ("model.safetensors", "training.pt"):
        assert (folder / name).read_bytes() == content(step, name)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.newest() is None and store.chosen() is None
    assert store.progress() == Progress(
        0, Cursor(0, 0), [], train_s=0.0, best_top1_pct=-1.0, skipped=[], finished=False
    )
    assert list(tmp_path.iterdir()) == []


def test_newest_best_and_the_rest(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    save(store, 3)
    assert_holds(store, store.chosen(), 3)
    save(store, 6, best=True)
    save(store, 9)
    save(store, 12)
    assert_holds(store, store.newest(), 12)
    assert_holds(store, store.chosen(), 6)
    assert Store(tmp_path).progress() == progress(12), "floats, sums and the cursor come back exactly"
    assert names(tmp_path) == ["best", "last", "step-00000006", "step-00000012"]
    assert os.readlink(tmp_path / "checkpoints/last") == "step-00000012", "a run folder may be moved"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert_holds(Store(moved), Store(moved).chosen(), 6)


def test_the_same_step_again_and_again(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    for times in range(4):
        put(store, progress(5), writer(100 + times), best=times == 1)
        assert_holds(store, store.newest(), 100 + times)
    assert_holds(store, store.chosen(), 101)
    assert len(names(tmp_path)) == 4, "last, best and their two folders"


def test_names_of_steps_do_not_touch(tmp_path: Path) -> None:
    """10 begins with 1, and 1000000010 with eight digits that are another step."""
    store = Store(tmp_path)
    for step in (1, 10, 100_000_001, 1_000_000_010):
        save(store, step)
        assert_holds(store, store.newest(), step)


# ---- a crash at every operation -------------------------------------------------------------------------------------

OPERATIONS = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync")


def traced(act: Callable[[], None], before: Callable[[int, str, Any], None]) -> None:
    """`act()`, with `before(n, name, argument)` ahead of its n-th operation on files."""
    count = 0

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if name != "open" or "w" in str(args[1:2]) or "w" in str(kwargs.get("mode")):
                count += 1
                before(count, name, args[0])
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(io, "open", wrap("open", io.open))
        act()


def dies_at(operation: int, act: Callable[[], None]) -> bool:
    """Run `act()` in a process that kills itself ahead of its n-th operation; False if it got through."""
    child = os.fork()
    if not child:
        try:
            traced(act, lambda n, name, argument: os.kill(os.getpid(), signal.SIGKILL) if n == operation else None)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("best", [False, True])
def test_death_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, best: bool) -> None:
    outcomes, operation, died = [], 0, True
    while died:
        operation += 1
        run = tmp_path / f"run {operation}"
        store = Store(run, keep=1)
        save(store, 3, best=True)
        save(store, 6)
        died = dies_at(operation, lambda store=store: save(store, 9, best))  # type: ignore[misc]

        store = Store(run, keep=1)
        step = store.progress().step
        assert step in (6, 9)
        assert_holds(store, store.newest(), step)
        chosen = store.chosen()
        assert_holds(store, chosen, 9 if best and chosen and chosen.name == "step-00000009" else 3)
        outcomes.append(step)

        assert store.passed_over == {}
        save(store, 9, best)  # what the resumed run does
        save(store, 12)
        assert_holds(store, store.newest(), 12)
        assert_holds(store, store.chosen(), 9 if best else 3)
        assert len(names(run)) == 4, "what the dead one left is cleared away"
    assert len(outcomes) > 15 and outcomes == sorted(outcomes) and set(outcomes) == {6, 9}


def test_everything_is_on_disk_before_it_is_pointed_to(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    save(store, 3)
    done: list[tuple[str, str]] = []

    def note(_: int, name: str, argument: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else argument
        done.append((name, Path(path).name))

    traced(lambda: save(store, 6), note)
    renamed, pointed = done.index(("rename", f"{PARTIAL}-00000006")), done.index(("replace", ".last"))
    synced = {at for name, at in done[:renamed] if name == "fsync"}
    assert synced == {*FILES, f"{PARTIAL}-00000006"}
    removed = min(at for at, (name, _) in enumerate(done) if name == "rmdir")
    assert renamed < pointed < done.index(("fsync", "checkpoints")) < removed, "the old one goes last"


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_the_last_ones_and_milestones_are_kept(tmp_path: Path) -> None:
    """Each epoch is saved in its middle and at its end."""
    store = Store(tmp_path, keep=3, keep_every=4)
    for epoch in range(1, 11):
        for step, cursor in ((2 * epoch - 1, Cursor(epoch - 1, 30)), (2 * epoch, Cursor(epoch))):
            put(store, Progress(step, cursor), writer(step), best=step == 2)
            held = [folder for folder in names(tmp_path) if folder.startswith("step-")]
            assert len(held) + 1 <= store.most(epoch), "the one being written is one more"
    kept = {int(name[5:]) for name in names(tmp_path) if name.startswith("step-")}
    assert kept == {2, 8, 16, 18, 19, 20}
    assert store.taken() == sum(len(file) for file in tree(tmp_path).values() if isinstance(file, bytes))


# ---- a checkpoint that is damaged ------------------------------------------------------------------------------------


def shorten(file: Path) -> str:
    os.truncate(file, file.stat().st_size // 2)
    return "manifest.json is damaged" if file.name == "manifest.json" else f"{file.name} has "


def flip_a_bit(file: Path) -> str:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    return "" if file.name == "manifest.json" else f"{file.name} does not match its checksum"


def remove(file: Path) -> str:
    file.unlink()
    return f"{file.name} is missing"


@pytest.mark.parametrize("damage", [shorten, flip_a_bit, remove])
@pytest.mark.parametrize("name", sorted(FILES))
def test_damaged_one_is_passed_over(damage: Callable[[Path], str], name: str, tmp_path: Path) -> None:
    store = Store(tmp_path, keep=3)
    for step in (3, 6, 9):
        save(store, step, best=step == 9)
    newest = store.newest()
    assert newest
    why = damage(newest / name)
    assert_holds(store, store.newest(), 6)
    assert list(store.passed_over) == [newest] and store.passed_over[newest].startswith(why)
    with pytest.raises(UserError, match=f"step-00000009 is damaged \\({why}"):
        store.chosen()
    before = tree(tmp_path)
    assert Store(tmp_path).progress().step == (9 if damage is flip_a_bit and name.endswith(("tensors", "pt")) else 6)

    for older in (6, 3):
        damage(tmp_path / f"checkpoints/step-{older:08d}" / name)
    with pytest.raises(UserError) as error:
        store.newest()
    assert str(error.value).startswith(
        f"run.dir: no checkpoint in {tmp_path / 'checkpoints'} is whole (step-00000009: {why}"
    )
    assert str(error.value).endswith("); restore one, or give another --run.dir to start anew")
    assert tree(tmp_path).keys() <= before.keys(), "looking at them changes nothing"


def test_every_bit_of_the_record_counts(tmp_path: Path) -> None:
    """Any bit of what says how far a run has come, and of what says which bytes are right."""
    store = Store(tmp_path)
    save(store, 3)
    newest = store.newest()
    assert newest
    for name in ("progress.json", "manifest.json"):
        whole = (newest / name).read_bytes()
        for bit in range(8 * len(whole)):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            (newest / name).write_bytes(content)
            assert fault(newest, thorough=False) or read_progress(newest) == progress(3)
            assert name == "manifest.json" or fault(newest, thorough=False)
        (newest / name).write_bytes(whole)
    assert fault(newest) is None


def test_what_came_after_a_damaged_one_is_the_newest(tmp_path: Path) -> None:
    """A run that went on from step 6 has saved step 7: the damaged step 9 is not newer, and goes."""
    store = Store(tmp_path, keep=2)
    for step in (3, 6, 9):
        save(store, step)
    flip_a_bit(tmp_path / "checkpoints/step-00000009/training.pt")
    assert_holds(store, store.newest(), 6)
    save(store, 7)
    assert names(tmp_path) == ["last", "step-00000006", "step-00000007"]
    assert_holds(store, Store(tmp_path).newest(), 7)


def stamp_of(text: str) -> dict[str, Any]:
    return {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def of_a_newer_version(checkpoint: Path) -> str:
    """With a field in progress.json that nobody here knows."""
    text = json.dumps({**json.loads((checkpoint / "progress.json").read_text()), "phase of the moon": 3})
    (checkpoint / "progress.json").write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "progress.json": stamp_of(text)}))
    return "progress.json says what this version of Sluice does not know"


def nested(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_text("[" * 200_000)
    return "manifest.json is damaged"


def huge(checkpoint: Path) -> str:
    os.truncate(checkpoint / "manifest.json", 100 << 30)  # sparse
    return "manifest.json is damaged"


def unreadable(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()
    return "manifest.json is damaged"


def a_file(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("junk")
    return "it is no folder"


def a_link_to_nothing(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to("nothing")
    return "it is no folder"


def a_circular_link(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(checkpoint.name)
    return "it is no folder"


def a_pipe(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")
    return "manifest.json is damaged"


@pytest.mark.parametrize(
    "spoil", [of_a_newer_version, nested, huge, unreadable, a_file, a_link_to_nothing, a_circular_link, a_pipe]
)
def test_junk_is_passed_over(spoil: Callable[[Path], str], tmp_path: Path) -> None:
    """It is named, it is not read, and it keeps no checkpoint from being written."""
    store = Store(tmp_path, keep=2)
    for step in (3, 6, 9):
        save(store, step, best=step == 6)
    why = spoil(tmp_path / "checkpoints/step-00000009")
    assert store.progress() == progress(6)
    assert store.taken() > 0
    assert_holds(store, store.newest(), 6)
    assert store.passed_over == {tmp_path / "checkpoints/step-00000009": why}
    store.prepare()
    for step in (9, 12, 15):
        save(store, step)
        assert_holds(store, store.newest(), step)
    assert_holds(store, store.chosen(), 6)


@pytest.mark.parametrize("name", ["last", "best"])
def test_links_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 3, best=True)
    link = tmp_path / "checkpoints" / name
    for target in (name, "../step-00000003/../elsewhere"):
        link.unlink()
        link.symlink_to(target)
        assert_holds(store, store.newest(), 3)
        assert_holds(store, store.chosen(), 3)
        assert store.progress() == progress(3)
    save(store, 6, best=True)
    assert os.readlink(link) == "step-00000006"


def test_checkpoints_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(UserError, match=r"run\.dir: cannot list .*checkpoints \(Too many levels of symbolic links\)"):
        Store(tmp_path).newest()


def test_a_removed_checkpoint_is_no_new_start(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    save(store, 3)
    shutil.rmtree(tmp_path / "checkpoints/step-00000003")
    with pytest.raises(UserError, match=r"is whole \(last points to nothing\); restore one, or give another --run.dir"):
        store.newest()


def test_stamps_are_those_of_the_bytes(tmp_path: Path) -> None:
    """Against the sums that `sha256sum` prints."""
    stamp = write_stamped(tmp_path / "a file", memoryview(content(1, "x")))
    theirs = subprocess.run(["sha256sum", tmp_path / "a file"], capture_output=True, text=True, check=True)
    assert stamp == Stamp((tmp_path / "a file").stat().st_size, theirs.stdout.split()[0])


# ---- a copy of the run folder -----------------------------------------------------------------------------------------


def with_folders(run: Path, to: Path) -> None:
    """As cp -rL, scp -r and rsync -L make it."""
    subprocess.run(["cp", "-rL", run, to], check=True)


def with_texts(run: Path, to: Path) -> None:
    """As archives make it that know no links."""
    shutil.copytree(run, to, symlinks=True)
    for link in (to / "checkpoints/last", to / "checkpoints/best"):
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)


def without_links(run: Path, to: Path) -> None:
    """As some object stores keep it."""
    shutil.copytree(run, to, symlinks=True)
    (to / "checkpoints/last").unlink()


@pytest.mark.parametrize("copy", [with_folders, with_texts, without_links])
def test_a_copied_run_goes_on(copy: Callable[[Path, Path], None], tmp_path: Path) -> None:
    run = tmp_path / "copied run"
    original = Store(tmp_path / "run", keep=2)
    for step in (3, 6, 9, 12):
        save(original, step, best=step == 6)
    copy(tmp_path / "run", run)
    store = Store(run, keep=2)
    assert_holds(store, store.newest(), 12)
    assert_holds(store, store.chosen(), 6)
    assert store.progress() == progress(12) and store.passed_over == {}
    store.prepare()
    save(store, 15)
    assert_holds(store, store.newest(), 15)
    assert_holds(store, store.chosen(), 6)
    save(store, 18, best=True)
    assert_holds(store, store.newest(), 18)
    assert_holds(store, store.chosen(), 18)
    assert names(run) == ["best", "last", "step-00000015", "step-00000018"], "as if it had not been copied"
    assert os.readlink(run / "checkpoints/last") == os.readlink(run / "checkpoints/best") == "step-00000018"


def test_a_copy_of_last_and_best_alone_goes_on(tmp_path: Path) -> None:
    original = Store(tmp_path / "run", keep=2)
    for step in (3, 6, 9):
        save(original, step, best=step == 6)
    run = tmp_path / "copied run"
    for link in ("last", "best"):
        shutil.copytree(tmp_path / "run/checkpoints" / link, run / "checkpoints" / link)
    store = Store(run, keep=2)
    assert_holds(store, store.newest(), 9)
    assert_holds(store, store.chosen(), 6)
    save(store, 12)
    assert names(run) == ["best", "last", "step-00000009", "step-00000012"]
    flip_a_bit(run / "checkpoints/step-00000012/training.pt")
    assert_holds(store, store.newest(), 9)
    assert_holds(store, store.chosen(), 6)


# ---- a disk that is full ---------------------------------------------------------------------------------------------


def test_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 3)
    before = tree(tmp_path)
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, room[1]))
    try:
        with pytest.raises(UserError) as error:
            save(store, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    why = os.strerror(errno.EFBIG)
    assert str(error.value) == (
        f"run.dir: cannot write step 6 to {tmp_path / 'checkpoints'} ({why}); "
        "make room, and the same command goes on from the checkpoint before"
    )
    assert_holds(store, store.newest(), 3)
    assert {name: value for name, value in tree(tmp_path).items() if PARTIAL not in name} == before
    save(store, 6)
    assert_holds(store, store.newest(), 6)


# ---- the run folder ---------------------------------------------------------------------------------------------------


def same(saved: str) -> tuple[str, str] | None:
    return None


def test_run_folder_is_made_and_recorded(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a run"
    check_run(run, same)
    assert not run.exists(), "checking writes nothing"
    record_run(run, "run: {}\n")
    assert tree(run) == {"config.yaml": b"run: {}\n"}
    check_run(run, same)
    record_run(run, "run: {max_steps: 3}\n")
    assert tree(run) == {"config.yaml": b"run: {max_steps: 3}\n"}


def test_death_while_recording_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    operation, died = 0, True
    while died:
        operation += 1
        run = tmp_path / f"run {operation}"
        died = dies_at(operation, lambda run=run: record_run(run, "run: {}\n"))  # type: ignore[misc]
        check_run(run, same)
        record_run(run, "run: {}\n")
        assert tree(run) == {"config.yaml": b"run: {}\n"}
    assert operation > 3


def test_an_empty_folder_may_be_a_run(tmp_path: Path) -> None:
    check_run(tmp_path, same)


def test_other_options_are_refused(tmp_path: Path) -> None:
    record_run(tmp_path, "old\n")
    with pytest.raises(UserError) as error:
        check_run(tmp_path, lambda saved: (f"optim.lr was {saved.strip()}, now 1.0", "repeat them to resume"))
    assert str(error.value) == (
        f"run.dir: {tmp_path} was started with other options (optim.lr was old, now 1.0); repeat them to resume"
    )
    assert tree(tmp_path) == {"config.yaml": b"old\n"}


@pytest.mark.parametrize("name", ["photo.jpg", ".git", "checkpoints/last"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(UserError, match=r"is in use and holds no run; give another --run\.dir"):
        check_run(tmp_path, same)
    with pytest.raises(UserError, match="is in use and holds no run"):
        check_run(file, same)
    assert tree(tmp_path)[name] == b"precious"


@pytest.mark.parametrize("place", ["FILE/run", "/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    run = Path(place.replace("FILE", str(tmp_path / "file")))
    check_run(run, same)
    with pytest.raises(UserError, match=rf"run\.dir: cannot write to {run} \(.+\); give another --run\.dir"):
        record_run(run, "run: {}\n")


def start(run: Path, config: str) -> int:
    """Start in a process of its own; its exit code is 0 if it may train, 2 if it is refused."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with claim_run(run):
                check_run(run, lambda saved: None if saved == config else ("optim.lr was another", "give another"))
                record_run(run, config)
                time.sleep(0.05)
            code = 0
        except UserError:
            code = 2
        finally:
            os._exit(code)
    return child


@pytest.mark.parametrize("folder", ["run", "runs/of mine/run"])
def test_starts_at_once(tmp_path: Path, folder: str) -> None:
    """One of them trains, and its configuration is what stands there; the others have changed nothing."""
    for number in range(8):
        run = tmp_path / str(number) / folder
        starts = {start(run, f"run: {{seed: {seed}}}\n"): seed for seed in range(4)}
        ends = {seed: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, seed in starts.items()}
        assert sorted(ends.values()) == [0, 2, 2, 2]
        winner = min(ends, key=lambda seed: ends[seed])
        assert tree(run) == {"config.yaml": f"run: {{seed: {winner}}}\n".encode()}


def test_a_run_is_claimed_by_one_process_at_a_time(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer.checkpoint.run_folder import claim_run\n"
        "with claim_run(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with claim_run(tmp_path):
        other = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert "UserError: run.dir: another process trains in" in other.stderr
        check_run(tmp_path, same)
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "deep" / "run"
    with pytest.raises(UserError), claim_run(run):
        raise UserError("data.path: it holds other images")
    assert tree(tmp_path) == {}
    record_run(run, "run: {}\n")
    with pytest.raises(UserError), claim_run(run):
        raise UserError("data.path: it holds other images")
    assert tree(run) == {"config.yaml": b"run: {}\n"}


def test_a_lock_left_by_a_kill_is_no_obstacle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text("")
    with claim_run(run):
        check_run(run, same)
        record_run(run, "run: {}\n")
    assert tree(run) == {"config.yaml": b"run: {}\n"}
