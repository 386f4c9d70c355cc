"""Snapshots in the memory of nodes: which of them a run goes on from, and what becomes of the others."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.common.errors import UserError
from data_pipeline.cursor import Cursor
from tests.support import warm
from tests.support.runs import SOLO
from trainer.checkpoint.async_writer import Saver
from trainer.checkpoint.manifest import Stamp, StateWriter, write_stamped
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.snapshot_home import forget
from trainer.checkpoint.snapshots import Snapshots
from trainer.checkpoint.store import Store
from trainer.distributed import DistContext


def progress(step: int) -> Progress:
    return Progress(step, Cursor(0, step), [0.5], best_top1_pct=step / 3)


def writer(step: int, rank: int = 0) -> StateWriter:
    def write(folder: Path) -> dict[str, Stamp]:
        return {f"part-{rank}": write_stamped(folder / f"part-{rank}", bytes([step, rank]) * 1000)}

    return write


def opened(run: Path, place: Path, ctx: DistContext = SOLO) -> Snapshots:
    snapshots = Snapshots(run, str(place), ctx)
    assert snapshots.newer_than(Progress()) is None
    snapshots.open()
    return snapshots


def homes(place: Path) -> list[Path]:
    return sorted(place.glob("sluice-*/*"))


def test_only_the_newest_of_the_run_itself_is_gone_on_from(tmp_path: Path) -> None:
    run, place = tmp_path / "it's a run", tmp_path / "memory"
    snapshots = opened(run, place)
    for step in (3, 5):
        snapshots.write(progress(step), writer(step), None)
    (home,) = homes(place)
    assert [path.name for path in sorted((home / "checkpoints").iterdir())] == ["last", "step-00000005"]
    assert home.stat().st_mode & 0o777 == 0o700
    # As another process finds them.
    found = Snapshots(run, str(place), SOLO).newer_than(progress(4))
    assert found and found[1] == progress(5)
    assert (found[0] / "part-0").read_bytes() == bytes([5, 0]) * 1000
    shutil.copytree(run, tmp_path / "a copy")
    assert Snapshots(tmp_path / "a copy", str(place), SOLO).newer_than(progress(4)) is None, "it is another run"
    assert Snapshots(run, str(place), SOLO).newer_than(progress(4)) == found
    # A run that goes on from its folder has others from there on, and so has one that begins anew under the same name.
    again = Snapshots(run, str(place), SOLO)
    assert again.newer_than(progress(5)) is None
    again.open()
    assert again.newer_than(Progress()) is None
    again.write(progress(8), writer(8), None)
    shutil.rmtree(run)
    anew = Snapshots(run, str(place), SOLO)
    assert anew.newer_than(Progress()) is None
    assert not run.exists(), "a start that is refused has changed nothing"
    anew.open()
    assert len(homes(place)) == 1, "what belongs to no run is swept away"
    anew.write(progress(2), writer(2), None)
    forget(run)
    assert homes(place) == []


def test_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    snapshots = opened(tmp_path / "run", tmp_path)
    snapshots.write(progress(3), writer(3), None)
    part = snapshots.store.folder / "last/part-0"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert Snapshots(tmp_path / "run", str(tmp_path), SOLO).newer_than(Progress()) is None


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    base = tmp_path / f"sluice-{os.getuid()}"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(UserError, match=r"run\.snapshot_dir: everybody may write to "):
        Snapshots(tmp_path / "run", str(tmp_path), SOLO)
    with pytest.raises(UserError, match=r"run\.snapshot_dir: cannot write to /proc/"):
        Snapshots(tmp_path / "run", "/proc/none", SOLO)


def test_no_room_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    one, snapshots = (
        Saver(Store(tmp_path / "run"), SOLO, Progress(), told.append),
        opened(tmp_path, tmp_path),
    )

    def full(folder: Path) -> dict[str, Stamp]:
        raise OSError(28, "No space left on device")

    for _ in range(2):
        one.start(progress(3), full, best=False, snapshots=snapshots)
        assert one.wait() is None and one.saved == Progress() and one.failed == 0
    assert len(told) == 1 and told[0].startswith("no snapshot is kept: ") and "No space left on device" in told[0]
    one.start(progress(4), writer(4), best=False, snapshots=snapshots)
    assert one.wait() is None and one.take_scalars().keys() == {"perf/snapshot_write_s"}
    assert one.saved == Progress(), "it is none of the run folder's"


def three_ranks(rank: int, folder: Path) -> None:
    """Two of them on node a, one on node b."""
    os.environ["SLURMD_NODENAME"] = "aab"[rank]
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=3)
    ctx = DistContext(torch.device("cpu"), rank=rank, world=3, cores=1)
    run, parts = folder / "run", {f"part-{number}": bytes([7, number]) * 1000 for number in range(3)}
    snapshots = opened(run, folder, ctx)
    snapshots.write(progress(7), writer(7, rank), ctx.new_group())
    assert len(homes(folder)) == 2
    groups = ctx.gather_objects(len(dist.distributed_c10d._world.pg_map))
    assert len(set(groups)) == 1, "a rank that is left out of a group waits for ever beside NCCL"
    ctx.barrier()
    # Node b is lost, and another takes its place, with an older one.
    if rank == 2:
        last = snapshots.store.folder / "last"
        assert {name: (last / name).read_bytes() for name in parts} == parts, "it had those of all ranks"
        shutil.rmtree(last.parent)
        Snapshots(run, str(folder), DistContext(ctx.device, 0, 1, 1)).write(progress(6), writer(6), None)
    found = Snapshots(run, str(folder), ctx).newer_than(progress(6))
    assert found and found[1] == progress(7)
    assert {name: (found[0] / name).read_bytes() for name in parts} == parts
    assert sorted(os.listdir(found[0])) == ["manifest.json", *parts, "progress.json"]
    assert ("-b/" in str(found[0])) == (rank == 2), "each reads its own node's"
    dist.destroy_process_group()


def test_every_node_has_all_of_it(tmp_path: Path) -> None:
    warm.start_ranks(three_ranks, (tmp_path,), 3)
