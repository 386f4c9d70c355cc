"""Checkpoints are written while training goes on, all of a checkpoint or nothing, by processes that die and disks that fail."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.common.errors import UserError
from data_pipeline.loader import Cursor
from tests.support import warm
from tests.support.runs import ROOT, SOLO, environment
from trainer.checkpoint.async_writer import Saver, check_room
from trainer.checkpoint.manifest import Stamp, StateWriter, fault, write_stamped
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store
from trainer.distributed import DistContext
from trainer.engine.checkpoint_size import checkpoint_bytes
from trainer.engine.config import Compression, EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.model.normalize import Normalise
from trainer.model.resnet import ModelConfig, build_resnet
from trainer.optim.optimizer import OptimConfig
from trainer.session import Session


def ignore(line: str) -> None:
    """A listener that hears nothing."""


def saver(run: Path, ctx: DistContext = SOLO, tell: Callable[[str], None] = ignore) -> Saver:
    return Saver(Store(run, keep=1), ctx, Progress(), tell)


def progress(step: int) -> Progress:
    return Progress(step, Cursor(0, step), [0.5], best_top1_pct=step / 3)


def writer(step: int, rank: int = 0, size: int = 1000) -> StateWriter:
    content = bytes([step]) * size
    return lambda folder: {f"part-{rank}": write_stamped(folder / f"part-{rank}", content)}


@contextmanager
def no_room() -> Iterator[None]:
    """Files of at most 100 bytes, for this process."""
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, room[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)


# ---- one process -----------------------------------------------------------------------------------------------------


def test_training_goes_on_and_sees_all_or_nothing(tmp_path: Path) -> None:
    """A named pipe holds the writer up for as long as the test likes."""
    one, store = saver(tmp_path), Store(tmp_path)
    one.start(progress(3), writer(3), best=True)
    assert one.wait() is None and one.saved == progress(3)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def slow(folder: Path) -> dict[str, Stamp]:
        stamps = writer(6)(folder)
        pipe.read_bytes()
        return stamps

    one.start(progress(6), slow, best=False)
    figures = {"perf/ckpt_write_s", "perf/ckpt_failed"}
    assert one.take_scalars().keys() == figures, "of the first, which no row has told before the second began"
    assert one.take_scalars() == {}
    assert store.newest() == tmp_path / "checkpoints/step-00000003" and one.saved == progress(3)
    pipe.write_bytes(b"go on")
    assert one.wait() is None
    assert store.newest() == tmp_path / "checkpoints/step-00000006" and store.progress() == progress(6)
    scalars = one.take_scalars()
    assert scalars.keys() == figures and scalars["perf/ckpt_failed"] == 0
    assert one.take_scalars() == {}, "each is told once"


def test_one_thread_writes_all_saves_and_ends(tmp_path: Path) -> None:
    """Each thread may hold on to a pool of memory of its own, of a checkpoint's size."""
    one, threads = saver(tmp_path), list[threading.Thread]()

    def write(folder: Path) -> dict[str, Stamp]:
        threads.append(threading.current_thread())
        return writer(len(threads))(folder)

    with one:
        for step in range(1, 4):
            one.start(progress(step), write, best=False)
            assert one.wait() is None
    assert len(threads) == 3 and len(set(threads)) == 1
    threads[0].join(30)
    assert not threads[0].is_alive()


class Claimed(DistContext):
    """Rank whose threads each note that they have taken its device, before they use it."""

    def enter_thread(self) -> None:
        threading.current_thread().name += " on its device"


def test_the_writing_thread_uses_the_ranks_own_gpu(tmp_path: Path) -> None:
    """It waits for copies from there; on the first GPU a context would take half a gigabyte for each rank."""
    names: list[str] = []

    def write(folder: Path) -> dict[str, Stamp]:
        names.append(threading.current_thread().name)
        return writer(1)(folder)

    with saver(tmp_path, Claimed(torch.device("cpu"), rank=0, world=1, cores=1)) as one:
        one.start(progress(1), write, best=False)
        assert one.wait() is None
    assert names == ["saver on its device"]


def test_what_is_written_is_the_moment_of_the_snapshot(tmp_path: Path) -> None:
    """The engine goes on training before the first byte is written, and resumes from there bit for bit."""
    torch.manual_seed(0)

    def build() -> DdpEngine:
        normalise = Normalise([0.5] * 3, [0.5] * 3, SOLO.device)
        optim = OptimConfig(name="adamw", lr=0.01, ema_decay=0.9)
        return DdpEngine(build_resnet(ModelConfig("resnet18"), 4), normalise, EngineConfig(), optim, SOLO)

    def disturb(engine: DdpEngine) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in engine.module.parameters():
            parameter.grad = (
                torch.randn(parameter.shape, generator=generator).to(memory_format=torch.channels_last)
                if (parameter.ndim == 4)
                else torch.randn(parameter.shape, generator=generator)
            )
        engine._update()

    engine = build()
    disturb(engine)
    for name in ("first", "second"):  # into memory that is new, and that was used before
        (tmp_path / name).mkdir()
        write = engine.capture_state({})
        wanted = {key: value.clone() for key, value in engine.module.state_dict().items()}
        averages = {key: value.clone() for key, value in engine.eval_model.state_dict().items()}
        moments = [value.clone() for state in engine.optimizer.state.values() for value in state.values()]
        disturb(engine)
        write(tmp_path / name)
        resumed = build()
        resumed.load(tmp_path / name)
        torch.testing.assert_close(resumed.module.state_dict(), wanted, rtol=0, atol=0)
        torch.testing.assert_close(resumed.eval_model.state_dict(), averages, rtol=0, atol=0)
        again = [value for state in resumed.optimizer.state.values() for value in state.values()]
        torch.testing.assert_close(again, moments, rtol=0, atol=0)


def test_failed_save_is_told_counted_and_tried_again(tmp_path: Path) -> None:
    told: list[str] = []
    one = saver(tmp_path, tell=told.append)
    one.start(progress(3), writer(3), best=True)
    one.wait()
    with no_room():
        one.start(progress(6), writer(6), best=True)
        failure = one.wait()
    why = f"run.dir: cannot write step 6 to {tmp_path / 'checkpoints'} (File too large); make room"
    assert isinstance(failure, UserError) and str(failure).startswith(why)
    assert told[0] == "saved best: step 3, val top-1 1.00 %"
    assert len(told) == 2 and told[1].startswith(f"not saved: {why}"), "the best is not said to be saved"
    assert one.take_scalars()["perf/ckpt_failed"] == 1
    assert one.saved == Store(tmp_path).progress() == progress(3), "the one before stays"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best", "last", "step-00000003"], "its room is given back"
    one.start(progress(9), writer(9), best=False)
    assert one.wait() is None and Store(tmp_path).progress() == progress(9)


def test_the_best_after_a_save_that_failed(tmp_path: Path) -> None:
    """It is that on disk, until a later validation finds a better one: else worse weights would take the place of those."""
    session = Session.__new__(Session)  # of its many parts these two alone are asked
    session.saver, session.progress = saver(tmp_path), progress(6)
    with no_room():
        session.saver.start(progress(6), writer(6), best=True)
        session.wait_for_checkpoint()
    assert session.progress.best_top1_pct == -1, "there is none on disk"
    session.progress = progress(9)  # as a validation leaves it
    session.wait_for_checkpoint()
    assert session.progress == progress(9)


def test_our_own_mistake_ends_the_training(tmp_path: Path) -> None:
    one = saver(tmp_path)
    one.start(progress(3), lambda folder: {}["no such key"], best=False)  # type: ignore[index]
    for ask in (one.wait, one.take_scalars):
        with pytest.raises(KeyError, match="no such key"):
            ask()


def test_a_failing_run_waits_for_the_save_under_way(tmp_path: Path) -> None:
    one = saver(tmp_path)

    def slow(folder: Path) -> dict[str, Stamp]:
        time.sleep(0.3)
        return writer(3)(folder)

    with pytest.raises(ZeroDivisionError), one:
        one.start(progress(3), slow, best=False)
        raise ZeroDivisionError
    assert Store(tmp_path).progress() == progress(3)


# ---- killed ----------------------------------------------------------------------------------------------------------

KILLED = """
import itertools, sys
from pathlib import Path
from tests.trainer.checkpoint.test_async_writer import progress, saver, writer
one = saver(Path(sys.argv[1]))
for step in itertools.count(one.store.progress().step + 1):
    one.start(progress(step), writer(step % 256, size=20_000_000), best=step % 3 == 0)
    assert one.wait() is None
    print(step, flush=True)
"""


def test_killed_in_the_middle_of_saving(tmp_path: Path) -> None:
    """SIGKILL at random moments: what was reported as saved, or something newer, is there whole, and nothing half."""
    draw, last = random.Random(5), 0
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as child:
            assert child.stdout
            for _ in range(3):
                last = int(child.stdout.readline())
            time.sleep(draw.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
            last = max([last, *(int(line) for line in child.stdout)])
        store = Store(tmp_path, keep=1)
        newest, step = store.newest(), store.progress().step
        assert newest and store.passed_over == {}, "it is whole, every byte of it"
        assert last <= step <= last + 1
        assert (newest / "part-0").read_bytes() == bytes([step % 256]) * 20_000_000
        chosen = store.chosen()
        assert chosen and int(chosen.name[5:]) in (step - step % 3, step - step % 3 - 3)


# ---- several ranks ---------------------------------------------------------------------------------------------------


def three_ranks(rank: int, folder: Path) -> None:
    """Rank 1 is the last to write, then finds no room, then dies of a mistake of ours."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=3)
    ctx = DistContext(torch.device("cpu"), rank, world=3, cores=1)
    told: list[str] = []
    one = saver(folder / "run", ctx, told.append)

    def late(place: Path) -> dict[str, Stamp]:
        time.sleep(0.5 * (rank == 1))
        assert not (folder / "run/checkpoints/last").exists()
        return writer(1, rank)(place)

    one.start(progress(1), late, best=True)
    torch.testing.assert_close(ctx.sum(torch.ones(2)), torch.full((2,), 3.0))  # training goes on meanwhile
    assert one.wait() is None and one.saved == progress(1)
    with no_room() if rank == 1 else contextmanager(lambda: iter([None]))():
        one.start(progress(2), writer(2, rank), best=True)
        failure = one.wait()
    assert str(failure).startswith(
        f"rank 1: run.dir: cannot write step 2 to {folder / 'run/checkpoints'} (File too large)"
    )
    assert (len(told), one.failed, one.saved) == (2 * int(rank == 0), 1, progress(1))  # the best, and the failure
    one.start(progress(3), writer(3, rank), best=False)
    assert one.wait() is None and one.saved == progress(3)
    one.start(progress(4), (lambda place: {}["mistake"]) if rank == 1 else writer(4, rank), best=False)  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"rank 1 failed\n(.*\n)*KeyError: 'mistake'"):
        one.wait()
    dist.destroy_process_group()


def test_ranks_agree(tmp_path: Path) -> None:
    warm.start_ranks(three_ranks, (tmp_path,), 3)
    store = Store(tmp_path / "run")
    newest = store.newest()
    assert newest and {file.name for file in newest.iterdir()} >= {"part-0", "part-1", "part-2"}
    (newest / "part-2").unlink()
    assert fault(newest) == "part-2 is missing"


# ---- room on disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "compression"),
    [
        (OptimConfig(), "none"),
        (OptimConfig(momentum=0, nesterov=False), "none"),
        (OptimConfig(name="adamw", ema_decay=0.9), "none"),
        (OptimConfig(name="lamb"), "none"),
        (OptimConfig(name="lars", ema_decay=0.9), "none"),
    ],
)
def test_size_is_known_before(optim: OptimConfig, compression: Compression, tmp_path: Path) -> None:
    normalise = Normalise([0.5] * 3, [0.5] * 3, SOLO.device)
    engine = DdpEngine(build_resnet(ModelConfig("resnet18"), 4), normalise, EngineConfig(), optim, SOLO)
    for parameter in engine.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine._update()
    size = sum(stamp.bytes for stamp in engine.capture_state({})(tmp_path).values())
    with torch.device("meta"):
        module = build_resnet(ModelConfig("resnet18"), 4)
    assert checkpoint_bytes(module, optim, compression, world=1) == pytest.approx(size, rel=0.01)


def test_a_run_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    store = Store(tmp_path / "no" / "run", keep=2, keep_every=3)
    check_room(store, free // 20, epochs=30)
    with pytest.raises(UserError) as error:
        check_room(store, free // 10, epochs=30)
    said = str(error.value)
    assert said.startswith(f"run.dir: 14 checkpoints of {free // 10 / 1e9:.3g} GB need ") and str(tmp_path) in said
    assert said.endswith("make room, lower run.keep, or give another --run.dir") and "GB are free in" in said
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_there_need_no_room_again(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    taken = 100_000_000
    store.begin(3)
    store.complete(progress(3), store.put(3, writer(3, size=taken)), best=True)
    each = (shutil.disk_usage(tmp_path).free + taken // 2) // 3
    check_room(store, each, epochs=1)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError):
        check_room(store, each + taken // 2, epochs=1)
