"""timm's networks as a run's own: built, started from timm's weights, frozen, resumed, exported."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.batch import Batch, Places
from data_pipeline.common.errors import UserError
from tests.support.runs import SOLO, TINTS, checkpoint, dotted, images, settings_of
from trainer.bench.cli import bench
from trainer.checkpoint.files import METADATA
from trainer.checkpoint.files import WEIGHTS as WEIGHTS_FILE
from trainer.config import Config, load, to_yaml
from trainer.engine.config import EngineConfig
from trainer.engine.ddp import DdpEngine
from trainer.export.cli import export
from trainer.loop import fit
from trainer.model.config import ModelConfig
from trainer.model.network import build_network
from trainer.model.normalize import Normalise
from trainer.model.pretrained import load_weights_to_start
from trainer.model.resnet import freeze
from trainer.model.timm_networks import MODULES
from trainer.optim.config import OptimConfig
from trainer.resilience.signals import StopFlag
from trainer.scoring import open_trained
from trainer.setup.parts import network_layers

SMALL = "timm:test_resnet"
CLASSES = 7
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    images(base)
    return base


# Built


@pytest.mark.parametrize("zero", [False, True])
def test_one_seed_starts_it_as_timm_does(zero: bool) -> None:
    torch.manual_seed(3)
    ours = build_network(ModelConfig(SMALL, zero, head_bias=-2.0, bn_momentum=0.3, drop_path=0.2), CLASSES)
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet", num_classes=CLASSES, zero_init_last=zero)
    nn.init.constant_(theirs.fc.bias, -2.0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert {norm.momentum for norm in ours.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.3}
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(pixels), theirs.eval()(pixels))


@pytest.mark.slow
def test_every_residual_network_of_timms_is_built() -> None:
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    assert len(names) > 100
    for name in names:
        with torch.device("meta"):
            network = build_network(ModelConfig(f"timm:{name}", True, drop_path=0.1), CLASSES)
        assert network.get_parameter("fc.weight").shape[0] == CLASSES
        assert [network.get_submodule(f"layer{number}") for number in (1, 2, 3, 4)], name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet50dd", "timm has no 'resnet50dd'; did you mean timm:resnet50d or timm:resnest50d or timm:res2net50d?"),
        ("timm:", "timm has no ''; did you mean timm:resnext50_32x4d?"),
        ("timm:vit_base_patch16_224", "timm:vit_base_patch16_224 is no ResNet, of which alone the stages and the head are "
         "known; give one of timm's modules resnet, resnest, sknet, res2net, such as timm:resnext50_32x4d"),
        ("timm:resnet50.a1_in1k", "timm:resnet50.a1_in1k names weights as well; give model.name timm:resnet50 and "
         "model.weights timm:resnet50.a1_in1k"),
    ],
)  # fmt: skip
def test_names_that_are_none(name: str, message: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cfg = load(["--model.name", name, "--run.dir", str(run), "--data.path", str(tmp_path)])
    with pytest.raises(UserError) as error:  # before the images, of which there are none, are looked for
        fit(cfg, SOLO, StopFlag())
    assert str(error.value) == f"model.name: {message}"
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "deep"}, "model.stem: deep is for networks of our own, and timm:test_resnet has what timm gives it; "
         "leave it out"),
        ({"weights": "timm:resnet18.a1_in1k"}, "model.weights: timm:resnet18.a1_in1k is for timm:resnet18; set model.name "
         "to it, or give others"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_with_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(SMALL, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("name", [SMALL, "timm:ecaresnet26t", "timm:resnest14d"])
def test_its_layers_are_listed(name: str) -> None:
    """Those that ask for an image's size, too."""
    layers = network_layers(load(["--model.name", name, "--data.size_px", "32"]), CLASSES)
    names = [layer.name for layer in layers]
    assert len(set(names)) == len(names) and {source for layer in layers for source in layer.inputs} < set(names)
    network = timm.create_model(name.removeprefix("timm:"), num_classes=CLASSES)
    named = {f"{layer.name}.{part}" for layer in layers for part in layer.parameters}
    assert named == {parameter for parameter, _ in network.named_parameters()}
    assert layers[-1].shape == [1, CLASSES]


# Trained


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise([0.5] * 3, [0.3] * 3, CPU)

    def forward(self, pixels: Tensor) -> Tensor:
        result: Tensor = self.normalise(pixels).double()
        return result


def losses(network: nn.Module, lr: float) -> list[float]:
    """Of 20 optimizer steps on noise, in double precision: rounded in single, curves of one network part in six steps."""
    draw = torch.Generator().manual_seed(1)
    engine = DdpEngine(network.double(), Double(), EngineConfig(precision="fp32"), OptimConfig(lr=lr), SOLO)
    found = []
    for step in range(20):
        pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=draw)
        labels, places = (
            torch.randint(0, CLASSES, (8,), generator=draw),
            Places(0, 0, np.arange(8 * step, 8 * step + 8)),
        )
        batch = Batch(pixels.contiguous(memory_format=torch.channels_last), labels, torch.arange(8), 8, 8, None, places)
        found.append(float(engine.step([batch], lr)[0]) / 8)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), [("resnet18", "timm:resnet18d"), ("resnet50", "timm:resnet50d")])
def test_a_loss_curve_is_ours(ours: str, theirs: str) -> None:
    torch.manual_seed(0)
    network = build_network(ModelConfig(ours, True, stem="deep", shortcut="pool", drop_path=0.2), CLASSES)
    reference = build_network(ModelConfig(theirs, drop_path=0.2), CLASSES)
    reference.load_state_dict(network.state_dict())
    lr = 0.01 if ours == "resnet18" else 0.001
    curve = losses(network, lr)
    assert curve == pytest.approx(losses(reference, lr), rel=1e-5)
    assert len(set(curve)) == 20


@pytest.mark.parametrize("option", [{"head_only": True}, {"head_only": True, "head_norm": True}, {"freeze_bn": True}])
def test_what_is_frozen_stays(option: dict[str, bool]) -> None:
    torch.manual_seed(0)
    cfg = ModelConfig(SMALL, weights="given", **option)  # type: ignore[arg-type]
    network = build_network(cfg, CLASSES)
    freeze(network, cfg, 0)
    engine = DdpEngine(
        network, Normalise([0.5] * 3, [0.3] * 3, CPU), EngineConfig(precision="fp32"), OptimConfig(), SOLO
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    engine.predict(pixels)  # after which training goes on
    for _ in range(2):
        engine.step([Batch(pixels, torch.arange(8) % CLASSES, torch.arange(8), 8, 8)], 0.1)
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, value in network.state_dict().items():
        layer = name.rpartition(".")[0]
        frozen = layer not in ("fc", *norms[-1:] * ("head_norm" in option)) if "head_only" in option else layer in norms
        assert torch.equal(value, before[name]) == frozen, name


def test_a_resumed_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends with the bits of one that was not stopped; its weights are timm's, and are opened and exported as such."""
    for name in ("whole", "run"):
        settings = settings_of(base, tmp_path / name, epochs=1) | {"model.name": SMALL, "model.drop_path": "0.3"}
        del settings["model.width"]
        cfg = load(dotted(settings))
        if name == "run":
            fit(replace(cfg, run=replace(cfg.run, max_steps=2)), SOLO, StopFlag())
        assert fit(cfg, SOLO, StopFlag()).finished
    whole, run = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "run")
    assert all(whole[name] == run[name] for name in ("model.safetensors", "training.pt"))

    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    logits = open_trained(cfg.folder, cfg, SOLO).predict(pixels)
    theirs = timm.create_model("test_resnet", num_classes=len(TINTS)).eval()
    export(cfg.folder, cfg, "safetensors", tmp_path / "weights.safetensors")
    theirs.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    normalise = Normalise(cfg.data.mean, cfg.data.std, CPU)
    with torch.no_grad():
        torch.testing.assert_close(theirs(normalise(pixels)), logits, rtol=1e-4, atol=1e-4)
    assert "logits differ by" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"none has model\.name timm:test_resnet; give safetensors, onnx or torch_export$"
    ):
        export(cfg.folder, cfg, "torchvision", tmp_path / "weights.pth")


def test_it_has_no_peers() -> None:
    with pytest.raises(UserError, match=r"^--peers: they train torchvision's networks, and timm:test_resnet is timm's"):
        bench(Namespace(peers=True), [], load(["--model.name", SMALL]))


@pytest.mark.slow
def test_it_is_compiled_as_one_graph() -> None:
    network = build_network(ModelConfig(SMALL), CLASSES)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    pixels = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(compiled(pixels), network(pixels))


# Weights of timm's


WEIGHTS = "timm:test_resnet.r160_in1k"


class Hub(SimpleHTTPRequestHandler):
    """Serves files as huggingface.co does."""

    def end_headers(self) -> None:
        file = Path(self.translate_path(self.path))
        if file.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of WEIGHTS on a hub on the loopback, of 1000 classes; the cache is empty."""
    torch.manual_seed(8)
    file = tmp_path / "hub/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(timm.create_model("test_resnet").state_dict(), file)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "hub"))) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield file
        server.shutdown()


def start(classes: list[str], weights: str = WEIGHTS) -> tuple[nn.Module, str]:
    torch.manual_seed(1)
    network = build_network(ModelConfig(SMALL), len(classes))
    return network, load_weights_to_start(network, ModelConfig(SMALL, weights=weights), classes, SOLO)


def test_its_own_weights_are_fetched_once(hub: Path) -> None:
    theirs = load_file(hub)
    network, told = start(sorted(TINTS))
    assert told == f"starting from {WEIGHTS}; its head is for 1000 other classes, so the one for 7 starts anew"
    rest = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    assert len(rest) == len(theirs) - 2 and all(torch.equal(value, theirs[name]) for name, value in rest.items())
    hub.unlink()
    network, told = start([str(number) for number in range(1000)], "timm:test_resnet")  # kept, and timm's default
    assert told == "starting from timm:test_resnet, head included"
    assert all(torch.equal(value, theirs[name]) for name, value in network.state_dict().items())


def test_its_own_weights_from_a_file(hub: Path) -> None:
    network, _ = start(sorted(TINTS), str(hub))
    assert torch.equal(network.get_parameter("layer4.0.conv1.weight"), load_file(hub)["layer4.0.conv1.weight"])
    with pytest.raises(UserError, match=r"does not fit timm:resnet18: .*; give weights of a timm:resnet18$"):
        load_weights_to_start(
            build_network(ModelConfig("timm:resnet18"), 7),
            ModelConfig("timm:resnet18", weights=str(hub)),
            ["a"] * 7,
            SOLO,
        )


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", "timm:resnetblur18"),
        ("timm:resnet18", "timm:resnetblur18"),
        ("timm:resnetblur18", "resnet18"),
        ("timm:resnetblur18", "timm:resnet18"),
        ("timm:resnetaa50", "timm:resnetblur50"),
    ],
)
def test_weights_of_a_network_that_smooths_otherwise(name: str, weights: str, tmp_path: Path) -> None:
    """Their tensors have the same names and shapes, which tell nothing of it."""
    network = build_network(ModelConfig(weights), CLASSES)
    classes = [str(number) for number in range(CLASSES)]
    save_file(network.state_dict(), tmp_path / WEIGHTS_FILE, {METADATA: json.dumps({"classes": json.dumps(classes)})})
    (tmp_path / "config.yaml").write_text(to_yaml(Config(model=ModelConfig(weights))))
    start = partial(load_weights_to_start, classes=classes, ctx=SOLO)
    with pytest.raises(UserError) as error:
        start(build_network(ModelConfig(name), CLASSES), ModelConfig(name, weights=str(tmp_path)))
    assert str(error.value) == (
        f"model.weights: {tmp_path} is for {weights}, which smooths what it samples otherwise than {name}; "
        f"set model.name to {weights}"
    )
    told = start(build_network(ModelConfig(weights), CLASSES), ModelConfig(weights, weights=str(tmp_path)))
    assert told == f"starting from {tmp_path}, head included"


def test_published_weights_of_a_network_that_smooths(hub: Path) -> None:
    weights = next(one for one in timm.list_pretrained("resnetaa50*") if one.startswith("resnetaa50."))
    file = hub.parents[3] / weights / "resolve/main/model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(timm.create_model("resnetaa50").state_dict(), file)
    cfg = ModelConfig("resnet50", weights=f"timm:{weights}")
    with pytest.raises(UserError, match=r"; set model\.name to timm:resnetaa50$"):
        load_weights_to_start(build_network(cfg, 1000), cfg, ["a"] * 1000, SOLO)


def test_weights_that_are_not_to_be_had(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^model\.weights: cannot download timm:test_resnet\.r160_in1k \(.*\); fetch "
                       r"http://127.*/timm/test_resnet\.r160_in1k/resolve/main/model\.safetensors elsewhere, and give "
                       r"the file$") as error:  # fmt: skip
        start(sorted(TINTS))
    assert "\n" not in str(error.value)


def test_preprocessing_comes_with_the_weights() -> None:
    data = load(["--model.name", "timm:resnetrs50", "--model.weights", "timm:resnetrs50.tf_in1k"]).data
    assert (list(data.mean), list(data.std), data.eval_crop) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 0.91)
    with pytest.raises(
        UserError, match=r"^model\.weights: timm has no resnet18d\.a1; choose one of timm:resnet18d\.ra"
    ):
        load(["--model.name", "timm:resnet18d", "--model.weights", "timm:resnet18d.a1"])
