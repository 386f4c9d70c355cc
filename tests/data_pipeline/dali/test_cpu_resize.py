"""The CPU's own resize, through the real graph: against PIL and DALI; how it is compiled; which device decodes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.common.numba_cache import may_cache
from data_pipeline.config import DataConfig
from data_pipeline.dali import cpu_resize, graph
from data_pipeline.dali.cpu_resize import Addresses
from tests.conftest import ROOT, encode, picture

Bytes = NDArray[np.uint8]


class Window(NamedTuple):
    """In source pixels; left > right mirrors, top > bottom too."""

    top: float
    left: float
    bottom: float
    right: float


WINDOWS: list[tuple[tuple[int, int], Window]] = [
    ((90, 131), Window(0, 0, 90, 131)),  # all of it
    ((90, 131), Window(13, 40, 71, 99)),
    ((90, 131), Window(13, 99, 71, 40)),
    ((90, 131), Window(71, 40, 13, 99)),
    ((90, 131), Window(80, 131, 0, 1)),
    ((90, 131), Window(12.25, 7.6, 80.125, 120.9)),  # as in validation
    ((90, 131), Window(0.4, 33.3, 89.6, 33.9)),  # a part of a column
    ((90, 131), Window(50, 60, 51, 61)),  # one pixel and what the filter sees around it
    ((224, 224), Window(0, 0, 224, 224)),
    ((224, 224), Window(31, 200, 201, 5)),
    ((151, 60), Window(0, 60, 151, 0)),
    ((1, 1), Window(0, 0, 1, 1)),
    ((1, 77), Window(0, 10, 1, 70)),
    ((77, 1), Window(10, 0, 70, 1)),
    ((2, 3), Window(0, 3, 2, 0)),
    ((3, 700), Window(0, 5, 3, 690)),
    ((600, 800), Window(17.5, 33.25, 590.5, 790.75)),
]
"""Height and width of an image, and a window in it."""

SIZES_PX = [8, 33, 64, 224]


@pytest.fixture(scope="module")
def kernel() -> Addresses:
    compiled = graph.cpu_kernel()
    assert compiled
    return compiled


def resized(
    streams: list[bytes], windows: list[Window], size_px: int, *, threads: int = 2, batch: int | None = None
) -> Bytes:
    """[N, size_px, size_px, 3] by the graph that training uses on a CPU."""
    batch = batch or len(streams)
    encoded = [np.frombuffer(stream, np.uint8) for stream in streams]
    roi = np.array(windows, np.float32)
    parts = [slice(at, at + batch) for at in range(0, len(streams), batch)]
    inputs = [(encoded[part], list(roi[part, :2]), list(roi[part, 2:])) for part in parts]
    source = iter(inputs)
    pipeline = graph.build_graph(
        lambda: next(source), batch=batch, size_px=size_px, rotate=False, operators=[], gpu=None, threads=threads
    )
    return np.concatenate([np.array(pipeline.run()[0].as_tensor()) for _ in inputs])


def by_pil(image: Image.Image, window: Window, size_px: int) -> Bytes:
    top, left, bottom, right = (float(np.float32(edge)) for edge in window)
    box = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
    pixels = np.asarray(image.convert("RGB").resize((size_px, size_px), Image.Resampling.BILINEAR, box=box))
    return pixels[:: -1 if top > bottom else 1, :: -1 if left > right else 1]


def difference(first: Bytes, second: Bytes) -> NDArray[np.int64]:
    return np.abs(first.astype(np.int64) - second)


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "cpu_kernel", lambda: None)


# Pixels


@pytest.mark.parametrize("size_px", SIZES_PX)
def test_levels_differ_from_pils_by_at_most_one(kernel: Addresses, size_px: int) -> None:
    images = [picture(*shape, seed=number) for number, (shape, _) in enumerate(WINDOWS)]
    windows = [window for _, window in WINDOWS]
    result = resized([encode(image, "PNG") for image in images], windows, size_px)
    for image, window, pixels in zip(images, windows, result, strict=True):
        levels = difference(pixels, by_pil(image, window, size_px))
        assert levels.max() <= 1 and levels.mean() < 0.3, (image.size, window)


@pytest.mark.parametrize("size_px", SIZES_PX)
def test_levels_differ_from_dalis_by_at_most_one(
    kernel: Addresses, size_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But at the edge of the source: DALI's filter takes its pixels to go on for ever, where PIL's and ours end there."""
    streams = [encode(picture(*shape, seed=number), "JPEG") for number, (shape, _) in enumerate(WINDOWS)]
    windows = [window for _, window in WINDOWS]
    ours = resized(streams, windows, size_px)
    without_kernel(monkeypatch)
    levels = difference(ours, resized(streams, windows, size_px))[:, 1:-1, 1:-1]
    assert levels.max() <= 1 and levels.mean() < 0.1


@pytest.mark.parametrize("size_px", [64, 224])
def test_levels_of_real_images_differ_from_pils_by_at_most_two(
    kernel: Addresses, size_px: int, imagenette: Path
) -> None:
    """One for the resize, one for the decoder of another version."""
    files = sorted((imagenette / "train").rglob("*.JPEG"))[::300]
    images = [Image.open(file) for file in files]
    draw = np.random.default_rng(0)
    windows = []
    for image in images:
        (left, right), (top, bottom) = (np.sort(draw.uniform(0, side, 2)) for side in image.size)
        windows.append(Window(top, right, bottom, left) if draw.random() < 0.5 else Window(top, left, bottom, right))
    result = resized([file.read_bytes() for file in files], windows, size_px)
    reference = np.stack([by_pil(image, window, size_px) for image, window in zip(images, windows, strict=True)])
    levels = difference(result, reference)
    assert len(files) > 30 and levels.max() <= 2 and levels.mean() < 0.25


def test_a_mirrored_window_gives_the_exact_mirror_image(kernel: Addresses) -> None:
    streams = [encode(picture(*shape), "PNG") for shape, _ in WINDOWS]
    windows = [window for _, window in WINDOWS]
    plain = resized(streams, windows, 48)
    mirrored = resized(streams, [Window(w.top, w.right, w.bottom, w.left) for w in windows], 48)
    upside_down = resized(streams, [Window(w.bottom, w.left, w.top, w.right) for w in windows], 48)
    assert np.array_equal(mirrored, plain[:, :, ::-1])
    assert np.array_equal(upside_down, plain[:, ::-1])


def test_pixels_depend_neither_on_threads_nor_on_the_batch(kernel: Addresses) -> None:
    streams = [encode(picture(*shape), "PNG") for shape, _ in WINDOWS] * 8
    windows = [window for _, window in WINDOWS] * 8
    first = resized(streams, windows, 40, threads=1)
    assert np.array_equal(first[:17], first[-17:])
    assert np.array_equal(resized(streams, windows, 40, threads=4, batch=17), first)


def test_one_colour_stays_that_colour(kernel: Addresses) -> None:
    for level in (0, 1, 127, 254, 255):
        stream = encode(Image.new("RGB", (61, 47), (level, 255 - level, level)), "PNG")
        (pixels,) = resized([stream], [Window(3.3, 55.5, 40.1, 2.2)], 50)
        assert np.array_equal(np.unique(pixels.reshape(-1, 3), axis=0), [[level, 255 - level, level]])


# Compilation

RESIZE = """
import sys
import numpy as np
from data_pipeline.dali import graph
encoded, window = np.frombuffer(open(sys.argv[1], "rb").read(), np.uint8), np.float32([[3, 5], [40, 50]])
def build():
    return graph.build_graph(lambda: ([encoded], [window[0]], [window[1]]), batch=1, size_px=24, rotate=False,
                             operators=[], gpu=None, threads=1)
for pipeline in (build(), build()):
    pixels = np.array(pipeline.run()[0].as_tensor())
print(graph.cpu_kernel() is not None, pixels.astype(int).sum())
"""


def start(script: str, image: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(image)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    picture(60, 80).save(path)
    return path


@pytest.mark.slow
def test_processes_that_start_at_once_share_one_cache(image: Path, tmp_path: Path) -> None:
    """And those that come later compile nothing."""
    cache = tmp_path / "cache"
    cache.mkdir()

    def finished(processes: list["subprocess.Popen[str]"]) -> list[str]:
        outputs = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), outputs
        return [output for output, _ in outputs]

    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.nb*")}

    ranks = finished([start(RESIZE, image, NUMBA_CACHE_DIR=str(cache)) for _ in range(2)])
    compiled = files()
    assert ranks[0] == ranks[1] and ranks[0].startswith("True") and compiled
    assert finished([start(RESIZE, image, NUMBA_CACHE_DIR=str(cache))]) == ranks[:1]
    assert files() == compiled


def test_a_cache_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numba runs what it finds there."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert may_cache(cpu_resize.compiled, "it")
    (folder,) = tmp_path.iterdir()
    folder.chmod(0o777)
    assert not may_cache(cpu_resize.compiled, "it")
    assert capsys.readouterr().err.endswith(
        f"everybody may write to {folder}; mend that, or set NUMBA_CACHE_DIR to a folder of your own\n"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_without_numba_dali_resizes_and_rank_0_says_so_once(image: Path, rank: int) -> None:
    script = "import sys; sys.modules['numba'] = None" + RESIZE
    process = start(script, image, RANK=str(rank), PYTHONWARNINGS="ignore")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    used, total = output.split()
    reference = by_pil(Image.open(image), Window(3, 5, 40, 50), 24).astype(int)
    assert used == "False" and abs(int(total) - reference.sum()) < reference.size
    said = [line for line in errors.splitlines() if "numba" in line]
    assert len(said) == (rank == 0) and all("DALI resizes" in line for line in said)


def test_an_input_of_another_shape_is_an_error(kernel: Addresses) -> None:
    """The compiled code cannot raise, and must not read what is not there."""
    encoded = [np.frombuffer(encode(picture(20, 20), "PNG"), np.uint8)]
    corner = [np.zeros(2, np.float32)]
    pipeline = graph.build_graph(
        lambda: (encoded, corner, [np.zeros(1, np.float32)]),
        batch=1,
        size_px=16,
        rotate=False,
        operators=[],
        gpu=None,
        threads=1,
    )
    with pytest.raises(RuntimeError, match="resize"):
        pipeline.run()


def test_no_file_is_left_for_a_killed_process_to_leave(kernel: Addresses) -> None:
    encoded = [np.frombuffer(encode(picture(20, 20), "PNG"), np.uint8)]
    corners = [np.zeros(2, np.float32)], [np.full(2, 20, np.float32)]
    pipeline = graph.build_graph(
        lambda: (encoded, *corners), batch=1, size_px=16, rotate=False, operators=[], gpu=None, threads=1
    )
    generated = [module for name, module in sys.modules.items() if name.startswith("__autograph_generated_file")]
    assert generated and not any(Path(str(module.__file__)).exists() for module in generated)
    pipeline.run()


# Devices


def serialised(cfg: DataConfig, *, rotate: bool = True) -> bytes:
    """The graph for a GPU; there need not be one."""
    pipeline = pipeline_def(graph.images_of)(
        lambda: ([],) * 4,
        size_px=32,
        rotate=rotate,
        operators=[],
        on_gpu=True,
        cfg=cfg,
        batch_size=4,
        num_threads=1,
        device_id=None,
    )
    stream: bytes = pipeline.serialize()
    return stream


def devices(stream: bytes) -> dict[str, str]:
    found = re.findall(
        rb"device\W+string\W+(?:\w\W+)?(cpu|gpu|mixed)\W.*?_display_name\W+string\W+(?:\w\W+)?(\w+)", stream, re.S
    )
    return {name.decode(): device.decode() for device, name in found}


@pytest.mark.parametrize("decode", ["auto", "gpu"])
def test_a_gpu_decodes_unless_told_otherwise(decode: Any) -> None:
    stream = serialised(DataConfig(decode=decode, hw_decoder_load=0.625, preallocate_width_hint=513))
    assert devices(stream) == {"external_source": "cpu", "image": "mixed", "resize": "gpu", "rotate": "gpu"}
    assert b"hw_decoder_load" in stream and np.float32(0.625).tobytes() in stream
    assert b"preallocate_width_hint" in stream and b"preallocate_height_hint" in stream


def test_a_cpu_may_decode_for_a_gpu() -> None:
    stream = serialised(DataConfig(decode="cpu"))
    found = devices(stream)
    assert {name: found[name] for name in ("image", "resize", "rotate")} == {
        "image": "cpu",
        "resize": "cpu",
        "rotate": "gpu",
    }
    assert b"hw_decoder_load" not in stream


def test_decoding_on_a_gpu_needs_one() -> None:
    with pytest.raises(UserError, match=r"^data\.decode: gpu, but there is no GPU here; give auto or cpu$"):
        graph.build_graph(
            lambda: ([],) * 3,
            batch=1,
            size_px=16,
            rotate=False,
            operators=[],
            gpu=None,
            threads=1,
            cfg=DataConfig(decode="gpu"),
        )


@pytest.mark.parametrize(
    "option",
    [{"decode": "tpu"}, {"hw_decoder_load": 1.5}, {"preallocate_width_hint": -1}, {"preallocate_height_hint": -1}],
)
def test_options_out_of_range_are_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(UserError, match=rf"^data\..*{name}"):
        DataConfig(**option)
