"""Make one table of samples from a dataset on disk: the place of each, and its label."""

import errno
import fcntl
import hashlib
import io
import json
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.address import Address, place
from data_pipeline.common.atomic_io import MOST_BYTES, read_bytes, replace_file, why_untrusted
from data_pipeline.common.class_names import lacking
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.common.launcher import warn_on_rank0
from data_pipeline.common.worker_pool import progress
from data_pipeline.config import DataConfig
from data_pipeline.label_sets import NO_SETS, LabelSets, class_counts, targets_of
from data_pipeline.sources import pack_format
from data_pipeline.sources.builtin import cache_root
from data_pipeline.sources.held_out import refuse_division
from data_pipeline.sources.image_headers import BadImage, inspect, mark
from data_pipeline.sources.layouts import FILES, list_images, list_samples
from data_pipeline.sources.listing import UNLABELLED, Listing, Taken, counted
from data_pipeline.sources.published.stored_forms import read_form, read_plain
from data_pipeline.sources.quarantine import quarantined
from data_pipeline.sources.remote_shards import find_shards, remote_shards
from data_pipeline.sources.storage.lookahead import Lookahead
from data_pipeline.sources.storage.objects import Objects, open_objects
from data_pipeline.sources.torchvision_sets import NAMED, dataset_root
from data_pipeline.sources.webdataset import is_archive, is_shard

_HEAD, _TAIL = 1 << 16, 1 << 12  # bytes of a large file that are enough to recognise it
_CHUNK, _THREADS = 256, 8  # files that a thread looks into at a time; more threads than processors, for network storage
_VERSION = 10  # of the cache: raise it when a scan would give another result
_LASTING = (
    errno.ENOENT,
    errno.EISDIR,
    errno.ELOOP,
)  # of a link or folder in an image's place: lasting errors
_NO_SPANS = np.empty((0, 3), np.int64)


@dataclass(frozen=True)
class Catalog:
    """The samples of one split, N in all; a sample's id is its row."""

    root: Path
    paths: list[str]
    """Path of each sample below `root`; SHARD/MEMBER for one inside a shard."""
    labels: NDArray[np.int64]
    """[N] row of the sample's class in `classes`; where `multi_label`, of its set of classes in `label_sets`."""
    classes: list[str]
    bad: dict[str, str]
    """Files left out, path below `root` -> reason."""
    shards: list[str] = field(default_factory=list)
    """Paths of tar files below `root`; empty where each sample is a file."""
    spans: NDArray[np.int64] = field(default_factory=lambda: _NO_SPANS)
    """[N, 3] number of the shard, offset and length in bytes of each sample; empty where each is a file."""
    taken: Taken = field(default_factory=Taken)
    objects: Objects | None = None
    """The shards, where `root` is an address."""
    forms: list[str] = field(default_factory=list)
    """Form of the samples in each of `shards`, see `stored_forms`; empty where all are plain bytes."""
    label_sets: LabelSets = field(default_factory=lambda: NO_SETS)
    marks: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """[N] number of each sample, see `image_headers.mark`; empty where they were not looked into."""

    @property
    def multi_label(self) -> bool:
        """True where an image may have several classes, or none."""
        return len(self.label_sets) > 0

    def class_counts(self) -> NDArray[np.int64]:
        """Count [C] the images of each class."""
        return class_counts(self.labels, self.label_sets, len(self.classes))

    def targets_of(self, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """Look up [B, C] 1 for each class of an image with one of `labels` [B]; all 0 where that is negative."""
        return targets_of(labels, self.label_sets, len(self.classes))

    def names_of(self, sample: int) -> list[str]:
        """List the classes of one sample."""
        label = int(self.labels[sample])
        rows = np.flatnonzero(self.label_sets[label]).tolist() if self.multi_label else [label]
        return [self.classes[row] for row in rows]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample: int) -> bytes:
        """Read the encoded bytes of one sample.

        Raises OSError, `BadImage` for data that cannot be decompressed, and `UserError` where an object store fails for long.
        """
        if not self.shards:
            return read_bytes(f"{self.root}/{self.paths[sample]}")
        shard, offset, length = self.spans[sample].tolist()
        if self.objects:
            return self.objects.read(shard, offset, length)
        path = f"{self.root}/{self.shards[shard]}"
        return read_form(self.forms[shard], path, offset, length) if self.forms else read_plain(path, offset, length)

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Begin to fetch these samples from an object store; local files need none of it. Returns at once."""
        if self.objects:
            self.objects.prefetch(self.spans[samples])

    def look_ahead(self, samples: NDArray[np.int64], positions: NDArray[np.int64]) -> Lookahead | None:
        """Begin to fetch the blocks of `samples` [N], which are read at these positions [N]; None where there is no cache."""
        kept = self.objects is not None and self.objects.cache is not None
        return Lookahead(self.objects, self.spans[samples], positions) if kept and self.objects else None

    def part(self, rows: list[int]) -> "Catalog":
        """Take the samples in these rows, in this order."""
        return replace(
            self,
            paths=[self.paths[row] for row in rows],
            labels=self.labels[rows],
            spans=self.spans[rows] if self.shards else self.spans,
            marks=self.marks[rows] if len(self.marks) else self.marks,
        )

    def spread(self, count: int) -> list[int]:
        """Pick at most `count` rows, evenly spread from the first to the last."""
        count = min(count, len(self))
        return [number * (len(self) - 1) // max(count - 1, 1) for number in range(count)]

    def fingerprint(self) -> str:
        """Hash names and labels: equal where an interrupted epoch can be continued."""
        digest = hashlib.blake2b("\n".join(self.paths).encode(errors="surrogateescape"), digest_size=16)
        digest.update(
            np.packbits(self.label_sets[self.labels]).tobytes() if self.multi_label else self.labels.tobytes()
        )
        return digest.hexdigest()


def open_catalog(cfg: DataConfig, split: str, classes: list[str] | None = None) -> Catalog:
    """List the samples of `split` ("train" or "val"), in any layout (see `layouts`) or from a pack.

    Labels follow `classes`, or the classes of the training split. A scan is cached until a folder or file in it changes; one
    that met a storage error is not cached. Raises `UserError`.
    """
    root = dataset_root(cfg)
    if isinstance(root, Address):
        catalog = _from_store(root, cfg, split, classes)
        return _without(catalog, quarantined(cfg, catalog.root))
    try:
        there = root.is_dir() or (root.is_file() and root.name.lower().endswith(FILES))
    except OSError as error:
        raise UserError(f"data.path: cannot look into {cfg.path} ({error.strerror}); mend that first") from None
    require(
        there or not root.is_file() or not is_shard(root.name),
        f"data.path: {cfg.path} is a tar; give the folder that it lies in",
    )
    if not there:
        raise UserError(
            f"data.path: {cfg.path} is {_what_else(root)}; give one with train/CLASS/ images, a table or archive "
            f"({', '.join(FILES)}), or a name ({', '.join(NAMED)})"
        )
    # A pack has its own index; anything else is scanned, or taken from the cache under all options that decide the scan.
    if pack_format.is_pack(root):
        catalog = _from_pack(root, cfg, split, classes)
    else:
        key = [
            str(root.resolve()),
            split,
            classes,
            cfg.val_share,
            cfg.images,
            cfg.image_column,
            cfg.label_column,
            cfg.labels,
        ]
        catalog = _remembered(
            [*key, cfg.split_column, cfg.fold, cfg.group], lambda: list_samples(root, cfg, split, classes)
        )
    return _without(catalog, quarantined(cfg, catalog.root))


def _what_else(root: Path) -> str:
    if not root.is_file():
        return "not a folder"
    do = "unpack it" if is_archive(root.name) else "write labels that are in it into a table"
    return f"not a folder, nor a file of a kind that is read, so {do}"


def open_images(cfg: DataConfig) -> Catalog:
    """List the images below the folder `data.path` by their paths, or those that a table there names, in its order.

    No class is known and every label is UNLABELLED. No image is left out: a loader reports the unreadable ones. Raises
    `UserError`.
    """
    root = dataset_root(cfg)
    if isinstance(root, Address):
        raise UserError(
            f"data.path: {root} is an address, where only packs and shards are read; copy the images to this machine"
        )
    listing = list_images(root, cfg)
    unlabelled = np.full(len(listing.paths), UNLABELLED)
    return Catalog(listing.root, listing.paths, unlabelled, listing.classes, bad={}, taken=listing.taken)


def _from_store(root: Address, cfg: DataConfig, split: str, classes: list[str] | None) -> Catalog:
    if pack_format.is_pack(root):
        return _from_pack(root, cfg, split, classes)
    if split == "val" and classes is None:
        classes = _from_store(root, cfg, "train", None).classes
    found = find_shards(root, split)
    key: list[object] = [str(root), split, classes, cfg.val_share, found.names, found.versions, cfg.fold, cfg.group]
    catalog = _remembered(key, lambda: remote_shards(found, cfg, split, classes))
    return replace(catalog, objects=_objects(found.base, catalog.shards, cfg, split))


def _objects(base: Address, shards: list[str], cfg: DataConfig, split: str) -> Objects:
    return open_objects(base, shards, cfg.cache_gb, keep=split != "train" or bool(cfg.shuffle_shards))


def _from_pack(root: Path, cfg: DataConfig, split: str, classes: list[str] | None) -> Catalog:
    refuse_division(cfg, f"{root} is a pack, divided since it was written")
    pack = pack_format.Pack.open(root)
    index = pack.index(split, cfg.cache_gb)
    names = classes or index.classes
    unknown = sorted(set(index.classes) - set(names))
    if unknown:
        hint = lacking(unknown[0], names)
        raise UserError(
            f"data.path: {root} has a class that training lacks: {unknown[0]} ({hint}); pack the same classes"
        )
    renumbered = np.array([names.index(name) for name in index.classes], np.int64)
    shards = [pack_format.shard_name(number) for number in range(index.shards)]
    spans = np.stack([index.shard, index.offset, index.length], axis=1).astype(np.int64)
    taken = Taken(f"a pack, {counted(len(shards), 'shard')} in {split}/", "val/")
    base = root / split
    objects = (
        open_objects(base, shards, cfg.cache_gb, keep=split != "train" or bool(cfg.shuffle_shards))
        if isinstance(base, Address)
        else None
    )
    return Catalog(base, index.paths, renumbered[index.label], names, {}, shards, spans, taken, objects)


def _without(catalog: Catalog, left_out: set[str]) -> Catalog:
    kept = [row for row, path in enumerate(catalog.paths) if path not in left_out]
    if len(kept) == len(catalog):
        return catalog
    quarantine = {path: "in quarantine" for path in catalog.paths if path in left_out}
    return replace(catalog.part(kept), bad={**catalog.bad, **quarantine})


# ---- what was scanned before ----------------------------------------------------------------------------------------


def _remembered(key: list[object], list_now: Callable[[], Listing]) -> Catalog:
    """Return the catalog that `list_now` leads to, from the cache where nothing in it has changed."""
    # Cached files decide which images are opened, so nobody else may have written them; without a cache every start scans.
    name = hashlib.blake2b(json.dumps([_VERSION, *key]).encode(), digest_size=16).hexdigest()
    try:
        file = cache_root() / "scans" / f"{name}.npz"
        file.parent.mkdir(mode=0o700, exist_ok=True)
        untrusted = why_untrusted(file.parent)
        if untrusted:
            raise UserError(f"cache: {untrusted}; remove it, or set SLUICE_CACHE to a folder of your own")
        lock = open(file.with_suffix(".lock"), "w")  # noqa: SIM115 - closed below
    except (OSError, UserError) as error:
        _say_forgetful(str(key[0]), str(error))
        return _scan(list_now())
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process scans; the others of its machine wait and read
        known = _load(file)
        if known is None:
            listing = list_now()
            watched = _changes(listing.watched)  # before the scan, so that a file added during it is noticed next time
            known = _scan(listing)
            if any(isinstance(why, _Unread) for why in known.bad.values()):
                return known
            try:
                replace_file(file, _dump(known, watched))
            except OSError as error:  # as of a full disk: then each start scans, which costs only time
                _say_forgetful(str(key[0]), f"cache: cannot write to {file.parent} ({error.strerror})")
        return known


@cache
def _say_forgetful(root: str, why: str) -> None:
    """Tell once, of all splits and ranks, that nothing scanned can be remembered."""
    warn_on_rank0(f"scanning {printable(root)} anew each time: {why}")


class _Unread(str):
    """Reason that may pass, such as a storage error. A scan with one must not be cached."""


def _dump(catalog: Catalog, watched: dict[str, list[int]]) -> bytes:
    """Pack the catalog into an .npz of plain arrays; anything that is no array is in it as JSON."""
    text = {
        "root": str(catalog.root),
        "classes": catalog.classes,
        "bad": catalog.bad,
        "shards": catalog.shards,
        "taken": asdict(catalog.taken),
        "forms": catalog.forms,
        # Bad files are watched one by one, so that a repaired one is noticed.
        "watched": watched | _changes([catalog.root / name for name in catalog.bad]),
    }
    names, ends = pack_format.joined(catalog.paths)
    about = np.frombuffer(json.dumps(text).encode(), np.uint8)
    stream = io.BytesIO()
    arrays = {name: getattr(catalog, name) for name in ("labels", "spans", "label_sets", "marks")}
    np.savez(stream, about=about, paths=names, path_ends=ends, allow_pickle=False, **arrays)
    return stream.getvalue()


def _load(file: Path) -> Catalog | None:
    """Read what `_dump` wrote; None if there is nothing, or something has changed since."""
    try:
        with np.load(file) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if _changes(map(Path, about["watched"])) != about["watched"]:
                return None
            return Catalog(
                place(about["root"]),
                pack_format.parted(arrays["paths"], arrays["path_ends"]),
                arrays["labels"],
                about["classes"],
                about["bad"],
                about["shards"],
                arrays["spans"],
                Taken(**about["taken"]),
                forms=about["forms"],
                label_sets=arrays["label_sets"],
                marks=arrays["marks"],
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _changes(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Change times in ns of each file, or of each folder's entries, and of its permissions; [] where nothing exists."""
    return {str(path): _changed(path) for path in paths}


def _changed(path: Path) -> list[int]:
    try:
        entry = path.stat()
    except OSError:
        return []
    return [entry.st_mtime_ns, entry.st_ctime_ns]


def _scan(listing: Listing) -> Catalog:
    """Look into the first and last bytes of every image, and leave out those that must not be decoded."""
    pieces = [range(at, min(at + _CHUNK, len(listing.paths))) for at in range(0, len(listing.paths), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool, progress("scanning", len(listing.paths)) as advance:
        looked: list[int | str] = []
        for found in pool.map(lambda rows: [_looked_into(listing, row) for row in rows], pieces):
            looked += found
            advance(len(found))
    good = [row for row, found in enumerate(looked) if isinstance(found, int)]
    bad = {path: why for path, why in zip(listing.paths, looked, strict=True) if isinstance(why, str)}
    if not good:
        path, why = next(iter(bad.items()))
        raise UserError(
            f"data.path: none of the {len(bad)} images in {listing.root} can be read, as {path}: {why}; give intact ones"
        )
    # Only readable samples get a row; the others are kept with their reasons, for a run to name.
    return Catalog(
        listing.root,
        [listing.paths[row] for row in good],
        np.array(listing.labels, np.int64)[good],
        listing.classes,
        bad,
        listing.shards,
        listing.spans[good] if listing.shards else _NO_SPANS,
        listing.taken,
        forms=listing.forms,
        label_sets=listing.label_sets,
        marks=np.array([looked[row] for row in good], np.int64),
    )


def _looked_into(listing: Listing, row: int) -> int | str:
    """Return an image's mark, or say why it must not be decoded."""
    try:
        # Locate the bytes: in a shard, or the whole file.
        if listing.shards:
            shard, start, length = listing.spans[row].tolist()
            if listing.objects:
                return _inspected(listing.objects.read(shard, start, length))
            path = listing.root / listing.shards[shard]
            if listing.forms and listing.forms[shard]:
                return _inspected(
                    read_form(listing.forms[shard], str(path), start, length)
                )  # only the whole can be read
        else:
            path, start = listing.root / listing.paths[row], 0
            entry = path.stat()
            if stat.S_ISFIFO(entry.st_mode):
                return "a named pipe"  # to open it could take for ever
            length = entry.st_size
        # Read beginning and end, as most damage is a cut file; more only where these leave a doubt.
        if length > MOST_BYTES:
            return f"its {length:,} bytes are more than any image takes"
        data = read_bytes(path, start, min(length, _HEAD))
        if length > _HEAD:
            tail = max(_HEAD, length - _TAIL)
            data += read_bytes(path, start + tail, length - tail)
        try:
            inspect(data, length)
        except BadImage:
            inspect(read_bytes(path, start, length))  # a header beyond the first bytes, or much behind the image
        return mark(data, length, (_HEAD, _TAIL))
    except BadImage as error:
        return str(error)
    except OSError as error:
        why = error.strerror or type(error).__name__
        return why if error.errno in _LASTING else _Unread(why)


def _inspected(data: bytes) -> int:
    """Return the mark of a whole image. Raises `BadImage`."""
    inspect(data)
    return mark(data, len(data), (_HEAD, _TAIL))
