"""The built-in dataset: ten classes of drawn figures, rendered to real JPEG files on first use.

A sample is a pure function of (split, class, index). A figure is a set of polygons in the unit disc; it is tilted,
stretched, mirrored, placed one to three times and painted over a cluttered background. Colours, places and sizes say
little about the class: a linear classifier on pixels fails where a small ResNet succeeds within minutes.
"""

import colorsys
import errno
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.common.worker_pool import progress

VERSION = "builtin-v1"  # name of the folder in the cache: raise it whenever a rendered pixel changes
PER_CLASS = {"train": 400, "val": 100}

# float64 throughout: the last bit of a sine differs between processors and must not reach a rounded pixel.
Array = NDArray[np.float64]
Polygons = list[Array]  # each [N, 2], (x, y) with y downwards; a hole runs against the direction of its surrounding
Sample = tuple[str, str, int]  # split, class, index


# ---- the cache ------------------------------------------------------------------------------------------------------


def builtin_dataset() -> Path:
    """Return the folder with `train/<class>/*.jpg` (4,000 files) and `val/<class>/*.jpg` (1,000), rendered first if missing.

    Several processes and machines may call it at once: one renders, the others wait for it.

    Raises:
        UserError: the cache cannot be written.
    """
    return _render_once(cache_path(), PER_CLASS)


def cache_root() -> Path:
    """Return Sluice's cache folder, created if missing: `$SLUICE_CACHE`, else `$XDG_CACHE_HOME/sluice`, else `~/.cache/sluice`.

    Raises:
        UserError: the folder cannot be created or written.
    """
    root = cache_path()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise _unwritable(root, OSError(errno.EACCES, os.strerror(errno.EACCES)))
    return root


def cache_path() -> Path:
    """Return the path of `cache_root`, even if it does not exist. Raises `UserError` where no home folder is known."""
    environ = os.environ
    try:
        if chosen := environ.get("SLUICE_CACHE"):
            return Path(chosen).expanduser().absolute()
        return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "sluice"
    except RuntimeError as error:
        raise UserError(f"cache: {error}; set SLUICE_CACHE to a folder you can write") from error


def _unwritable(root: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cache: cannot write to {root} ({reason}); set SLUICE_CACHE to a folder you can write")


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`, made first if missing: `make` fills an empty folder beside it, which is then renamed.

    Several processes and machines may call it at once: one makes it, the others wait for it and share its `UserError`.

    Raises:
        UserError: what `make` raises, or the folder cannot be written.
    """
    if folder.is_dir():  # checked before the cache must be writable: a finished folder may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "a+", errors="surrogateescape") as lock:
            waited = _lock(lock)
            lock.seek(0)
            # Whoever held the lock has left the folder, or the reason for its failure.
            failure = lock.read() if waited else ""
            if not folder.is_dir():
                if failure:  # another process needed time to find this out, and this one would need as long
                    raise UserError(failure)
                lock.truncate(0)
                try:
                    _make_whole(folder, make)
                except UserError as error:
                    lock.write(str(error))
                    raise
    except OSError as error:
        # Some network file systems lock only within one machine: then each machine makes it, and the first to finish wins.
        if not folder.is_dir():
            raise _unwritable(folder.parent, error) from error
    except UserError:
        if not folder.is_dir():
            raise
    return folder


def _lock(file: IO[str]) -> bool:
    """Lock the file. Returns True where another process held it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    return False


def _make_whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Make it beside `folder`, then rename, so that it exists only when complete. The caller holds this machine's lock."""
    partial = folder.with_name(f"{folder.name}.partial-{socket.gethostname()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        make(partial)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _render_once(root: Path, per_class: Mapping[str, int]) -> Path:
    """Render into `root / VERSION`, unless that exists."""
    folder = root / VERSION

    def render_all(into: Path) -> None:
        samples = [(split, name, i) for split, count in per_class.items() for name in CLASSES for i in range(count)]
        for split, name, index in _with_progress(samples, folder):
            path = into / split / name / f"{name}_{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(split, name, index)).save(path, quality=60 + 7 * index % 36)

    return make_once(folder, render_all)


def _with_progress(samples: list[Sample], folder: Path) -> Iterator[Sample]:
    """Yield the samples, and print on stderr their number and then the progress."""
    print(f"Rendering the built-in dataset ({len(samples):,} images, once) into {folder}", file=sys.stderr, flush=True)
    with progress("rendering", len(samples)) as advance:
        for sample in samples:
            yield sample
            advance(1)


# ---- one image ------------------------------------------------------------------------------------------------------

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the luma of JPEG


def render(split: str, name: str, index: int) -> NDArray[np.uint8]:
    """Draw one sample before compression: [H, W, 3] RGB, or [H, W] gray for one in twelve; H and W in 72..160."""
    rng = Generator(Philox(key=[list(PER_CLASS).index(split) * len(CLASSES) + CLASSES.index(name), index]))
    height, width = _size(rng)
    hue, luma = rng.random(), rng.uniform(0.25, 0.5)
    image = _background(rng, height, width, hue, luma)
    # The background: clutter of about its own luma, so that edges alone do not tell the class.
    for _ in range(rng.integers(2, 6)):
        _paint(image, _clutter(rng, height, width), _colour(rng, rng.random(), luma + rng.uniform(-0.15, 0.15)), 0.6)

    # The figures, often with a shadow, in a hue and luma apart from the background's.
    figures = _placed(rng, FIGURES[name], height, width)
    if rng.random() < 0.5:
        shadow = rng.uniform(0.03, 0.06) * min(height, width)
        _paint(image, [polygon + shadow for polygon in figures], np.zeros(3), 0.3)
    contrast = rng.uniform(0.25, 0.5) * (1 if rng.random() < 0.85 else -1)
    _paint(image, figures, _colour(rng, hue + rng.uniform(0.2, 0.8), luma + contrast), 1.0)
    # Sometimes something lies in front.
    for _ in range(rng.integers(0, 2)):
        _paint(image, _clutter(rng, height, width), _colour(rng, rng.random(), rng.uniform(0.2, 0.8)), 0.8)

    # Light and grain as of a camera; one image in twelve is gray, as in real sets.
    light = 1 + _noise(rng, height, width, 0.2)
    grain = rng.uniform(-0.03, 0.03, (height, width))
    if index % 12 == 11:
        image = image @ LUMA
    else:
        light, grain = light[..., None], grain[..., None]
    return ((image * light + grain).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _size(rng: Generator) -> tuple[int, int]:
    short = int(rng.integers(72, 121))
    long = min(160, int(short * rng.uniform(1, 1.4)))
    return (short, long) if rng.random() < 0.5 else (long, short)


def _colour(rng: Generator, hue: float, luma: float) -> Array:
    """Pick a random saturation: RGB [3] in 0..1 of this hue and luma (kept within 0.05..0.95)."""
    pure = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.3, 0.9), 1.0))
    full, luma = float(pure @ LUMA), min(max(luma, 0.05), 0.95)
    return pure * (luma / full) if luma < full else pure + (1 - pure) * ((luma - full) / (1 - full))


def _background(rng: Generator, height: int, width: int, hue: float, luma: float) -> Array:
    """Draw a slanted, uneven gradient [H, W, 3] between two related colours."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.linspace(-0.5, 0.5, height)[:, None] * np.sin(angle) + np.linspace(-0.5, 0.5, width) * np.cos(angle)
    mix = (0.5 + slope + _noise(rng, height, width, 0.4)).clip(0, 1)[..., None]
    one, other = (_colour(rng, hue + rng.uniform(-0.12, 0.12), luma + shade) for shade in (-0.08, 0.08))
    return one + mix * (other - one)


def _noise(rng: Generator, height: int, width: int, amplitude: float) -> Array:
    """Draw smooth noise [H, W] in ±amplitude: random values on a coarse grid, interpolated."""
    rows, columns = rng.integers(2, 6, 2)
    return _hats(height, rows) @ rng.uniform(-amplitude, amplitude, (rows, columns)) @ _hats(width, columns).T


def _hats(size: int, knots: int) -> Array:
    """Compute weights [size, knots] that interpolate smoothly between evenly spaced knots."""
    hat = (1 - abs(np.linspace(0, knots - 1, size)[:, None] - np.arange(knots))).clip(0, 1)
    return hat * hat * (3 - 2 * hat)


def _clutter(rng: Generator, height: int, width: int) -> Polygons:
    """Draw a small ellipse or a thin bar, anywhere in the image."""
    if rng.random() < 0.6:
        shape = _polygon(20) * rng.uniform(0.04, 0.14) * (1.0, rng.uniform(0.6, 1.0))
    else:
        shape = _polygon(4) * rng.uniform(0.3, 0.7) * (1.0, rng.uniform(0.02, 0.05))
    centre = rng.random(2) * (width, height)
    return [_turn(shape * min(height, width), rng.uniform(0, np.pi)) + centre]


def _placed(rng: Generator, figure: Callable[[Generator], Polygons], height: int, width: int) -> Polygons:
    """Place one to three variants of the figure, apart from each other, in the central square of the image."""
    side, count = min(height, width), int(rng.choice([1, 1, 1, 1, 1, 1, 2, 3]))
    orbit, smallest, largest = {1: (0.0, 0.31, 0.46), 2: (0.25, 0.2, 0.25), 3: (0.27, 0.18, 0.22)}[count]
    first = rng.uniform(0, 2 * np.pi)
    polygons: Polygons = []
    for angle in first + np.arange(count) * (2 * np.pi / count):
        radius = rng.uniform(smallest, largest)
        jitter = rng.uniform(-1, 1, 2) * max(0.0, 0.48 - orbit - radius)
        centre = np.array([width, height]) / 2 + side * (orbit * np.array([np.cos(angle), np.sin(angle)]) + jitter)
        stretch = side * radius * np.array([rng.choice([-1.0, 1.0]), rng.uniform(0.8, 1.0)])
        tilt = rng.uniform(-0.35, 0.35)
        polygons += [_turn(polygon, tilt) * stretch + centre for polygon in figure(rng)]
    return polygons


def _paint(image: Array, polygons: Polygons, colour: Array, opacity: float) -> None:
    """Blend the polygons into `image` [H, W, 3] in place, within their bounding box."""
    points = np.concatenate(polygons)
    corner = np.maximum(np.floor(points.min(axis=0)), 0).astype(int)
    right, bottom = np.ceil(points.max(axis=0)).astype(int)
    window = image[corner[1] : bottom, corner[0] : right]
    cover = _coverage([polygon - corner for polygon in polygons], *window.shape[:2])
    window += (opacity * cover)[..., None] * (colour - window)


def _coverage(polygons: Polygons, height: int, width: int) -> Array:
    """Compute the share of each pixel that the polygons cover, [H, W] in 0..1: exact along x, from four lines a pixel along y.

    Where a line crosses an edge, a span begins (or, on an edge that runs upwards, ends) that reaches to the right
    border. Summing along the rows what begins in each pixel gives the winding number, fractions of cut pixels included.
    """
    starts = np.concatenate(polygons)
    ends = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    lines = (np.arange(4 * height) + 0.5) / 4
    edge, line = np.nonzero((starts[:, 1:] <= lines) != (ends[:, 1:] <= lines))
    (x0, y0), (x1, y1) = starts[edge].T, ends[edge].T
    x = (x0 + (lines[line] - y0) * (x1 - x0) / (y1 - y0)).clip(0, width)
    column = x.astype(np.int64)
    pixel = line // 4 * (width + 2) + column
    weight, cut = np.sign(y1 - y0) / 4, x - column
    size = height * (width + 2)
    begun = np.bincount(pixel, weight * (1 - cut), size) + np.bincount(pixel + 1, weight * cut, size)
    return abs(begun.reshape(height, width + 2).cumsum(axis=1)[:, :width]).clip(0, 1)


# ---- the figures, each about filling the unit disc ---------------------------------------------------------------------


def _polygon(corners: int) -> Array:
    """A regular polygon with one corner at the top."""
    return _points(np.linspace(-np.pi / 2, 1.5 * np.pi, corners, endpoint=False))


def _points(angle: Array) -> Array:
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _turn(polygon: Array, angle: float) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    return polygon @ np.array([[cos, sin], [-sin, cos]])


def _hollow(outline: Array, inner: float) -> Polygons:
    return [outline, inner * outline[::-1]]


def _sometimes_hollow(rng: Generator, outline: Array) -> Polygons:
    return _hollow(outline, rng.uniform(0.5, 0.7)) if rng.random() < 0.2 else [outline]


def _checkerboard(rng: Generator) -> Polygons:
    cells = int(rng.integers(4, 6))
    cell = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 2 / cells - 1
    places = [(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0]
    return [(cell + np.array(place) * 2 / cells) / np.sqrt(2) for place in places]


def _crescent(rng: Generator) -> Polygons:
    """A circle open on one side, closed by an elliptic arc."""
    opening, thickness = rng.uniform(0.5, 0.9), rng.uniform(0.4, 0.6)
    depth = 1 + np.cos(opening) - thickness
    outer = _points(np.linspace(opening, 2 * np.pi - opening, 40))
    inner = _points(np.linspace(-np.pi / 2, np.pi / 2, 24)) * (-depth, np.sin(opening)) + (np.cos(opening), 0)
    return [np.concatenate([outer, inner])]


def _cross(rng: Generator) -> Polygons:
    half = rng.uniform(0.2, 0.32)
    arm = np.array([[1, -half], [1, half], [half, half]])
    return [np.concatenate([_turn(arm, quarter * np.pi / 2) for quarter in range(4)])]


def _heart(rng: Generator) -> Polygons:
    t = np.arange(48) * (2 * np.pi / 48)
    height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _sometimes_hollow(rng, np.stack([16 * np.sin(t) ** 3, -2.5 - height], axis=1) / 17)


def _spiral(rng: Generator) -> Polygons:
    """An Archimedean band, which leaves about its own width between two turns."""
    turns, ink = rng.uniform(2.0, 2.75), rng.uniform(0.4, 0.6)
    t = np.linspace(0.15, 1, 72)
    ray, middle, half = _points(2 * np.pi * turns * t), t[:, None] * (1 - ink / turns), ink / turns / 2
    band = np.concatenate([ray * (middle + half), (ray * (middle - half))[::-1]])
    return [_turn(band, rng.uniform(0, 2 * np.pi))]


def _stripes(rng: Generator) -> Polygons:
    """Bars in any direction, as wide as the gaps between them, cut to a disc."""
    bars, angle = int(rng.integers(4, 7)), rng.uniform(0, np.pi)
    y = (np.arange(2 * bars) + 0.5) / bars - 1
    x = np.sqrt(1 - y * y)
    corners = np.stack([np.stack([-x, y], axis=1), np.stack([x, y], axis=1)])  # [side, edge, 2]
    return [_turn(np.concatenate([corners[:, edge], corners[::-1, edge + 1]]), angle) for edge in range(0, 2 * bars, 2)]


FIGURES: dict[str, Callable[[Generator], Polygons]] = {
    "checkerboard": _checkerboard,
    "crescent": _crescent,
    "cross": _cross,
    "heart": _heart,
    "ring": lambda rng: _hollow(_polygon(48), rng.uniform(0.5, 0.75)),
    "spiral": _spiral,
    "square": lambda rng: _sometimes_hollow(rng, _turn(_polygon(4), np.pi / 4)),
    "star": lambda rng: _sometimes_hollow(rng, _polygon(10) * np.tile([[1.0], [rng.uniform(0.4, 0.5)]], (5, 1))),
    "stripes": _stripes,
    "triangle": lambda rng: _sometimes_hollow(rng, _polygon(3)),
}
CLASSES = tuple(FIGURES)
