"""A loss, a gradient or a weight that is not finite, and ranks whose weights come apart: nothing of it reaches a checkpoint."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline import sampling
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError
from data_pipeline.loader import Batch
from tests.support import warm
from tests.support.runs import BATCH, EPOCHS, SOLO, STEPS, TRAIN, Job, checkpoint, dotted, rows, settings_of
from trainer import __main__ as training
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.store import Store
from trainer.config import load
from trainer.distributed import DistContext
from trainer.engine.base import StepSums
from trainer.engine.ddp import DdpEngine
from trainer.loop import fit
from trainer.model.resnet import ModelConfig, ResNet, build_resnet
from trainer.resilience.sanity_checks import differing, find_nonfinite
from trainer.resilience.signals import StopFlag
from trainer.tracking.meter import BadStep, Meter

BAD_STEP = 7
"""The second of the five updates of the second epoch."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the update that makes it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaled", "wanted"), [(False, BadStep(2, "gradient")), (True, BadStep(3, "loss"))])
def test_the_first_bad_step_is_found(scaled: bool, wanted: BadStep) -> None:
    """With loss scaling, a gradient beyond its range is nothing unusual."""
    meter = Meter(SOLO, [], 10, scaled=scaled)
    for loss, norm in ((1.0, 1.0), (1.0, float("inf")), (float("nan"), float("nan")), (1.0, 1.0)):
        meter.add(torch.tensor([loss, 0, 0, 1, norm], dtype=torch.float64))
    meter.reduce(0.0)
    assert meter.nonfinite == wanted
    meter.add(torch.ones(len(StepSums._fields), dtype=torch.float64))
    assert meter.reduce(3.0)[1] == [3.0] and meter.nonfinite is None


# ---- weights ---------------------------------------------------------------------------------------------------------


def network() -> ResNet:
    torch.manual_seed(0)
    return build_resnet(ModelConfig("resnet18"), 7).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["layer2.0.conv1.weight", "fc.bias", "layer4.1.bn2.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_and_statistics_that_are_not_finite(name: str, value: float) -> None:
    module = network()
    assert find_nonfinite(module, SOLO) is None
    module.state_dict()[name].view(-1 if name != "layer2.0.conv1.weight" else module.state_dict()[name].shape)[-1] = (
        value
    )
    assert find_nonfinite(module, SOLO) == name


def test_the_minority_is_named() -> None:
    names = ["first", "second"]
    assert differing(torch.tensor([[1, 2], [1, 2]]), names) == (None, [])
    assert differing(torch.tensor([[1, 2], [1, 3]]), names) == ("second", [1])
    assert differing(torch.tensor([[1, 3], [1, 2], [1, 2]]), names) == ("second", [0])
    assert differing(torch.tensor([[1, 2], [5, 3], [1, 2], [4, 2]]), names) == ("first", [1, 3])


def flip_bit(weight: Tensor) -> None:
    """The lowest one of the first element."""
    weight.detach().flatten()[:1].view(torch.int32).bitwise_xor_(1)


def check_on_two_ranks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    ctx, module = DistContext(torch.device("cpu"), rank, 2, 1), network()
    mean = module.get_buffer("bn1.running_mean")
    mean += rank
    found = [find_nonfinite(module, ctx)]
    if rank == 1:
        mean[3] = torch.nan
    found.append(find_nonfinite(module, ctx))
    if rank == 1:
        flip_bit(module.fc.bias)
    try:
        find_nonfinite(module, ctx)
    except UserError as error:
        found.append(str(error))
    torch.save(found, folder / f"rank {rank}")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """Statistics are each rank's own; what is not finite on one is found on both, and so is one bit of a weight."""
    warm.start_ranks(check_on_two_ranks, (tmp_path,), 2)
    first, second = (torch.load(tmp_path / f"rank {rank}", weights_only=True) for rank in (0, 1))
    assert first == second and first[:2] == [None, "bn1.running_mean"]
    assert first[2].startswith("the weights have come apart: fc.bias on rank 1 is not what the other ranks have; ")


# ---- training --------------------------------------------------------------------------------------------------------


def is_bad(micro_batches: list[Batch]) -> bool:
    """Return True for step BAD_STEP, recognised by the image that its first row begins with."""
    firsts = [sampling.order(0, epoch, TRAIN)[seen] for epoch in range(EPOCHS) for seen in range(0, TRAIN, BATCH)]
    assert firsts.count(firsts[BAD_STEP - 1]) == 1
    return int(micro_batches[0].ids[0]) == firsts[BAD_STEP - 1]


class Exploding(DdpEngine):
    """The images of one update are NaN, on rank 0."""

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        if is_bad(micro_batches):
            micro_batches = [batch._replace(images=batch.images.float() * torch.nan) for batch in micro_batches]
        return super().step(micro_batches, lr)


class Skipping(DdpEngine):
    """Leaves that one update out: what a training is compared with that has stepped back."""

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        return (
            torch.zeros(len(StepSums._fields), dtype=torch.float64)
            if is_bad(micro_batches)
            else super().step(micro_batches, lr)
        )


class Flipping(DdpEngine):
    """A bit of rank 1's weights flips in the course of the training."""

    def step(self, micro_batches: list[Batch], lr: float) -> Tensor:
        sums = super().step(micro_batches, lr)
        if self.ctx.rank == 1 and self.updates == 4:
            flip_bit(self.module.get_parameter("fc.bias"))
        return sums


def trained(base: Path, run: Path, engine: type[DdpEngine] = DdpEngine, **options: str) -> Progress:
    cfg = load(dotted(settings_of(base, run) | {name.replace("__", "."): value for name, value in options.items()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.setup.parts.DdpEngine", engine)
        return fit(cfg, SOLO, StopFlag())


def assert_finite(run: Path) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values()), folder


def test_overflow_stops_the_run(base: Path, tmp_path: Path) -> None:
    """By a learning rate beyond reason; the checkpoint before is whole and finite."""
    with pytest.raises(
        UserError, match=r"the (loss|gradient) of step 2 is not finite; lower optim\.lr, .*on_nonfinite back"
    ):
        trained(base, tmp_path / "run", optim__lr="1e30", run__save_every="1")
    assert Store(tmp_path / "run").progress().step == 1
    assert_finite(tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


def test_overflow_of_the_weights_alone(base: Path, tmp_path: Path) -> None:
    """Loss and gradient of the update are sound, and only what it makes of the weights is not."""
    with pytest.raises(UserError, match=r"the weight \S+ of step 1 is not finite; lower optim\.lr"):
        trained(base, tmp_path / "run", optim__lr="3e38", optim__warmup="0", run__save_every="1")
    assert Store(tmp_path / "run").newest() is None


def test_three_steps_back_are_enough(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"of step 5 is not finite, and 3 steps back have not helped; lower optim\.lr"):
        trained(base, tmp_path / "run", optim__lr="1e30", run__save_every="1", run__on_nonfinite="back")
    assert Store(tmp_path / "run").progress().skipped == [2, 3, 4]
    with pytest.raises(UserError, match=r"of step 2 is not finite, and there is no checkpoint to step back to; lower"):
        trained(base, tmp_path / "other", optim__lr="1e30", run__on_nonfinite="back")


def test_a_step_back(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends as a run that has left the update out from the start; stopped and resumed in between it does, too."""
    whole, stopped, wanted = (tmp_path / name for name in ("whole", "stopped", "wanted"))
    back = {"run__on_nonfinite": "back", "run__log_every": "2"}
    assert trained(base, whole, Exploding, **back).skipped == [BAD_STEP]
    said = capsys.readouterr().out
    assert said.count(f"bad step: the loss of step {BAD_STEP} is not finite\n") == 1
    assert said.count(f"back to step 6, and on past the images of step {BAD_STEP}\n") == 1 and "resuming" not in said

    assert trained(base, stopped, Exploding, run__max_steps="9", **back).skipped == [BAD_STEP]
    assert trained(base, stopped, Exploding, **back).skipped == [BAD_STEP]
    assert capsys.readouterr().out.count("back to step") == 1, "a resumed run knows what to pass over"
    assert trained(base, wanted, Skipping, **back).skipped == []
    assert Store(whole).progress().finished and Store(whole).progress().step == STEPS
    for name in ("model.safetensors", "training.pt"):
        assert checkpoint(whole)[name] == checkpoint(stopped)[name] == checkpoint(wanted)[name], name
    steps = [row["step"] for row in rows(whole) if "train/lr" in row]
    assert steps == sorted(set(steps)), "none is there twice"
    assert_finite(whole)


# ---- processes -------------------------------------------------------------------------------------------------------


def faulty(engine: str, base: Path, run: Path, **options: str) -> Job:
    """A training of two ranks with one of the engines above."""
    settings = settings_of(base, run) | {name.replace("__", "."): value for name, value in options.items()}
    return Job(
        2, run.with_name(run.name + ".log"), "tests.trainer.resilience.test_sanity_checks", engine, *dotted(settings)
    )


@pytest.mark.slow
def test_a_step_back_of_two_ranks_that_are_killed(base: Path, tmp_path: Path) -> None:
    """After the step back, and before the next checkpoint; then after that."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job = faulty("Exploding", base, whole, run__on_nonfinite="back")
    assert job.wait() == 0, job.output()
    assert Store(whole).progress().skipped == [BAD_STEP]
    for step in (8, 10):
        job = faulty("Exploding", base, killed, run__on_nonfinite="back")
        job.wait_for_step(killed, step)
        job.kill()
    job = faulty("Exploding", base, killed, run__on_nonfinite="back")
    assert job.wait() == 0, job.output()
    assert Store(killed).progress().skipped == [BAD_STEP]
    for name in ("model.safetensors", "training.pt"):
        assert checkpoint(killed)[name] == checkpoint(whole)[name], name


def test_ranks_that_come_apart(base: Path, tmp_path: Path) -> None:
    """Before step 6 is saved. The same command then goes on from step 3, as a sound run of two ranks does."""
    run = tmp_path / "run"
    job = faulty("Flipping", base, run)
    assert job.wait() == 1, job.output()
    lines = re.findall(r"^error: (.*)$", job.output(), re.MULTILINE)
    assert len(lines) == 1 and lines[0].startswith("the weights have come apart: fc.bias on rank 1 is not what ")
    assert Store(run).progress().step == 3 and not list((run / "checkpoints").glob(".partial*"))


if __name__ == "__main__":
    engine = {name: kind for name, kind in globals().items() if isinstance(kind, type) and issubclass(kind, DdpEngine)}
    with pytest.MonkeyPatch.context() as replaced:
        replaced.setattr("trainer.setup.parts.DdpEngine", engine[sys.argv.pop(1)])
        run_command(training.main)
