"""Limits of a machine, counted by other means, and the sentence about what holds a run back."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from torch import nn

from tests.conftest import picture
from tests.support.runs import SOLO
from trainer.bench import roofline
from trainer.bench.roofline import Rates, Setting, verdict
from trainer.config import Config
from trainer.model.flops import flops_per_image
from trainer.model.resnet import ModelConfig, ModelName

SETTING = Setting(
    cores=2,
    gpu=False,
    precision="bf16",
    best_precision="bf16",
    compile="auto",
    compression="none",
    accumulate=1,
    threads=None,
    decode="auto",
    mfu=0.4,
)
BALANCED = Rates(loader=1000, compute=100, joined=99, end_to_end=97, decode=4000)


@pytest.mark.parametrize(("name", "size_px"), [("resnet18", 32), ("resnet18", 160), ("resnet50", 64)])
def test_flops_are_those_of_every_convolution_and_the_classifier(name: ModelName, size_px: int) -> None:
    """By torchvision's network: two FLOPs a weight and output; thrice for forward, both gradients; twice for the first."""
    model, macs = torchvision.models.get_model(name, num_classes=7).eval(), []

    def note(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(module.weight, torch.Tensor)
        macs.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    with torch.inference_mode():
        model(torch.zeros(1, 3, size_px, size_px))
    assert flops_per_image(ModelConfig(name), 7, size_px) == 6 * sum(macs) - 2 * macs[0]


def test_a_multiplication_counts_two_flops_for_each_pair() -> None:
    assert roofline.matmul("fp32", SOLO)() == 2 * 2048**3


def test_bare_decoding_counts_its_images(tmp_path: Path) -> None:
    for number in range(70):
        path = tmp_path / f"train/{number % 3}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(24, 32, seed=number).save(path)
    act = roofline.decode(tmp_path, 24, SOLO)
    assert act() + act() == 70 and act() + act() == 70


@pytest.mark.parametrize(
    ("rates", "setting", "limit", "option"),
    [
        ({}, {}, "Computation", "no option"),
        ({}, {"precision": "fp32"}, "Computation", "--engine.precision auto"),
        ({}, {"precision": "fp32", "best_precision": "fp32"}, "Computation", "no option"),
        ({}, {"compile": "off"}, "Computation", "--engine.compile auto"),
        ({"end_to_end": 80}, {}, "A share of the machine", "--data.path"),
        ({"end_to_end": 80}, {"threads": 5}, "A share of the machine", "--data.threads 5"),
        ({"end_to_end": 80, "loader": 81}, {}, "The loader", "data_pipeline.pack"),
        ({"end_to_end": 80, "loader": 81}, {"threads": 1}, "The loader", "--data.threads 1"),
        ({"end_to_end": 80, "loader": 81}, {"gpu": True, "decode": "cpu"}, "The loader", "--data.decode auto"),
        ({"end_to_end": 80}, {"gpu": True}, "A share of the machine", "--data.decode cpu"),
        ({"end_to_end": 80}, {"gpu": True, "decode": "cpu"}, "A share of the machine", "--data.path"),
        ({"end_to_end": 80, "loader": 81}, {"gpu": True}, "The loader", "--data.path"),
        ({"end_to_end": 80, "decode": None}, {}, "A share of the machine", "--data.path"),
        ({"joined": 80, "end_to_end": 79}, {}, "Communication", "--engine.compression bf16"),
        ({"joined": 80, "end_to_end": 79}, {"compression": "bf16"}, "Communication", "--optim.accumulate 2"),
        (
            {"joined": 80, "end_to_end": 79},
            {"compression": "fp16", "accumulate": 4},
            "Communication",
            "--optim.accumulate 8",
        ),
        ({"joined": 80, "end_to_end": 60}, {}, "A share of the machine", "--data.path"),
        ({"joined": 60, "end_to_end": 50}, {}, "Communication", "--engine.compression bf16"),
        ({"joined": 103, "end_to_end": 104}, {}, "Computation", "no option"),  # noise: faster than the part alone
    ],
)
def test_what_holds_a_run_back(rates: dict[str, Any], setting: dict[str, Any], limit: str, option: str) -> None:
    sentence = verdict(replace(BALANCED, **rates), replace(SETTING, **setting))
    assert sentence.startswith(limit) and option in sentence and "\n" not in sentence
    sections = asdict(Config())
    for section, name in re.findall(r"--(\w+)\.(\w+)", sentence):
        assert name in sections[section]


def test_shares_are_of_the_time_of_a_step() -> None:
    """By hand: 1/80 s an image end to end, 1/100 alone: a fifth of the time is lost."""
    rates = Rates(loader=81, compute=100, joined=100, end_to_end=80, decode=162)
    assert "20% of the time" in verdict(rates, SETTING) and "50% of the work" in verdict(rates, SETTING)
    rates = Rates(loader=1000, compute=100, joined=75, end_to_end=75)
    assert "25% of the time" in verdict(rates, SETTING)
    rates = Rates(loader=1000, compute=100, joined=98, end_to_end=96)
    assert "96% of the time, at 40% of" in verdict(rates, SETTING)
    rates = Rates(loader=1000, compute=100, joined=103, end_to_end=140)  # a machine that was busy in some rounds
    assert "100% of the time" in verdict(rates, SETTING)
