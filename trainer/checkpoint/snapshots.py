"""Snapshots in the memory of every node, newer than the checkpoints on disk, for a restart that loses seconds.

DIR/sluice-UID/TOKEN-NODE/checkpoints/step-00000120/    as in a run folder (see `store`), with the files of all ranks
RUN/checkpoints/.snapshots                              DIR/sluice-UID/TOKEN, of the snapshots that belong to the run

Each node has the whole snapshot, so a run survives the loss of all nodes but one. Where a run goes on from its folder, it
takes a new token, and its earlier snapshots belong to nobody.
"""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.common.errors import UserError
from trainer.checkpoint.manifest import MANIFEST, Stamp, StateWriter, fault, read_manifest, write_stamped
from trainer.checkpoint.progress import PROGRESS, Progress, read_progress
from trainer.checkpoint.snapshot_home import home_of, make_home, new_token, open_base, read_token, sweep
from trainer.checkpoint.store import Store
from trainer.distributed import DistContext
from trainer.node.arrival import host_name


class Snapshots:
    """The newest snapshot of a run, on each of its nodes. Its methods are collective."""

    def __init__(self, run: Path, place: str, ctx: DistContext) -> None:
        """`place` is a folder in memory, or on a disk of each node's own. Raises `UserError` where it cannot be used."""
        self.run, self.ctx = run.absolute(), ctx
        hosts = ctx.gather_objects(host_name())
        self._writers = sorted({hosts.index(host) for host in hosts})
        """The first rank of each node, which writes for it."""
        self._node_of = [self._writers.index(hosts.index(host)) for host in hosts]
        """Number of each rank's node."""
        self._node = self._node_of[ctx.rank]
        self._writes = self._writers[self._node] == ctx.rank
        self._group = ctx.new_group()
        self.base = ctx.raise_together(lambda: open_base(place))
        self._token: Path | None = ctx.broadcast_from_rank0(lambda: read_token(self.run))
        self._taken = False

    @property
    def store(self) -> Store:
        """Snapshots on this node."""
        assert self._token
        return Store(home_of(self._token), keep=1)

    def newer_than(self, progress: Progress) -> tuple[Path, Progress] | None:
        """Find the newest snapshot of the run, give it to the nodes that lack it, and return its folder on this node.

        None where none is newer than `progress`, that of the run folder. Writes nothing to the run folder; see `open`.
        """
        if self._token is None:
            return None
        found = self.ctx.gather_objects(self._whole() if self._writes else None)
        newest = max((one for one in found if one), default=None)
        if newest is None or newest[0] <= progress.step:
            return None
        self._taken = True
        self._use(self._token)
        source, lacking = found.index(newest), found[self._writers[self._node]] != newest
        mine = self.ctx.raise_together(lambda: self._files() if self.ctx.rank == source else [])
        files = [(self._node_of[source], *file) for file in self.ctx.gather_objects(mine)[source]]
        self.ctx.raise_together(lambda: self._receive(newest[0], files, lacking) if self._writes else None)
        folder = self.store.folder / "last"
        return folder, self.ctx.raise_together(lambda: read_progress(folder))

    def open(self) -> None:
        """Begin to keep snapshots. Where the run does not go on from the earlier ones, they are given up."""
        if not self._taken:
            self.give_up()

    def write(self, progress: Progress, write: StateWriter, group: Any) -> None:
        """Keep a snapshot, of which `write` adds the files of this rank. In a thread with a `group` of its own.

        Raises `UserError` where a node has no room; the earlier one stays.
        """
        step, together = progress.step, self.ctx.raise_together
        together(lambda: self.store.begin(step) if self._writes else None, group)
        parts = self.ctx.gather_objects(together(lambda: self.store.put(step, write), group), group)
        together(lambda: self._exchange(step, parts) if self._writes else None, group)
        manifest = {name: stamp for part in parts for name, stamp in part.items()}
        together(lambda: self.store.complete(progress, manifest, best=False) if self._writes else None, group)

    def give_up(self) -> None:
        """Forget the snapshots so far: the run goes on from elsewhere."""
        self.remove()
        token = self.ctx.raise_together(lambda: new_token(self.run, self.base) if self.ctx.primary else None)
        self._use(self.ctx.broadcast_from_rank0(lambda: token))
        if self._writes:
            sweep(self.base)

    def remove(self) -> None:
        """Give the memory back. Not collective."""
        if self._writes and self._token:
            shutil.rmtree(home_of(self._token), ignore_errors=True)

    def _use(self, token: Path | None) -> None:
        assert token
        self._token = token
        self.ctx.raise_together(lambda: make_home(token, self.run) if self._writes else None)

    def _whole(self) -> tuple[int, str] | None:
        """Step and hash of this node's snapshot; None where it has none that is whole."""
        with suppress(UserError, OSError):
            newest = self.store.newest()
            if newest:
                return read_progress(newest).step, hashlib.sha256((newest / MANIFEST).read_bytes()).hexdigest()
        return None

    def _files(self) -> list[tuple[str, int]]:
        """List names and sizes of the files of this node's snapshot. Raises OSError."""
        return [(file.name, file.stat().st_size) for file in sorted((self.store.folder / "last").iterdir())]

    def _exchange(self, step: int, parts: list[dict[str, Stamp]]) -> None:
        """Give each file of each rank to all nodes. For the writers. Raises `UserError`."""
        folder = self.store.partial(step)
        files = [
            (self._node_of[rank], name, stamp.bytes) for rank, part in enumerate(parts) for name, stamp in part.items()
        ]
        self._give([(node, folder / name, size) for node, name, size in files], keep=True)

    def _receive(self, step: int, files: list[tuple[int, str, int]], lacking: bool) -> None:
        """Give a snapshot, of `files` on a node, to the nodes that are `lacking` it. For the writers. Raises `UserError`."""
        last = self.store.folder / "last"
        if lacking:
            shutil.rmtree(self.store.folder, ignore_errors=True)
            with suppress(UserError):  # without room it takes part all the same, and says so in the end
                self.store.begin(step)
        folder = self.store.partial(step) if lacking else last
        self._give([(node, folder / name, size) for node, name, size in files], keep=lacking)
        if lacking:
            manifest = read_manifest(folder)
            del manifest[PROGRESS]
            self.store.complete(read_progress(folder), manifest, best=False)
            why = fault(last)
            if why:
                raise UserError(f"run.snapshot_dir: {last} came damaged from another node ({why}); start again")

    def _give(self, files: list[tuple[int, Path, int]], keep: bool) -> None:
        """Give files, each of a node and a size, to the other nodes, which write them if they `keep` them.

        For the writers, all of which must take part to the end, also where one has no room. Raises `UserError`.
        """
        failure: OSError | None = None
        for node, file, size in files if len(self._writers) > 1 else ():
            data = torch.empty(size, dtype=torch.uint8)
            mine = node == self._node
            try:
                if mine:
                    with file.open("rb") as stream:
                        stream.readinto(data.numpy().data)
            except OSError as error:
                failure = failure or error
            if size:
                self._spread(data, node)
            try:
                if keep and not mine:
                    write_stamped(file, data.numpy().data)
            except OSError as error:
                failure = failure or error
        if failure:
            raise UserError(f"run.snapshot_dir: cannot write to {self.store.folder} ({failure.strerror}); make room")

    def _spread(self, data: torch.Tensor, source: int) -> None:
        """Give `data` of the node `source` to all nodes, each of which passes it on. For the writers.

        By messages, as for a broadcast these ranks would need a group of their own (see `DistContext.new_group`).
        """
        nodes, place = len(self._writers), (self._node - source) % len(self._writers)
        there = 1  # nodes that have it, in their order from the source on
        while there < nodes:
            beside = self._writers[(self._node + (there if place < there else -there)) % nodes]
            if place < there and place + there < nodes:
                dist.send(data, beside, self._group)
            elif there <= place < 2 * there:
                dist.recv(data, beside, self._group)
            there *= 2
