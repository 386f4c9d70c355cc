"""Images for the tests: small ones of every kind, made with PIL, and the real ones where there are any."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import Batch, Loader
from data_pipeline.sources.catalog import Catalog

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


LONGEST = (
    "test_slurm",
    "test_chaos",
    "test_sanity_checks",
    "test_watchdog",
    "test_resume",
    "test_deepspeed",
    "test_finetune",
)
"""Files to begin with, so that several workers (`-n 3 --dist loadfile`) end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or left in, the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLUICE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that must share a core spend their time waiting for each other: 145 s of test_resnet.py, where one took 26."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Images


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with sharp edges and some noise: what resizing must get right."""
    draw = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / draw.uniform(2, 30) + y / draw.uniform(2, 30) + phase) for phase in draw.uniform(0, 6, 3)]
    pixels = 128 + 70 * np.stack(waves, axis=-1) + 60 * ((x // 9 + y // 7) % 2)[..., None] - 30
    return Image.fromarray((pixels + draw.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def alpha(image: Image.Image) -> Image.Image:
    """The image, half transparent towards the right."""
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image


def _exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter: to be ignored
    return tags.tobytes()


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "plain.jpg": lambda image: encode(image, "JPEG", quality=90),
    "coarse.jpeg": lambda image: encode(image, "JPEG", quality=30),
    "full chroma.JPG": lambda image: encode(image, "JPEG", subsampling=0),
    "half chroma.jpg": lambda image: encode(image, "JPEG", subsampling=1),
    "progressive.jpg": lambda image: encode(image, "JPEG", progressive=True),
    "grayscale.jpg": lambda image: encode(image.convert("L"), "JPEG"),
    "cmyk.jpg": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "restarts.jpg": lambda image: encode(image, "JPEG", restart_marker_blocks=4),
    "turned.jpg": lambda image: encode(image, "JPEG", exif=_exif()),
    "big header.jpg": lambda image: encode(image, "JPEG", icc_profile=bytes(90_000)),
    "trailer.jpg": lambda image: encode(image, "JPEG") + bytes(9_000),
    "rgb.png": lambda image: encode(image, "PNG"),
    "rgba.png": lambda image: encode(alpha(image), "PNG"),
    "grayscale.png": lambda image: encode(image.convert("L"), "PNG"),
    "palette.png": lambda image: encode(image.convert("P"), "PNG"),
    "bits.PNG": lambda image: encode(image.convert("1"), "PNG"),
    "turned.png": lambda image: encode(image, "PNG", exif=_exif()),
    "lossy.webp": lambda image: encode(image, "WEBP", quality=90),
    "lossless.webp": lambda image: encode(image, "WEBP", lossless=True),
    "alpha.webp": lambda image: encode(alpha(image), "WEBP"),
    "turned.webp": lambda image: encode(image, "WEBP", exif=_exif()),
    "rgb.bmp": lambda image: encode(image, "BMP"),
    "grayscale.bmp": lambda image: encode(image.convert("L"), "BMP"),
    "bits.bmp": lambda image: encode(image.convert("1"), "BMP"),
}
"""Encoders of every kind of file that is read, by the file's name."""

SIZES = [(37, 53), (64, 48), (90, 131), (48, 160), (151, 60), (33, 33)]  # height, width

HOSTILE_NAMES = [
    "it's 100%",
    'a "quoted" name',
    "Ångström 猫 ß",
    "dash -- and $HOME",
    "semi;colon & [glob*]?",
    "a\tb\\c",
]


@pytest.fixture(scope="session")
def streams() -> dict[str, bytes]:
    """One encoded image of every kind, each of another size."""
    return {
        name: kind(picture(*SIZES[number % len(SIZES)], seed=number))
        for number, (name, kind) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, streams: dict[str, bytes]) -> Path:
    """train/ and val/ with six classes of hostile names, 48 and 24 images of every kind, sub-folders included."""
    root = tmp_path_factory.mktemp('it\'s a "folder" of ünicode')
    for split, copies in (("train", 2), ("val", 1)):
        for number, (name, stream) in enumerate(list(streams.items()) * copies):
            below = (
                root / split / HOSTILE_NAMES[number % len(HOSTILE_NAMES)] / ("sub folder" if number % 5 == 0 else "")
            )
            below.mkdir(parents=True, exist_ok=True)
            (below / f"{number} {name}").write_bytes(stream)
    return root


@pytest.fixture(scope="session")
def imagenette() -> Path:
    """The real images; absent, the test is skipped."""
    root = Path(os.environ.get("SLUICE_IMAGENETTE") or ROOT.parent / "shared/data/imagenette")
    if not root.is_dir():
        pytest.skip(f"{root} is absent; SLUICE_IMAGENETTE names a copy of Imagenette")
    return root


# Loaders


def config(
    root: Path,
    *,
    batch: int | list[int],
    size_px: int | list[int] = 32,
    threads: int = 2,
    augment: AugmentConfig | None = None,
) -> DataConfig:
    return DataConfig(
        path=str(root), batch=batch, size_px=size_px, threads=threads, augment=augment or AugmentConfig(min_area=0.2)
    )


def decoded(catalog: Catalog, sample: int) -> Image.Image:
    """The sample as torchvision's ImageFolder opens it."""
    return Image.open(catalog.root / catalog.paths[sample]).convert("RGB")


def take(loader: Loader, batches: int | None = None) -> list[Batch]:
    """So many batches, or all of the epoch, each a copy that owns its memory."""
    taken = []
    for batch in loader:
        taken.append(batch._replace(images=batch.images.clone()))
        if len(taken) == batches:
            break
    return taken


def in_order(ranks: Iterable[list[Batch]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and ids of the counted positions of an epoch, from the batches of each of its ranks."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for batches in zip(*ranks, strict=True):
        num_real = sum(batch.num_real for batch in batches)
        columns = zip(*((batch.images, batch.labels, batch.ids) for batch in batches), strict=True)
        parts.append(tuple(torch.stack(column, dim=1).flatten(0, 1)[:num_real] for column in columns))
    images, labels, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels, ids
