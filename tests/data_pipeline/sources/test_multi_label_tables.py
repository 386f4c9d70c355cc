"""Tables in which an image has several classes: what is read, what is guessed, and how the images are divided."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import IGNORE_LABEL
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.summary import summary
from tests.data_pipeline.sources.test_tables import COUNT, data, lines, refused, write

__all__ = ["data"]

NAMES = ("rot", "rust", "scab")
SETS = ((0,), (1,), (2,), (0, 2), (2, 0), (), (0, 1, 2), (1,))
"""Classes of the images in turn."""


def marks(n: int) -> str:
    """0 and 1 of each class of image n."""
    return ",".join(str(int(c in SETS[n % len(SETS)])) for c in range(3))


def names(n: int) -> list[str]:
    return [NAMES[c] for c in SETS[n % len(SETS)]]


def listed(mark: str) -> Callable[[int], str]:
    return lambda n: f'{n:04},"{mark.join(names(n))}"'


FORMS = [
    *(("image,label", listed(mark), {}, mark.strip() or " ", f"label, separated by {mark!r}") for mark in "|; "),
    ("image,label", listed(", "), {}, ",", "label, separated by ','"),
    ("id,Finding Labels", listed("|"), {"label_column": "Finding Labels", "labels": "multi"}, "|", None),
    (f"image,{','.join(NAMES)}", lambda n: f"{n:04},{marks(n)}", {}, "columns", "the 1s in rot, rust, scab"),
    (f"image,age,{','.join(NAMES)}", lambda n: f"{n:04},{n},{marks(n)}", {"labels": "multi"}, "columns", None),
]


def test_cells_without_a_separator_are_lists_of_one(data: Path) -> None:
    file = write(data, lines("image,label", lambda n: f"{n:04},{'cat' if n % 2 else 'dog'}"))
    catalog = open_catalog(DataConfig(str(file), val_share=1.0, labels="multi"), "val")
    assert catalog.multi_label and catalog.label_sets.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(("head", "row", "options", "written", "said"), FORMS)
def test_every_form_gives_the_same_classes(
    data: Path, head: str, row: Callable[[int], str], options: dict[str, str], written: str, said: str | None
) -> None:
    file = write(data, lines(head, row))
    for _ in range(2):  # scanned, then remembered
        catalog = open_catalog(DataConfig(str(file), val_share=1.0, **options), "val")  # type: ignore[arg-type]
        assert catalog.multi_label and catalog.classes == list(NAMES) and catalog.taken.written == written
        found = {path: catalog.names_of(at) for at, path in enumerate(catalog.paths)}
        assert found == {f"images/{n:04}.jpg": sorted(names(n)) for n in range(COUNT)}
        assert catalog.class_counts().tolist() == [sum(name in names(n) for n in range(COUNT)) for name in NAMES]
    assert said is None or catalog.taken.layout.endswith(f"several classes by {said}")


def test_the_start_says_how_many_classes_an_image_has(data: Path) -> None:
    cfg = DataConfig(str(write(data, lines("image,label", listed("|")))), labels="multi", label_column="label")
    train = open_catalog(cfg, "train")
    val = open_catalog(cfg, "val", train.classes)
    assert val.classes == train.classes and {*train.paths}.isdisjoint(val.paths)
    said = summary(cfg, train, val)
    assert not any("changes nothing" in line for line in said)
    mean = train.class_counts().sum() / len(train)
    empty = sum(not train.names_of(row) for row in range(len(train)))
    assert (
        f"multi-label, {mean:.2f} classes an image on average, at most 3, {empty} images without any; 3 classes of"
        in said[1]
    )
    assert "of each class and an image of several counted to its rarest, by a hash of the names" in said[0]


def test_a_column_of_marks_that_no_image_has_is_a_class(data: Path) -> None:
    file = write(data, lines("image,rot,rust,scab,wilt", lambda n: f"{n:04},{marks(n)},0"))
    assert open_catalog(DataConfig(str(file)), "train").classes == [*NAMES, "wilt"]


def test_a_named_column_and_an_odd_one_keep_their_lists_and_say_so(data: Path) -> None:
    file = write(data, lines("image,label", listed("|")).replace('""', "none"))
    known = open_catalog(DataConfig(str(file), label_column="label"), "train")
    assert not known.multi_label and "rot|scab" in known.classes
    assert "cells of label may list several classes, divided by '|'; each list is taken" in known.taken.notes[0]
    assert not open_catalog(DataConfig(str(file), labels="single"), "train").taken.notes
    pairs = lines("image,label", lambda n: f"{n:04},{'ab'[n % 2]} {'cd'[n // 2 % 2]} {'ef'[n // 4 % 2]}")
    assert "divided by ' '" in open_catalog(DataConfig(str(write(data, pairs))), "train").taken.notes[0]


@pytest.mark.parametrize(
    ("head", "row", "options", "says"),
    [
        (
            "image,cat,dog",
            lambda n: f"{n:04},{n % 2},1",
            {"labels": "single"},
            "data.labels: single, but cat, dog of FILE mark several classes of an image, or none, in some rows; leave the",
        ),
        (
            "image,age,cat,dog",
            lambda n: f"{n:04},{n % 5},{n % 2},1",
            {},
            "data.label_column: which column of FILE has the classes is not clear; name it; it has age, cat, dog; "
            "--data.labels multi takes the 2 columns of 0 and 1 for a class each",
        ),
        (
            "image,label",
            lambda n: f"{n % 20:04},{'a|b' if n < 20 else 'a'}",
            {"labels": "multi"},
            "data.path: FILE gives images/0000.jpg two classes, a, b and a; leave one of its rows",
        ),
        (
            "image,label,split",
            lambda n: f"{n:04},{'a|b' if n % 2 else 'a'},{'train' if n < 20 else 'val'}",
            {"labels": "many"},
            "data.labels: 'many' is unknown; choose one of auto, single, multi",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    data: Path, head: str, row: Callable[[int], str], options: dict[str, str], says: str
) -> None:
    assert refused(write(data, lines(head, row)), **options).startswith(says)


def test_balance_is_refused(data: Path) -> None:
    cfg = DataConfig(str(write(data, lines("image,label", listed("|")))), balance="sqrt", size_px=16, batch=4)
    with pytest.raises(ValueError, match="sqrt goes by the one class of an image"):
        Loader(cfg)


def test_folds_divide_each_image_once_by_its_rarest_class(data: Path) -> None:
    """Held against the rule, written anew: rarest class, hashes in order, fifths of each class."""
    cfg = DataConfig(str(write(data, lines("image,label", listed("|")))), val_share=1.0)
    whole = open_catalog(cfg, "val")
    counts = [sum(name in names(n) for n in range(COUNT)) for name in NAMES]

    def rarest(path: str) -> str:
        own = names(int(Path(path).stem))
        return min(own, key=lambda name: (counts[NAMES.index(name)], name)) if own else ""

    def hashed(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    wanted = {}
    for name in (*NAMES, ""):
        members = sorted((path for path in whole.paths if rarest(path) == name), key=hashed)
        for at, path in enumerate(members):
            wanted[path] = ((2 * at + 1) * 4 // (2 * len(members)) + hashed(name)) % 4
    for fold in range(4):
        held = open_catalog(DataConfig(cfg.path, fold=f"{fold + 1}/4"), "val").paths
        assert {*held} == {path for path, its in wanted.items() if its == fold}


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_batches_have_the_classes_of_their_images_at_any_number_of_ranks(data: Path, mixup: float) -> None:
    file = write(data, lines("image,label", listed(" ")))
    (data / "images/0003.jpg").write_bytes((data / "images/0003.jpg").read_bytes()[:40])
    cfg = DataConfig(str(file), val_share=0.1, size_px=16, batch=12, threads=1, augment=AugmentConfig(mixup=mixup))
    found: list[dict[int, list[float]]] = []
    for world in (1, 2):
        rows: dict[int, list[float]] = {}
        for rank in range(world):
            loader = Loader(cfg, rank_info=RankInfo(rank=rank, world=world, cores=1), seed=3)
            for batch in loader:
                assert batch.targets is not None and batch.targets.shape == (len(batch.ids), 3)
                own = loader.catalog.targets_of(loader.catalog.labels[batch.ids.numpy()])
                for row, sample in enumerate(batch.ids.tolist()):
                    targets = batch.targets[row]
                    if batch.labels[row] == IGNORE_LABEL:
                        assert not targets.any(), "padding has no class"
                    elif row < batch.num_real:
                        rows[sample] = targets.tolist()
                        assert mixup or np.array_equal(targets.numpy(), own[row])
                        partner = own[row ^ 1] if batch.labels[row ^ 1] != IGNORE_LABEL else own[row]
                        low, high = np.minimum(own[row], partner), np.maximum(own[row], partner)
                        assert (low <= targets.numpy() + 1e-6).all() and (targets.numpy() <= high + 1e-6).all()
        assert len(rows) == len(loader.catalog)
        found.append(rows)
    assert found[0] == found[1]
