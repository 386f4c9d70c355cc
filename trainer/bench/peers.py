"""Other trainers on the same images, batch and resolution: the contestants of `bench --peers`.

Each follows its project's own script in its default setting: fp32, eager, NCHW, SGD, DDP over several ranks. They share
one process group and one process a rank with ours, so that all take turns; the worker processes that load their images
are idle outside their turns.
"""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.models import get_model  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from trainer.config import Config
from trainer.distributed import DistContext

PLAIN_STEP, PLAIN_LOOP = "torchvision, step alone", "torchvision, end to end"
_PRINT_EVERY = 10  # optimizer steps
_LR = 1e-3
_EPOCH = 1 << 18  # images: the sample is listed repeatedly, so that no contestant begins epochs all the time


class Race(NamedTuple):
    """Data and settings that every contestant gets."""

    folder: Path
    """Folder with train/CLASS/NUMBER.jpg."""
    cfg: Config
    classes: int
    ctx: DistContext

    @property
    def size_px(self) -> int:
        return self.cfg.data.size_at(self.cfg.run.epochs - 1, self.cfg.run.epochs)

    @property
    def batch(self) -> int:
        """Images of each rank in an optimizer step."""
        return self.cfg.data.batch_at(self.cfg.run.epochs - 1, self.cfg.run.epochs) // self.ctx.world


Training = Iterator[int]
"""Endless iterator: each `next` makes one optimizer step, and gives the number of its images on this rank."""


def _torchvision_step(race: Race) -> Training:
    """Make plain eager steps on synthetic images, without communication."""
    model, optimizer = _torchvision_model(race)
    images = torch.randn(race.batch, 3, race.size_px, race.size_px, device=race.ctx.device)
    labels = torch.randint(race.classes, (race.batch,), device=race.ctx.device)
    while True:
        yield from _updates(model, optimizer, [(images, labels)] * _PRINT_EVERY, race.ctx)


def _torchvision_loop(race: Race) -> Training:
    """Train as references/classification in torchvision does: PIL images from folders, augmented in worker processes."""
    model, optimizer = _torchvision_model(race)
    ddp_model, loader = _distributed(model, race.ctx), _folder_loader(race)
    while True:
        yield from _updates(ddp_model, optimizer, loader, race.ctx)


def _torchvision_model(race: Race) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = get_model(race.cfg.model.name, num_classes=race.classes).to(race.ctx.device)
    return model, _sgd(model, race.cfg)


def _folder_loader(race: Race) -> DataLoader[Any]:
    augment, ctx = race.cfg.data.augment, race.ctx
    area, ratio = (augment.min_area, augment.max_area), (1 / augment.max_ratio, augment.max_ratio)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(race.size_px, area, ratio, antialias=True),
            v2.RandomHorizontalFlip(augment.flip),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(race.cfg.data.mean, race.cfg.data.std),
        ]
    )
    dataset = ImageFolder(race.folder / "train", transform)
    dataset.samples *= -(-_EPOCH // len(dataset.samples))
    shared = ctx.world > 1
    sampler: Sampler[int] | None = DistributedSampler(dataset, ctx.world, ctx.rank) if shared else None
    return DataLoader(
        dataset,
        race.batch,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=ctx.cores,
        pin_memory=ctx.device.type == "cuda",
        drop_last=True,
        persistent_workers=True,
    )


def _timm(race: Race) -> Training:
    """Train with the parts of timm's train.py: its model, its loader with prefetcher, its optimiser."""
    from timm import create_model
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    data, optim, ctx = race.cfg.data, race.cfg.optim, race.ctx
    model = create_model(race.cfg.model.name, num_classes=race.classes).to(ctx.device)
    optimizer = create_optimizer_v2(model, "sgd", lr=_LR, weight_decay=optim.weight_decay, momentum=optim.momentum)

    # The images as often as an epoch needs them, so that no loader starts anew within a turn.
    dataset = create_dataset("", root=str(race.folder), split="train", is_training=True)
    dataset.reader.samples *= -(-_EPOCH // len(dataset.reader.samples))

    # The same crops and flips as ours, and nothing else.
    loader = create_loader(
        dataset,
        input_size=(3, race.size_px, race.size_px),
        batch_size=race.batch,
        is_training=True,
        scale=(data.augment.min_area, data.augment.max_area),
        ratio=(1 / data.augment.max_ratio, data.augment.max_ratio),
        hflip=data.augment.flip,
        color_jitter=0.0,
        mean=tuple(data.mean),
        std=tuple(data.std),
        num_workers=ctx.cores,
        distributed=ctx.world > 1,
        pin_memory=ctx.device.type == "cuda",
        device=ctx.device,
    )
    model = _distributed(model, ctx)
    while True:
        yield from _updates(model, optimizer, loader, ctx)


def _lightning(race: Race) -> Training:
    """Run Lightning's Trainer, which goes to its end once started: in a thread that waits for its turn after every batch."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    # A plain module, as Lightning's examples have it; the callback hands the turn back after each batch.
    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = get_model(race.cfg.model.name, num_classes=race.classes)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = batch
            loss = cross_entropy(self.model(images), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _sgd(self, race.cfg)

    class Pause(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: object) -> None:
            baton.pass_back()
            trainer.should_stop = baton.over

    ctx = race.ctx
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    baton = _Baton()
    # Logs, checkpoints and bars are off: they are no part of the comparison.
    trainer = lightning.Trainer(
        accelerator="gpu" if ctx.device.type == "cuda" else "cpu",
        devices=local_world,
        num_nodes=ctx.world // local_world,
        max_epochs=-1,
        callbacks=[Pause()],
        logger=False,
        log_every_n_steps=_PRINT_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the loader has one
    )
    return baton.turns(lambda: trainer.fit(Classifier(), _folder_loader(race)), race.batch)


class _Baton:
    """Makes a function that would run to its end stop after each of its optimizer steps."""

    def __init__(self) -> None:
        self.over = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None

    def turns(self, run: Callable[[], object], images: int) -> Training:
        thread = threading.Thread(target=self._serve, args=(run,), daemon=True)
        thread.start()
        try:
            while True:
                self._go.release()
                self._done.acquire()
                if self._failure:
                    raise self._failure
                yield images
        finally:
            self.over = True
            self._go.release()
            thread.join()

    def pass_back(self) -> None:
        """End an optimizer step, and wait until the next one is wanted."""
        self._done.release()
        self._go.acquire()

    def _serve(self, run: Callable[[], object]) -> None:
        self._go.acquire()
        try:
            run()
        except BaseException as error:
            self._failure = error
        self._done.release()


def _updates(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any], ctx: DistContext
) -> Iterator[int]:
    """Make one optimizer step for each batch of images [B, 3, H, W] float32 and labels [B], in the usual loop of scripts."""
    model.train()
    for number, (images, labels) in enumerate(batches):
        images, labels = images.to(ctx.device, non_blocking=True), labels.to(ctx.device, non_blocking=True)
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % _PRINT_EVERY == 0:
            loss.item()
        yield len(images)


def _sgd(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=_LR, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay)


def _distributed(model: nn.Module, ctx: DistContext) -> nn.Module:
    if ctx.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[ctx.device.index] if ctx.device.type == "cuda" else None)


class Contestant(NamedTuple):
    train: Callable[[Race], Training]
    needs: str = ""
    """Package that may be missing."""


CONTESTANTS = {
    PLAIN_STEP: Contestant(_torchvision_step),
    PLAIN_LOOP: Contestant(_torchvision_loop),
    "timm, end to end": Contestant(_timm, "timm"),
    "Lightning, end to end": Contestant(_lightning, "lightning"),
}
