"""A pack that grows in an object store. Shards go to their places at once; the manifest is last, and makes it a pack.

DST.partial/plan.json            source and options of the pack; work goes on only for the same plan
DST.partial/train-000000.json    a note on each finished shard, written after it

So another machine can go on as well. On this one there is the shard being written, in the cache.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.common.address import Address
from data_pipeline.common.errors import require
from data_pipeline.pack.writer import UNDER_WAY, Note, Shard, Workshop, as_json, lock_folder
from data_pipeline.sources.builtin import cache_root
from data_pipeline.sources.catalog import Catalog
from data_pipeline.sources.pack_format import Pack, is_pack, shard_name
from data_pipeline.sources.remote_shards import unfinished
from data_pipeline.sources.storage import store
from data_pipeline.sources.storage.objects import read_object


class RemoteWorkshop(Workshop):
    """Work at a pack in an object store. Raises `UserError` where it cannot be written, OSError for this machine's disk."""

    def __init__(self, dst: Path, options: Mapping[str, Any], catalogs: Mapping[str, Catalog]) -> None:
        super().__init__(dst, options, catalogs)
        assert isinstance(dst, Address)
        self._address, self._plan = dst, unfinished(dst)
        self._partial = self._plan.parent
        self.folder = cache_root() / "packs" / hashlib.blake2b(str(dst).encode(), digest_size=8).hexdigest()

    @staticmethod
    def refuse_foreign(dst: Address) -> None:
        """Raise `UserError` where `dst` cannot be written, or holds anything but a pack."""
        require(
            dst.can_list, f"DST: {dst} is on a web server, where nothing can be written; give an s3:// or gs:// address"
        )
        require(dst.key != "", f"DST: {dst} is a whole bucket; give a folder in it, as {dst}/pack")
        if not is_pack(dst) and store.stat(unfinished(dst)) is None:
            there = next(store.list_below(dst), None)
            require(
                there is None,
                f"DST: {dst} holds {there and there[0]} and is no pack; give a folder that is not there yet",
            )

    def finished(self) -> bool:
        """Return True where `dst` is this same pack, and remove what is left beside it. Raises `UserError` for another pack."""
        if not is_pack(self.dst):
            return False
        self.compare(self.dst, Pack.open(self.dst).manifest)
        self._remove_notes()
        return True

    @contextmanager
    def open(self) -> Iterator[None]:
        """Begin the work or go on with it. Raises `UserError` where another process of this machine works on it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            lock_folder(lock.fileno(), self._address)
            if store.stat(self._plan):
                self.compare(self._partial, json.loads(read_object(self._plan)))
            else:
                store.write(self._plan, as_json(self.plan))
            try:
                yield
            finally:
                (self.folder / UNDER_WAY).unlink(missing_ok=True)

    def notes(self, split: str) -> list[Note]:
        """Read the notes of the finished shards, in order."""
        noted = {name for name, _ in store.list_below(self._partial)}
        sizes = {name: stat.size for name, stat in store.list_below(self._address)}
        notes: list[Note] = []
        while _note(split, len(notes)) in noted:
            note = Note(**json.loads(read_object(self._partial / _note(split, len(notes)))))
            if sizes.get(f"{split}/{shard_name(len(notes))}") != note.bytes:
                break
            notes.append(note)
        return notes

    def add(self, split: str, number: int, shard: Shard, next_row: int) -> Note:
        """Finish a shard and copy it to its place."""
        note = shard.note
        note.next = next_row
        note.bytes, note.sha256 = shard.writer.close()
        store.write(self._address / split / shard_name(number), shard.writer.file)
        store.write(self._partial / _note(split, number), as_json(asdict(note)))
        return note

    def finish(self, notes: Mapping[str, list[Note]]) -> dict[str, Any]:
        """Write indices and manifest. Returns the manifest."""
        manifest = self._write_index_and_manifest(notes)
        self._remove_notes()
        return manifest

    def _write(self, name: str, data: bytes) -> None:
        store.write(self._address / name, data)

    def _remove_notes(self) -> None:
        store.remove([self._partial / name for name, _ in store.list_below(self._partial)])


def _note(split: str, number: int) -> str:
    return f"{split}-{number:06d}.json"
