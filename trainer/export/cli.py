"""Export a run's best weights for other programs, checked against ours before they are written.

python -m trainer.export RUN --format torchvision|safetensors|onnx|torch_export --out PATH [--data.path FOLDER]

torchvision    a state dict: torchvision.models.NAME(num_classes=N).load_state_dict(torch.load(PATH, weights_only=True))
safetensors    the same without pickle: load_state_dict(safetensors.torch.load_file(PATH)); for timm's networks, into timm's own
onnx           a graph and its weights in one file, for onnxruntime and others
torch_export   the same for torch.export.load

All take normalised images and give logits, in batches of any size. PATH.json describes the preprocessing of an image and
names the classes.
"""

import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, printable, require
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import Catalog, open_catalog
from trainer.config import Config
from trainer.distributed import DistContext
from trainer.export.options import beside
from trainer.model.config import TIMM, is_timm
from trainer.model.normalize import Normalise
from trainer.model.resnet import unknown_to_torchvision
from trainer.scoring import open_trained

HERE = DistContext(torch.device("cpu"), rank=0, world=1, cores=len(os.sched_getaffinity(0)))
"""A GPU is not needed, and its sums differ from a CPU's."""
IMAGES = 32
"""Images of the check."""
TOLERANCE = 1e-4
"""Largest allowed difference of a logit, as a share of the largest logit where that is above 1."""

Network = Callable[[Tensor], Tensor]
"""Function of normalised images [B, 3, H, W] float32 to logits [B, classes] float32, on the CPU."""


class Source(NamedTuple):
    """Network to export."""

    checkpoint: Path
    name: str
    """Name of the model in torchvision, or timm:NAME."""
    network: nn.Module
    classes: list[str]
    thresholds: list[float]
    """Probability of each class from which on an image is of it, where it may be of several; else empty."""


class Format(NamedTuple):
    """Format of a file: packing a network, and running the content in a program that knows nothing of ours."""

    pack: Callable[[Source, Tensor], bytes]
    """Packs a network into a file, given some images for it."""
    run: Callable[[bytes, Source], Network]


def _state(source: Source) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in source.network.state_dict().items()}


def _pack_torchvision(source: Source, _: Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(_state(source), stream)
    return stream.getvalue()


def _pack_safetensors(source: Source, _: Tensor) -> bytes:
    return safetensors.torch.save(_state(source), {"format": "pt"})


def _traced(source: Source, images: Tensor) -> torch.export.ExportedProgram:
    # Two images, as torch would take a batch of one for a constant.
    return torch.export.export(source.network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _pack_torch_export(source: Source, images: Tensor) -> bytes:
    stream = io.BytesIO()
    torch.export.save(_traced(source, images), stream)
    return stream.getvalue()


def _pack_onnx(source: Source, images: Tensor) -> bytes:
    with warnings.catch_warnings(action="ignore"):  # deprecations within the exporter
        program = torch.onnx.export(
            _traced(source, images), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _elsewhere(state: dict[str, Tensor], source: Source) -> Network:
    """The network of that name in timm or torchvision, with these weights."""
    if is_timm(source.name):
        from timm import create_model

        network = create_model(source.name.removeprefix(TIMM), num_classes=len(source.classes))
    else:
        from torchvision import models  # type: ignore[import-untyped] # here, for it takes a second

        network = models.get_model(source.name, num_classes=len(source.classes))
    network.load_state_dict(state)
    return network.eval()


def _run_torchvision(content: bytes, source: Source) -> Network:
    return _elsewhere(torch.load(io.BytesIO(content), weights_only=True), source)


def _run_safetensors(content: bytes, source: Source) -> Network:
    return _elsewhere(safetensors.torch.load(content), source)


def _run_torch_export(content: bytes, _: Source) -> Network:
    return torch.export.load(io.BytesIO(content)).module()


def _run_onnx(content: bytes, _: Source) -> Network:
    import onnxruntime  # imported here: it may be missing

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMATS = {
    "torchvision": Format(_pack_torchvision, _run_torchvision),
    "safetensors": Format(_pack_safetensors, _run_safetensors),
    "onnx": Format(_pack_onnx, _run_onnx),
    "torch_export": Format(_pack_torch_export, _run_torch_export),
}


def export(folder: Path, cfg: Config, name: str, out: Path) -> None:
    """Write the run in `folder` as `out` in the format `name`, and out.json beside it; print how well they agree.

    Raises `UserError`; nothing is then written.
    """
    # Refuse before the network is opened and converted, which takes long.
    kept = beside(out)
    foreign = unknown_to_torchvision(cfg.model)
    require(
        foreign is None
        or name not in ("torchvision", "safetensors")
        or (is_timm(cfg.model.name) and name == "safetensors"),
        f"--format: {name} is for torchvision's networks, of which none has {foreign}; give "
        f"{'safetensors, ' * is_timm(cfg.model.name)}onnx or torch_export",
    )
    # Pack, run the packed content as another program would, and compare: only a file that agrees is written.
    source = open_source(folder, cfg)
    catalog = _some_images(cfg.data, source.classes)
    images = _inputs(cfg.data, catalog)
    content = FORMATS[name].pack(source, images)
    difference = largest_difference(source, FORMATS[name].run(content, source), images)
    about = json.dumps(preprocessing(cfg.data, source), indent=1, ensure_ascii=False)
    # The description first: a file without it could not be used.
    try:
        replace_file(kept, f"{about}\n".encode())
        replace_file(out, content)
    except OSError as error:
        kept.unlink(missing_ok=True)
        raise UserError(f"--out: cannot write {out} ({error.strerror}); give another file") from None
    print(
        f"{printable(str(out))}: {source.name} of {printable(str(source.checkpoint))}, {len(content) / 1e6:.1f} MB\n"
        f"{len(images)} images in {printable(str(catalog.root))}: logits differ by {difference:.1e} at most"
    )


def open_source(folder: Path, cfg: Config) -> Source:
    """Open a run's network with its chosen weights, on the CPU. Raises `UserError`."""
    plain = replace(cfg, engine=replace(cfg.engine, compile="off", precision="fp32"))
    trained = open_trained(folder, plain, HERE)
    network = trained.predict.network.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    return Source(trained.checkpoint, cfg.model.name, network, trained.classes, trained.thresholds.tolist())


def _some_images(cfg: DataConfig, classes: list[str]) -> Catalog:
    """Pick a few validation images of all kinds: the run's, or built-in ones where these are missing."""
    try:
        catalog = open_catalog(cfg, "val", classes)
    except UserError as error:
        print(f"checking on the built-in images, as the run's cannot be opened: {error}", file=sys.stderr)
        catalog = open_catalog(DataConfig(), "val")
    return catalog.part(catalog.spread(IMAGES))


def _inputs(cfg: DataConfig, catalog: Catalog) -> Tensor:
    """Load [N, 3, H, W] float32: all images of `catalog`, cut and normalised as in validation, on the CPU."""
    loader = Loader(replace(cfg, batch=len(catalog), decode="cpu"), catalog, HERE, training=False)
    (batch,) = loader
    return Normalise(cfg.mean, cfg.std, HERE.device)(batch.images).contiguous()


def largest_difference(source: Source, exported: Network, images: Tensor) -> float:
    """Compare the logits of our and the exported network, on `images` together and on the first alone.

    Returns the largest difference. Raises `UserError` where it is above TOLERANCE.
    """
    with torch.inference_mode():
        ours = source.network(images)
        theirs = exported(images)
        difference = max((ours - theirs).abs().max().item(), (ours[:1] - exported(images[:1])).abs().max().item())
    scale = max(1.0, ours.abs().max().item())
    require(
        difference <= TOLERANCE * scale,
        f"--format: the exported logits, up to {scale:.3g}, differ by {difference:.1e} from ours; give another format",
    )
    return difference


def preprocessing(cfg: DataConfig, source: Source) -> dict[str, object]:
    """Describe the preprocessing of an image, and the meaning of the outputs."""
    side = cfg.validation_px
    return {
        "model": source.name,
        "input": f"images: float32 [batch, 3, {side}, {side}], RGB, (pixel / 255 - mean) / std",
        "output": f"logits: float32 [batch, {len(source.classes)}], of the classes in their order",
        "resize_short_side_px": round(side / cfg.eval_crop),
        "interpolation": "bilinear, antialiased",
        "center_crop_px": side,
        "mean": cfg.mean,
        "std": cfg.std,
        "classes": source.classes,
        **({"thresholds": source.thresholds, "probability": "1 / (1 + exp(-logit))"} if source.thresholds else {}),
    }
