"""The teacher of a distillation: a trained network whose answers another one learns beside the labels."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError, printable, require
from trainer.checkpoint.files import load_weights, read_classes, read_metadata
from trainer.checkpoint.store import Store
from trainer.config import load_run
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig, Precision
from trainer.engine.prediction import Predictor
from trainer.model.config import ModelConfig, is_timm, is_torchvision
from trainer.model.network import build_network
from trainer.model.normalize import Normalise
from trainer.model.pretrained import load_weights_to_start, preprocessing

_IMAGENET = 1000
SHOWN = 3  # classes named in a line


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode that answers in the classes of the one that it teaches."""

    predict: Predictor
    columns: Tensor
    """[classes] int64: the output for each class."""
    digest: str
    """Digest of its weights, by which a resumed run knows that they are the same."""
    line: str
    """Line for the user that says what was taken."""

    def __call__(self, images: Tensor) -> Tensor:
        """Compute logits [B, classes] float32 of images [B, 3, H, W] uint8, in the teacher's own precision."""
        return self.predict(images)[:, self.columns]


def open_teacher(name: str, classes: list[str], engine: EngineConfig, ctx: DistContext) -> Teacher:
    """Open a run folder, or weights of torchvision or timm, to teach `classes`. Collective. Raises `UserError`, on every rank."""
    if is_torchvision(name) or is_timm(name):
        theirs: list[str] | None = None
        network, normalise = _published(name, ctx)
        precision = engine.precision
    else:
        network, theirs, normalise, precision = ctx.raise_together(lambda: _of_run(Path(name), ctx))
    columns, order = ctx.raise_together(lambda: _columns(name, theirs, classes))
    network.to(ctx.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    predict = Predictor(network, normalise, replace(engine, precision=precision), ctx.device)
    line = f"optim.teacher: {name}, in {predict.autocast.precision}, {order}"
    return Teacher(predict, torch.tensor(columns, device=ctx.device), _digest(network), line)


def check_teacher(metadata: dict[str, str], checkpoint: Path) -> None:
    """Raise `UserError` where the weights in `checkpoint` had another teacher than this `metadata` names."""
    require(
        read_metadata(checkpoint).get("teacher") == metadata.get("teacher"),
        "optim.teacher: its weights are not those with which the run was started; restore them, or give another --run.dir",
    )


def _published(name: str, ctx: DistContext) -> tuple[nn.Module, Normalise]:
    """Load a network of torchvision's or timm's, and its normalisation. Collective. Raises `UserError`, on every rank."""
    try:
        cfg = ModelConfig(name.partition(".")[0] if is_timm(name) else name.partition("_")[0].lower(), weights=name)
        network, known = build_network(cfg, _IMAGENET), preprocessing(name)
        told = load_weights_to_start(network, cfg, [], ctx)
    except UserError as error:
        raise UserError(re.sub(r"^model\.(weights|name)", "optim.teacher", str(error))) from None
    require(
        "head included" in told,
        f"optim.teacher: {name} is for other classes than ImageNet's {_IMAGENET}; give others, or a run folder",
    )
    return network, Normalise(known["mean"], known["std"], ctx.device)


def _of_run(folder: Path, ctx: DistContext) -> tuple[nn.Module, list[str], Normalise, Precision]:
    """Open a run's network with its chosen weights, its classes, its normalisation and its precision. Raises `UserError`."""
    require(
        folder.is_dir(),
        f"optim.teacher: {folder} is neither a run folder nor weights of torchvision or timm, such as "
        "ResNet50_Weights.IMAGENET1K_V2",
    )
    cfg, checkpoint = load_run(folder, []), Store(folder).chosen()
    classes = read_classes(checkpoint) if checkpoint else None
    if checkpoint is None or classes is None:
        raise UserError(f"optim.teacher: {folder} has no complete checkpoint yet; train it first")
    require(
        not read_metadata(checkpoint).get("labels"),
        f"optim.teacher: {folder} was trained on images of several classes, whose answers are no shares of one; "
        "give a run on images with one class each",
    )
    network = build_network(cfg.model, len(classes))
    load_weights(network, checkpoint)
    return network, classes, Normalise(cfg.data.mean, cfg.data.std, ctx.device), cfg.engine.precision


def _columns(name: str, theirs: list[str] | None, classes: list[str]) -> tuple[list[int], str]:
    """Find the teacher's output for each class, and say how. Raises `UserError` where it does not know one."""
    if theirs is None:
        if not all(re.fullmatch(r"n\d{8}", label) for label in classes):
            require(
                len(classes) == _IMAGENET,
                f"optim.teacher: {name} knows ImageNet's {_IMAGENET} classes, and the {len(classes)} here do not have their "
                "names, such as n01440764; give a run folder that was trained on these classes",
            )
            ends = printable(f"{classes[0]} to {classes[-1]}")
            return list(range(_IMAGENET)), f"its {_IMAGENET} outputs taken in the order of the classes, {ends}"
        from timm.data import ImageNetInfo  # here: it imports all of timm

        theirs = ImageNetInfo().label_names()
    missing = [label for label in classes if label not in theirs]
    require(
        not missing,
        f"optim.teacher: {name} does not know {len(missing)} of the {len(classes)} classes "
        f"({', '.join(missing[:SHOWN])}{', …' * (len(missing) > SHOWN)}); give one that was trained on them",
    )
    place = {label: number for number, label in enumerate(theirs)}
    columns = [place[label] for label in classes]
    return columns, f"which knows all {len(classes)} of its {len(theirs)} classes here by name"


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
