"""The built-in dataset: ten classes of drawn figures, rendered to real JPEG files on first use.

A sample is a pure function of (split, class, index). A figure is a set of polygons in the unit disc; it is turned,
stretched, placed one to three times, and painted over a cluttered background. Colour, contrast, place, size and
rotation say nothing about the class, so a linear classifier on pixels fails where a small ResNet succeeds.
"""

import colorsys
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import UserError

VERSION = "builtin-v1"  # the folder's name in the cache: raise it whenever one rendered pixel changes
ROT, BRIGHT = 0.35, 0.85
CLASSES = ("checkerboard", "crescent", "cross", "heart", "ring", "spiral", "square", "star", "stripes", "triangle")
PER_CLASS = {"train": 400, "val": 100}

# float64 throughout: the last bit of a sine differs between processors, and must not reach a rounded pixel.
Array = NDArray[np.float64]
Polygons = list[Array]  # each [N, 2] as (x, y); a hole runs against the direction of its surrounding


# ---- the cache ------------------------------------------------------------------------------------------------------


def builtin_dataset() -> Path:
    """Folder with `train/<class>/*.jpg` (4,000 files) and `val/<class>/*.jpg` (1,000); rendered if it is missing.

    Safe to call from several processes and machines at once: one renders, the others wait for it.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = _cache_path() / VERSION
    if folder.is_dir():  # before asking for a writable cache: a finished one may be read-only
        return folder
    return _render_once(cache_root(), PER_CLASS)


def cache_root() -> Path:
    """Sluice's cache folder, created if missing: `$SLUICE_CACHE`, else `$XDG_CACHE_HOME/sluice`, else `~/.cache/sluice`.

    Raises:
        UserError: the folder cannot be created or written.
    """
    root = _cache_path()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise _unwritable(root, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return root


def _cache_path() -> Path:
    if chosen := os.environ.get("SLUICE_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.path.abspath(caches)) / "sluice"


def _unwritable(root: Path, error: OSError) -> UserError:
    return UserError(f"cache: cannot write {root} ({error.strerror}); set SLUICE_CACHE to a folder you can write")


def _render_once(root: Path, per_class: Mapping[str, int]) -> Path:
    """Render into `root / VERSION` under a lock, unless another process did so while this one waited for the lock."""
    folder = root / VERSION
    try:
        with open(root / f"{VERSION}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _render_whole(folder, per_class)
    except OSError as error:
        raise _unwritable(root, error) from error
    return folder


def _render_whole(folder: Path, per_class: Mapping[str, int]) -> None:
    """Render beside `folder`, then rename: `folder` exists only when complete. The caller holds the lock."""
    for leftover in folder.parent.glob(f"{VERSION}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{VERSION}.partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's folder is private, a shared cache is not
        for split in per_class:
            for name in CLASSES:
                (partial / split / name).mkdir(parents=True)
        samples = [(split, name, i) for split, n in per_class.items() for name in CLASSES for i in range(n)]
        for split, name, index in _with_progress(samples, folder):
            _write_sample(partial, split, name, index)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_sample(folder: Path, split: str, name: str, index: int) -> None:
    pixels = render(split, name, index)
    quality = 60 + 7 * index % 36
    Image.fromarray(pixels).save(folder / split / name / f"{name}_{index:04d}.jpg", quality=quality)


def _with_progress(samples: list[tuple[str, str, int]], folder: Path) -> Iterator[tuple[str, str, int]]:
    """The samples, with a progress bar on stderr if that is a terminal, else after one line there."""
    title = f"Rendering the built-in dataset ({len(samples):,} images, once) into {folder}"
    if not sys.stderr.isatty():
        print(title, file=sys.stderr, flush=True)
        yield from samples
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(samples, title, console=Console(stderr=True), transient=True)


# ---- one image ------------------------------------------------------------------------------------------------------


def render(split: str, name: str, index: int) -> NDArray[np.uint8]:
    """Pixels of one sample: [H, W, 3] uint8 RGB, or [H, W] grayscale for one in twelve; H and W in 72..160."""
    rng = Generator(np.random.Philox(key=[list(PER_CLASS).index(split) * len(CLASSES) + CLASSES.index(name), index]))
    height, width = _draw_size(rng)
    hue, luma = rng.random(), rng.uniform(0.25, 0.5)
    image = _background(rng, height, width, hue, luma)
    for _ in range(rng.integers(2, 6)):
        _paint(image, _clutter(rng, height, width), _colour(rng, rng.random(), luma + rng.uniform(-0.15, 0.15)), 0.6)

    contrast = rng.uniform(0.35, 0.55) * (1 if rng.random() < BRIGHT else -1)
    figures = _place(rng, name, height, width)
    if rng.random() < 0.5:
        _paint(image, [polygon + rng.uniform(0.03, 0.06) * min(height, width) for polygon in figures], np.zeros(3), 0.3)
    _paint(image, figures, _colour(rng, hue + rng.uniform(0.2, 0.8), luma + contrast), 1.0)

    lit = image * (1 + _noise(rng, height, width, 0.2))[..., None] + rng.uniform(-0.03, 0.03, (height, width, 1))
    if index % 12 == 11:
        lit = lit @ LUMA
    return (lit.clip(0, 1) * 255 + 0.5).astype(np.uint8)


LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG


def _draw_size(rng: Generator) -> tuple[int, int]:
    short = int(rng.integers(72, 121))
    long = min(160, int(short * rng.uniform(1, 1.4)))
    return (short, long) if rng.random() < 0.5 else (long, short)


def _colour(rng: Generator, hue: float, luma: float) -> Array:
    """RGB in 0..1, of random saturation and of this luma."""
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.3, 0.9), 1.0))
    full = float(colour @ LUMA)
    luma = min(max(luma, 0.05), 0.95)
    return colour * (luma / full) if luma < full else colour + (1 - colour) * ((luma - full) / (1 - full))


def _noise(rng: Generator, height: int, width: int, amplitude: float) -> Array:
    """Smooth noise [H, W] in ±amplitude: random values on a coarse grid, interpolated."""
    rows, columns = rng.integers(2, 6, 2)
    grid = rng.uniform(-amplitude, amplitude, (rows, columns))
    return _hats(height, rows) @ grid @ _hats(width, columns).T


def _hats(size: int, knots: int) -> Array:
    """Weights [size, knots] of smoothed linear interpolation between evenly spaced knots."""
    hat = (1 - abs(np.linspace(0, knots - 1, size)[:, None] - np.arange(knots))).clip(0, 1)
    return hat * hat * (3 - 2 * hat)


def _background(rng: Generator, height: int, width: int, hue: float, luma: float) -> Array:
    """A slanted gradient [H, W, 3] between two related colours, with smooth noise over it."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.linspace(-0.5, 0.5, height)[:, None] * np.sin(angle) + np.linspace(-0.5, 0.5, width) * np.cos(angle)
    mix = (0.5 + slope + _noise(rng, height, width, 0.4)).clip(0, 1)[..., None]
    ends = [_colour(rng, hue + rng.uniform(-0.12, 0.12), luma + shade) for shade in (-0.08, 0.08)]
    return ends[0] * (1 - mix) + ends[1] * mix


def _clutter(rng: Generator, height: int, width: int) -> Polygons:
    """An ellipse or a thin bar anywhere in the image."""
    size = rng.uniform(0.05, 0.25) if rng.random() < 0.6 else rng.uniform(0.4, 0.8)
    thin = rng.uniform(0.6, 1.0) if size < 0.3 else rng.uniform(0.02, 0.05)
    shape = _ngon(20) if size < 0.3 else _ngon(4)
    stretch = min(height, width) * size * np.array([1.0, thin])
    return _turned([shape * stretch], rng.uniform(0, np.pi), rng.uniform(0, 1, 2) * (width, height))


def _place(rng: Generator, name: str, height: int, width: int) -> Polygons:
    """One to three copies of the figure in the central square of the image, apart from each other."""
    side, count = min(height, width), int(rng.choice([1, 1, 1, 1, 1, 1, 2, 3]))
    orbit, smallest, largest = ((0.0, 0.32, 0.46), (0.25, 0.21, 0.25), (0.27, 0.19, 0.22))[count - 1]
    first = rng.uniform(0, 2 * np.pi)
    figures: Polygons = []
    for angle in first + np.arange(count) * (2 * np.pi / count):
        radius = rng.uniform(smallest, largest)
        jitter = rng.uniform(-1, 1, 2) * max(0.0, 0.48 - orbit - radius)
        centre = np.array([width, height]) / 2 + side * (orbit * np.array([np.cos(angle), np.sin(angle)]) + jitter)
        stretch = side * radius * np.array([rng.choice([-1.0, 1.0]), rng.uniform(0.8, 1.0)])
        turned = _turned(_figure(rng, name), rng.uniform(-ROT, ROT), np.zeros(2))
        figures += _turned([polygon * stretch for polygon in turned], 0, centre)
    return figures


def _turned(polygons: Polygons, angle: float, centre: Array) -> Polygons:
    cos, sin = np.cos(angle), np.sin(angle)
    return [polygon @ np.array([[cos, sin], [-sin, cos]]) + centre for polygon in polygons]


def _paint(image: Array, polygons: Polygons, colour: Array, opacity: float) -> None:
    image += (opacity * _coverage(polygons, *image.shape[:2]))[..., None] * (colour - image)


def _coverage(polygons: Polygons, height: int, width: int) -> Array:
    """Share of each pixel that the polygons cover, [H, W] in 0..1: exact along x, from four lines a pixel along y.

    Each crossing of a line and an edge starts (or, on a falling edge, ends) a span that reaches to the right border;
    the running sum of these starts along a row is the winding number, with the fractions of the pixels cut.
    """
    starts = np.concatenate(polygons)
    ends = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    lines = (np.arange(4 * height) + 0.5) / 4
    edge, line = np.nonzero((starts[:, 1:] <= lines) != (ends[:, 1:] <= lines))
    (x0, y0), (x1, y1) = starts[edge].T, ends[edge].T
    x = (x0 + (lines[line] - y0) * (x1 - x0) / (y1 - y0)).clip(0, width)
    column = x.astype(np.int64)
    cell = line // 4 * (width + 2) + column
    weight, cut = np.sign(y1 - y0) / 4, x - column
    size = height * (width + 2)
    spans = np.bincount(cell, weight * (1 - cut), size) + np.bincount(cell + 1, weight * cut, size)
    return abs(spans.reshape(height, width + 2).cumsum(axis=1)[:, :width]).clip(0, 1)


# ---- figures, each within the unit disc -----------------------------------------------------------------------------


def _figure(rng: Generator, name: str) -> Polygons:
    match name:
        case "checkerboard":
            return _checkerboard(int(rng.integers(4, 6)))
        case "crescent":
            return [_crescent(rng.uniform(0.5, 0.9), rng.uniform(0.4, 0.6))]
        case "cross":
            return [_cross(rng.uniform(0.2, 0.32))]
        case "heart":
            return _maybe_hollow(rng, _heart())
        case "ring":
            return _hollow(_ngon(48), rng.uniform(0.5, 0.75))
        case "spiral":
            return [_spiral(rng.uniform(2.0, 2.75), rng.uniform(0.4, 0.6))]
        case "square":
            return _maybe_hollow(rng, _turned([_ngon(4)], np.pi / 4, np.zeros(2))[0])
        case "star":
            return _maybe_hollow(rng, _ngon(10) * np.tile([[1.0], [rng.uniform(0.4, 0.5)]], (5, 1)))
        case "stripes":
            return _stripes(int(rng.integers(4, 7)))
        case _:
            return _maybe_hollow(rng, _ngon(3))


def _ngon(corners: int) -> Array:
    angle = np.arange(corners) * (2 * np.pi / corners) - np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _hollow(outline: Array, inner: float) -> Polygons:
    return [outline, inner * outline[::-1]]


def _maybe_hollow(rng: Generator, outline: Array) -> Polygons:
    return _hollow(outline, rng.uniform(0.5, 0.7)) if rng.random() < 0.2 else [outline]


def _checkerboard(cells: int) -> Polygons:
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    corners = [(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0]
    return [((square + corner) * 2 / cells - 1) / np.sqrt(2) for corner in corners]


def _stripes(bars: int) -> Polygons:
    """Bars and gaps of one width, cut to a disc."""
    edges = np.linspace(-1, 1, 2 * bars + 1)[:-1].reshape(bars, 2) + 0.5 / bars
    return [
        np.array([[-c0, y0], [c0, y0], [c1, y1], [-c1, y1]])
        for (y0, y1), (c0, c1) in zip(edges, np.sqrt(1 - edges**2), strict=True)
    ]


def _cross(arm: float) -> Array:
    a = arm
    quarter = np.array([[1, -a], [1, a], [a, a]])
    return np.concatenate(
        _turned([quarter], 0, np.zeros(2)) + [_turned([quarter], k * np.pi / 2, np.zeros(2))[0] for k in (1, 2, 3)]
    )


def _crescent(opening: float, thickness: float) -> Array:
    """A unit circle open by ±`opening` radians, closed by an elliptic arc that leaves `thickness` opposite."""
    outer = np.linspace(opening, 2 * np.pi - opening, 40)
    inner = np.linspace(-np.pi / 2, np.pi / 2, 24)
    depth = 1 + np.cos(opening) - thickness
    arcs = [(np.cos(outer), np.sin(outer)), (np.cos(opening) - depth * np.cos(inner), np.sin(opening) * np.sin(inner))]
    return np.concatenate([np.stack(arc, axis=1) for arc in arcs])


def _heart() -> Array:
    t = np.arange(48) * (2 * np.pi / 48)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 17


def _spiral(turns: float, ink: float) -> Array:
    """An Archimedean band that fills the share `ink` of the distance between two turns."""
    t = np.linspace(0.15, 1, 72)[:, None]
    direction = np.concatenate([np.cos(2 * np.pi * turns * t), np.sin(2 * np.pi * turns * t)], axis=1)
    half = ink / turns / 2
    return np.concatenate(
        [direction * (t * (1 - half) + half * 0.5), (direction * (t * (1 - half) - half * 1.5))[::-1]]
    )
