"""The room that is left to DALI on a GPU, of which a loader may speak without one."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.gpu_memory import _DECODER_BYTES, gpu_bytes
from data_pipeline.loader import Loader
from data_pipeline.sharding import RankInfo
from data_pipeline.sources.catalog import open_catalog


@pytest.mark.parametrize(("decode", "pixels"), [("auto", 100 * 50), ("cpu", 0)])
def test_room_for_whole_and_cut_images(decode: str, pixels: int, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (100, 50), (number, 9, 9)).save(tmp_path / name / f"{number}.png")
    cfg = DataConfig(path=str(tmp_path), batch=[4, 2], size_px=[8, 16], prefetch=3, decode=decode)  # type: ignore[arg-type]
    catalog = open_catalog(cfg, "train")
    gpu, cpu = (RankInfo(torch.device(kind), 0, 1, 1) for kind in ("cuda", "cpu"))
    loader = Loader(cfg, catalog, gpu, epochs=4)
    assert loader.shapes() == [(4, 8), (2, 16)]
    most = max(4 * (pixels + 8 * 8), 2 * (pixels + 16 * 16))
    assert gpu_bytes(loader) == _DECODER_BYTES + 3 * 4 * most, "three bytes a pixel, four batches in flight"
    assert gpu_bytes(Loader(cfg, catalog, cpu, epochs=4)) == 0
