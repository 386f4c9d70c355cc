"""Weights to start from: every kind of file, the download, and what is refused; torchvision's and timm's networks judge."""

import argparse
import hashlib
import json
import os
import pickle
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights  # type: ignore[import-untyped]

from data_pipeline.common.errors import UserError
from tests.support import warm
from tests.support.runs import SOLO
from tests.trainer.engine.test_engine import join
from trainer.checkpoint.files import METADATA, WEIGHTS
from trainer.config import Config, load, load_run, to_yaml
from trainer.distributed import DistContext
from trainer.model.pretrained import load_weights_to_start, preprocessing
from trainer.model.resnet import ModelConfig, ModelName, ResNet, build_resnet

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
State = dict[str, Tensor]


def torchvisions(name: str = "resnet18", classes: int = len(CLASSES), seed: int = 1) -> nn.Module:
    """A network whose running statistics are not those of a start."""
    torch.manual_seed(seed)
    network: nn.Module = torchvision.models.get_model(name, num_classes=classes)
    for buffer in network.buffers():
        buffer.add_(torch.rand(buffer.shape) if buffer.is_floating_point() else 7)
    return network.eval()


def ours(name: ModelName = "resnet18", classes: int = len(CLASSES)) -> ResNet:
    torch.manual_seed(2)
    return build_resnet(ModelConfig(name), classes)


def start(weights: str | Path, network: ResNet | None = None, name: ModelName = "resnet18") -> tuple[ResNet, str]:
    network = network or ours(name)
    return network, load_weights_to_start(network, ModelConfig(name, weights=str(weights)), CLASSES, SOLO)


def assert_same_logits(network: nn.Module, reference: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), reference.eval()(images), rtol=1e-4, atol=1e-4)


def wrapped(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


# What a file may be


def timm_checkpoint(state: State) -> dict[str, Any]:
    """As timm's train.py saves it: the average beside what was trained, and the arguments as a Namespace."""
    trained = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "epoch": 3,
        "arch": "resnet18",
        "args": argparse.Namespace(lr=0.1),
        "state_dict": trained,
        "state_dict_ema": state,
    }


def torchvision_checkpoint(state: State) -> dict[str, Any]:
    """As torchvision's references save it: the average is an AveragedModel, which counts."""
    average = {**wrapped(state, "module."), "n_averaged": torch.tensor(9)}
    return {"model": dict.fromkeys(state, torch.zeros(1)), "model_ema": average, "optimizer": {"state": {}}}


CONTENTS: dict[str, Callable[[State], object]] = {
    "plain.pth": lambda state: state,
    "plain.pt": lambda state: {"state_dict": state},
    "lightning.ckpt": lambda state: {"state_dict": wrapped(state, "model.backbone."), "global_step": 4},
    "ddp.pth": lambda state: {"model_state_dict": wrapped(state, "module.")},
    "compiled.pth": lambda state: {"model": wrapped(state, "module._orig_mod.")},
    "any prefix.ckpt": lambda state: {"state_dict": wrapped(state, "student.net.encoder.")},
    "deepspeed.pt": lambda state: {
        "module": wrapped(state, "module."),
        "param_shapes": [{"conv1.weight": torch.Size([64])}],
        "sparse_tensor_module_names": {"a"},
        "ds_config": {},
    },
    "composer.pt": lambda state: {
        "state": {"model": wrapped(state, "module."), "timestamp": {"total_wct": timedelta(seconds=3)}},
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
    },
    "numpy.pth": lambda state: {"model": state, "best": np.float64(0.9), "epoch": np.int64(3), "flag": np.bool_(True)},
    "half.pth": lambda state: {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    },
    "uncounted.pth": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "timm.pth.tar": timm_checkpoint,
    "torchvision.pth": torchvision_checkpoint,
    'it\'s "quoted" ünï.safetensors': lambda state: state,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_of_every_kind(name: str, tmp_path: Path) -> None:
    reference = torchvisions()
    state = reference.state_dict()
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(wrapped(state, "module."), tmp_path / name)
    else:
        torch.save(CONTENTS[name](state), tmp_path / name)
    network, told = start(tmp_path / name)
    assert told == f"starting from {tmp_path / name}, head included"
    for key, value in state.items():
        if "num_batches" not in key:
            wanted = value.half().float() if name == "half.pth" else value
            assert torch.equal(network.state_dict()[key], wanted), key
    if name != "half.pth":
        assert_same_logits(network, reference)


def test_a_folder_of_deepspeeds(tmp_path: Path) -> None:
    """As its `save_checkpoint` leaves it; stage 3 has only parts of the weights, in files for each rank."""
    reference, step = torchvisions(), tmp_path / "global_step7"
    step.mkdir()
    (tmp_path / "latest").write_text("global_step7\n")
    torch.save(CONTENTS["deepspeed.pt"](reference.state_dict()), step / "mp_rank_00_model_states.pt")
    for folder in (tmp_path, step):
        network, told = start(folder)
        assert told == f"starting from {folder}, head included"
        assert_same_logits(network, reference)
    (step / "mp_rank_00_model_states.pt").rename(step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"are divided as ZeRO-3 does; join them by DeepSpeed's zero_to_fp32\.py"):
        start(tmp_path)


def mmpretrain(state: State) -> State:
    head = {name: value for name, value in state.items() if name.startswith("fc.")}
    body = {name: value for name, value in state.items() if name not in head}
    return {**wrapped(body, "backbone."), **wrapped(head, "head."), "data_preprocessor.mean": torch.zeros(3)}


BESIDE: dict[str, tuple[Callable[[State], State], str]] = {
    "a criterion and metrics": (
        lambda state: {
            "criterion.weight": torch.ones(5),
            **wrapped(state, "model."),
            "accuracy.hits": torch.zeros(1),
            "confusion.matrix": torch.zeros(5, 5),
            "confusion.count": torch.zeros(1),
        },
        "head included; left out 4 beside the network (criterion.weight, accuracy.hits, confusion.matrix, ...)",
    ),
    "MMPretrain": (mmpretrain, "head included; left out 1 beside the network (data_preprocessor.mean)"),
    "a head of another name": (
        lambda state: {
            ("classifier" + name[2:] if name.startswith("fc.") else f"net.{name}"): value
            for name, value in state.items()
        },
        "it has no head, so the one for 5 starts anew; left out 2 beside the network (classifier.weight, classifier.bias)",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_is_beside_the_network_is_named(case: str, tmp_path: Path) -> None:
    make, wanted = BESIDE[case]
    reference, file = torchvisions(), tmp_path / "last.ckpt"
    torch.save({"state_dict": make(reference.state_dict())}, file)
    network, told = start(file)
    assert told.removeprefix(f"starting from {file}").strip(",; ") == wanted
    if "head included" in wanted:
        assert_same_logits(network, reference)
    else:
        assert torch.equal(
            network.get_buffer("layer4.1.bn2.running_var"), reference.get_buffer("layer4.1.bn2.running_var")
        )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timms_networks(name: ModelName, tmp_path: Path) -> None:
    torch.manual_seed(5)
    reference = timm.create_model(name, num_classes=len(CLASSES))
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    network, _ = start(tmp_path / "timm.pth", name=name)
    assert_same_logits(network, reference)


@pytest.mark.parametrize("which", [".", WEIGHTS])
def test_checkpoints_of_ours(which: str, tmp_path: Path) -> None:
    """A folder or the file in it; test_finetune has whole runs."""
    best = ours()
    nn.init.ones_(best.fc.bias)
    save_checkpoint(best, CLASSES, tmp_path)
    network, told = start(tmp_path / which)
    assert told == f"starting from {tmp_path / which}, head included"
    assert_same_logits(network, best)


def save_checkpoint(network: nn.Module, classes: list[str], folder: Path) -> None:
    """The part of a checkpoint that matters here."""
    metadata = {METADATA: json.dumps({"classes": json.dumps(classes)})}
    safetensors.torch.save_file(network.state_dict(), folder / WEIGHTS, metadata)


# The head


@pytest.mark.parametrize("kind", ["more classes", "other classes", "none"])
def test_another_head_is_left_out(kind: str, tmp_path: Path) -> None:
    reference = torchvisions(classes=len(CLASSES) if kind == "other classes" else 1000)
    state = reference.state_dict()
    if kind == "other classes":
        save_checkpoint(reference, [*CLASSES[1:], "fox"], tmp_path)
        source = tmp_path
    else:
        source = tmp_path / "weights.pth"
        torch.save({name: value for name, value in state.items() if kind != "none" or "fc" not in name}, source)
    network, told = start(source)
    left = {"more classes": "its head is for 1000 other classes", "other classes": "its head is for 5 other classes"}
    assert told == f"starting from {source}; {left.get(kind, 'it has no head')}, so the one for 5 starts anew"
    fresh = ours().state_dict()
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # raised, so that their statistics count as settled
            assert torch.equal(value, fresh[name] if name.startswith("fc.") else state[name]), name


# Mistakes


class Runs:
    """A pickle that runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def line(weights: Path, name: ModelName = "resnet18") -> str:
    with pytest.raises(UserError) as error:
        start(weights, name=name)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(weights), "FILE")


@pytest.mark.filterwarnings("error::UserWarning")  # which would stand before the line
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_pickle_that_runs_code_is_refused(suffix: str, tmp_path: Path) -> None:
    file, mark = tmp_path / f"weights.{suffix}", tmp_path / "hacked"
    content = {**torchvisions().state_dict(), "extra": Runs(mark)}
    if suffix == "pth":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(Runs(mark)))
    refusal = (
        "model.weights: FILE holds posix.mkdir, which might run code; save its state_dict() with torch.save, or as safetensors"
        if suffix == "pth"
        else "model.weights: FILE is no PyTorch file of tensors alone, and what else it holds might run code; "
        "save its state_dict() with torch.save, or as safetensors"
    )
    assert line(file) == refusal
    assert not mark.exists()
    if suffix == "pth":
        torch.load(file, weights_only=False)
        assert mark.exists(), "it does run code where it may"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "model.weights: FILE is no PyTorch file"),
        (b"junk" * 999, "model.weights: FILE is no PyTorch file"),
        ({"epoch": 3}, "model.weights: FILE holds no state dict; save a model's state_dict() with torch.save"),
        ([torch.zeros(1)], "model.weights: FILE holds no state dict"),
        (
            {"model.layer1.0.conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)},
            "model.weights: FILE holds several networks (one without a prefix, model.); save the state_dict() of one of them",
        ),
    ],
)
def test_what_holds_no_weights(content: Any, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert line(file).startswith(wanted)


class Settings:
    """A class of somebody's own."""


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": torchvisions().state_dict(), "settings": Settings()}, tmp_path / "last.ckpt")
    assert line(tmp_path / "last.ckpt") == (
        "model.weights: FILE holds tests.trainer.model.test_pretrained.Settings, which might run code; "
        "save its state_dict() with torch.save, or as safetensors"
    )
    torch.save({"a": np.array([Settings()], dtype=object)}, tmp_path / "objects.pth")
    assert "might run code" in line(tmp_path / "objects.pth")


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 3}
    content["state_dict"] = content
    torch.save(content, tmp_path / "loop.pth")
    assert line(tmp_path / "loop.pth").startswith("model.weights: FILE holds no state dict")


@pytest.mark.parametrize(
    "metadata", ['{"classes": ' + json.dumps("[" * 100_000), "[" * 100_000, "[1]", '{"classes": "7"}']
)
def test_metadata_that_is_not_ours(metadata: str, tmp_path: Path) -> None:
    text = metadata + "}" if metadata.endswith('"') else metadata
    safetensors.torch.save_file(ours().state_dict(), tmp_path / WEIGHTS, {METADATA: text})
    assert re.match(rf"FILE/{WEIGHTS}: it cannot be loaded \(.*\); restore it", line(tmp_path))


def test_broken_and_absent_files(tmp_path: Path) -> None:
    broken = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(torchvisions().state_dict(), broken)
    broken.write_bytes(broken.read_bytes()[:-100])
    assert re.match(r"model\.weights: FILE cannot be read \(.*\); give another file", line(broken))
    cut = tmp_path / "cut.pth"
    torch.save(torchvisions().state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:-1000])
    assert line(cut).startswith("model.weights: FILE is no PyTorch file")
    assert line(tmp_path / "absent.pth").startswith("model.weights: FILE does not exist; give a file, a run folder, or")
    assert line(tmp_path) == "model.weights: FILE holds no complete checkpoint; give the folder of a trained run"


def test_another_network_is_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(torchvisions("resnet50", classes=1000).state_dict(), file)
    said = line(file)
    assert said.startswith("model.weights: FILE does not fit resnet18: 198 unknown (layer1.0.conv3.weight, ")
    assert said.endswith(
        "of another shape (layer1.0.conv1.weight is [64, 64, 1, 1] and not [64, 64, 3, 3], "
        "layer1.1.conv1.weight is [64, 256, 1, 1] and not [64, 64, 3, 3], "
        "layer2.0.conv1.weight is [128, 256, 1, 1] and not [128, 64, 3, 3], ...); set model.name to resnet50"
    )


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"shortcut": "pool"}, "set model.shortcut to pool"),
        ({"blur": True}, "set model.blur to true"),
        ({"stem": "patch", "width": 0.5}, "set model.stem to patch and model.width to 0.5"),
        ({"stem": "deep", "attention": "se"}, "set model.stem to deep and model.attention to se"),
        ({"attention": "eca", "activation": "silu"}, "set model.attention to eca and model.activation to silu"),
        ({"name": "resnet34", "shortcut": "pool"}, "set model.name to resnet34 and model.shortcut to pool"),
    ],
)
def test_options_that_the_weights_need_are_named(options: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    torch.save(build_resnet(ModelConfig(**options), len(CLASSES)).state_dict(), tmp_path / "weights.pth")
    assert line(tmp_path / "weights.pth").endswith(f"; {remedy}")


def test_a_run_of_blurred_weights_without_their_filters(tmp_path: Path) -> None:
    """As runs saved them once: a plain network is not started from them, and a blurred one is."""
    cfg = ModelConfig(blur=True)
    state = build_resnet(cfg, len(CLASSES)).state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("blur")}
    safetensors.torch.save_file(old, tmp_path / WEIGHTS, {METADATA: json.dumps({"classes": json.dumps(CLASSES)})})
    (tmp_path / "config.yaml").write_text(to_yaml(Config(model=cfg)))
    assert line(tmp_path) == "model.weights: FILE was trained with blur; set model.blur to true"
    network = build_resnet(cfg, len(CLASSES))
    load_weights_to_start(network, replace(cfg, weights=str(tmp_path)), CLASSES, SOLO)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_mismatched_keys_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    state = torchvisions().state_dict()
    del state["layer1.0.conv1.weight"], state["bn1.running_mean"]
    state |= {f"extra.{number}": torch.zeros(1) for number in range(4)} | {"layer4.1.bn2.bias": torch.zeros(3)}
    torch.save(state, file)
    network = ours()
    with pytest.raises(UserError) as error:
        start(file, network)
    assert str(error.value) == (
        f"model.weights: {file} does not fit resnet18: 2 missing (bn1.running_mean, layer1.0.conv1.weight), "
        "4 unknown (extra.0, extra.1, extra.2, ...), 1 of another shape (layer4.1.bn2.bias is [3] and not [512]); "
        "give weights of a resnet18"
    )
    untouched = ours().state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ""}, "model.weights: it is empty; give a file or a name, or leave it out"),
        (
            {"weights": "ResNet50_Weights.IMAGENET1K_V2"},
            "model.weights: ResNet50_Weights.IMAGENET1K_V2 is for resnet50; set model.name to it, or give others",
        ),
        ({"weights": "a", "freeze_until": -1}, "model.freeze_until: -1 is negative; give a number of epochs"),
        (
            {"weights": "a", "head_norm": True},
            "model.head_norm: True is for runs that train the head alone; set model.head_only, without freeze_bn",
        ),
        (
            {"head_only": True},
            "model.head_only: True keeps weights as they are, and these are random; give model.weights",
        ),
        (
            {"freeze_bn": True},
            "model.freeze_bn: True keeps weights as they are, and these are random; give model.weights",
        ),
        (
            {"freeze_until": 1},
            "model.freeze_until: 1 keeps weights as they are, and these are random; give model.weights",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(**options)
    assert str(error.value) == message


# torchvision by name


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the loopback with weights in ImageNet's shape: where torchvision finds those of its ResNet-18."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(torchvisions(classes=1000).state_dict(), folder / "weights")
    checksum = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8]
    file = (folder / "weights").rename(folder / f"resnet18-{checksum}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(
            ResNet18_Weights.IMAGENET1K_V1.value, "url", f"http://127.0.0.1:{server.server_port}/{file.name}"
        )
        yield file
        server.shutdown()


def test_download_by_name(served: Path) -> None:
    name = "ResNet18_Weights.IMAGENET1K_V1"
    network, told = start(name)
    assert told == f"starting from {name}; its head is for 1000 other classes, so the one for 5 starts anew"
    wanted = torchvisions(classes=1000).get_parameter("layer4.1.conv2.weight")
    assert torch.equal(network.get_parameter("layer4.1.conv2.weight"), wanted)
    served.unlink()
    again, _ = start(name)
    assert torch.equal(again.get_parameter("conv1.weight"), network.get_parameter("conv1.weight")), "it is kept"


def test_a_download_that_fails(served: Path) -> None:
    served.write_bytes(served.read_bytes() + b"more")
    url = re.escape(ResNet18_Weights.IMAGENET1K_V1.url)
    with pytest.raises(UserError, match=rf"cannot download ResNet18.*invalid hash.*; fetch {url} elsewhere, and give"):
        start("ResNet18_Weights.IMAGENET1K_V1")
    served.unlink()
    with pytest.raises(UserError, match=r"^model\.weights: cannot download ResNet18.*404"):
        start("ResNet18_Weights.IMAGENET1K_V1")


def test_names_that_torchvision_does_not_have() -> None:
    with pytest.raises(
        UserError, match=r"torchvision has no ResNet18_Weights\.V9; choose one of ResNet18_Weights\.IMAGE"
    ):
        load(["--model.weights", "ResNet18_Weights.V9"])


# Preprocessing


def test_torchvisions_preprocessing_is_a_default() -> None:
    name = "ResNet50_Weights.IMAGENET1K_V2"
    theirs = ResNet50_Weights.IMAGENET1K_V2.transforms()
    arguments = ["--model.name", "resnet50", "--model.weights", name]
    data = load(arguments).data
    assert (data.mean, data.std) == (theirs.mean, theirs.std)
    assert round(theirs.crop_size[0] / data.eval_crop) == theirs.resize_size[0] == 232
    assert load([*arguments, "--data.eval_crop", "0.9"]).data.eval_crop == 0.9


def test_a_runs_preprocessing_is_a_default(tmp_path: Path) -> None:
    theirs = load(["--data.mean", "[0.1,0.2,0.3]", "--data.eval_crop", "0.8"])
    run = tmp_path / "a run"
    (run / "checkpoints/best").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(theirs))
    for source in (run, run / "checkpoints/best"):
        cfg = load(["--model.weights", str(source), "--data.std", "[0.5,0.5,0.5]"])
        assert (cfg.data.mean, cfg.data.std, cfg.data.eval_crop) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5], 0.8)
        (tmp_path / "config.yaml").write_text(to_yaml(cfg))
        assert load_run(tmp_path, []) == cfg
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model:\n  weights: {run}\ndata:\n  mean: [0.4, 0.4, 0.4]\n")
    assert load(["--config", str(file)]).data.mean == [0.4, 0.4, 0.4]
    assert preprocessing(str(run / "config.yaml")) == {}, "a file says nothing of itself"
    (run / "config.yaml").write_text("{")
    with pytest.raises(UserError, match=r"is not the configuration of a run; mend it, or give a file"):
        load(["--model.weights", str(run)])


# Several ranks


def prove_ranks(rank: int, folder: Path) -> None:
    """Only the first rank can read the file, and its mistake is everybody's."""
    ctx: DistContext = join(rank, 2, folder)
    torch.manual_seed(rank)
    network = build_resnet(ModelConfig(), len(CLASSES))
    weights = folder / ("weights.pth" if rank == 0 else "absent.pth")
    told = load_weights_to_start(network, ModelConfig(weights=str(weights)), CLASSES, ctx)
    assert told == (f"starting from {weights}, head included" if rank == 0 else "")
    for name, value in torchvisions().state_dict().items():
        if not name.endswith("num_batches_tracked"):  # raised on every rank, so that their statistics count as settled
            assert torch.equal(network.state_dict()[name], value), name
    with pytest.raises(UserError, match="does not exist"):
        load_weights_to_start(network, ModelConfig(weights=str(folder / "no.pth")), CLASSES, ctx)


def test_one_rank_reads_for_all(tmp_path: Path) -> None:
    torch.save(torchvisions().state_dict(), tmp_path / "weights.pth")
    warm.start_ranks(prove_ranks, (tmp_path,), 2)
