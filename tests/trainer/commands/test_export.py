"""Exported weights give the run's logits in programs that know nothing of it, and the README's lines load them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torchvision.transforms import functional as transforms  # type: ignore[import-untyped]

from data_pipeline.common.errors import UserError
from data_pipeline.sources import builtin
from tests.conftest import ROOT
from tests.support.runs import TINTS, VAL, Job, dotted, images, place_checkpoint, settings_of, tree, unhurried
from trainer.checkpoint.store import Store
from trainer.config import load, load_run
from trainer.export import options
from trainer.export.__main__ import main
from trainer.export.cli import FORMATS, export, largest_difference, open_source
from trainer.model.resnet import build_resnet


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was really trained, of a network that torchvision has."""
    run = tmp_path_factory.mktemp("trained") / "run"
    settings = settings_of(base, run) | {"model.width": "1"}
    job = Job(1, run.with_name("log"), "trainer", *dotted(settings))
    assert job.wait() == 0, job.output()
    return run


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The file of each format."""
    folder = tmp_path_factory.mktemp("it's an ünusual folder")
    files = {name: folder / f"my {name}" for name in FORMATS}
    for name, file in files.items():
        export(run, load_run(run, []), name, file)
    return files


def torchvision_of(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    network = torchvision.models.resnet18(num_classes=len(TINTS))
    network.load_state_dict(state, strict=True)
    return network.eval()


def opened(name: str, file: Path) -> Callable[[Tensor], Tensor]:
    """Use the file as another program would."""
    if name == "torchvision":
        return torchvision_of(torch.load(file, weights_only=True))
    if name == "safetensors":
        return torchvision_of(load_file(file))
    if name == "torch_export":
        return torch.export.load(file).module()
    session = onnxruntime.InferenceSession(file)
    return lambda inputs: torch.from_numpy(session.run(None, {"images": inputs.numpy()})[0])


def by_pil(paths: list[Path], about: dict[str, object]) -> Tensor:
    """Inputs as the JSON describes them, by PIL and torchvision."""
    rows = []
    for path in paths:
        image = transforms.resize(Image.open(path).convert("RGB"), about["resize_short_side_px"])
        image = transforms.center_crop(image, about["center_crop_px"])
        rows.append(transforms.normalize(transforms.to_tensor(image), about["mean"], about["std"]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", FORMATS)
def test_another_program_gives_the_same_logits(name: str, run: Path, base: Path, exported: dict[str, Path]) -> None:
    about = json.loads(Path(f"{exported[name]}.json").read_text())
    paths = sorted((images(base) / "val").rglob("*.jpg"))
    inputs = by_pil(paths, about)
    ours = torchvision_of(load_file(run / "checkpoints/best/model.safetensors"))
    network = opened(name, exported[name])
    with torch.inference_mode():
        wanted, found = ours(inputs), network(inputs)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(network(inputs[:1]), wanted[:1], atol=1e-4, rtol=0)
    right = [
        about["classes"][row] == path.parent.name for row, path in zip(found.argmax(1).tolist(), paths, strict=True)
    ]
    best = Store(run).progress().best_top1_pct
    assert abs(100 * sum(right) / VAL - best) <= 100 / VAL + 1e-9, "one image on the fence at most"


def test_what_stands_beside(exported: dict[str, Path]) -> None:
    folder = exported["onnx"].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        file for name in FORMATS for file in (f"my {name}", f"my {name}.json")
    )
    assert json.loads((folder / "my onnx.json").read_text()) == {
        "model": "resnet18",
        "input": "images: float32 [batch, 3, 40, 40], RGB, (pixel / 255 - mean) / std",
        "output": "logits: float32 [batch, 7], of the classes in their order",
        "resize_short_side_px": 46,
        "interpolation": "bilinear, antialiased",
        "center_crop_px": 40,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "classes": sorted(TINTS),
    }


def test_the_command_offers_every_format() -> None:
    assert tuple(FORMATS) == options.FORMATS


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    main()


@pytest.mark.parametrize("name", FORMATS)
def test_command_repeats_to_the_byte(
    name: str,
    run: Path,
    base: Path,
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, out = tree(run), tmp_path / "again"
    call(monkeypatch, run, "--format", name, "--out", out)
    assert out.read_bytes() == exported[name].read_bytes()
    assert tree(run) == before
    megabytes = f"{out.stat().st_size / 1e6:.1f}"
    shown = capsys.readouterr()
    assert unhurried(shown.err) == ""
    assert re.fullmatch(
        rf"{re.escape(str(out))}: resnet18 of {re.escape(str((run / 'checkpoints/best').resolve()))}, {megabytes} MB\n"
        rf"23 images in {re.escape(str(images(base) / 'val'))}: logits differ by (\d\.\de[-+]\d\d) at most\n",
        shown.out,
    )


@pytest.fixture
def few_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the built-in images a handful, for all of them take a minute to render."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "PER_CLASS", {"train": 1, "val": 4})


@pytest.mark.usefixtures("few_builtin")
def test_images_that_are_gone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, run, "--format", "safetensors", "--out", tmp_path / "out", "--data.path", "/nowhere")
    shown = capsys.readouterr()
    assert "checking on the built-in images, as the run's cannot be opened: data.path: /nowhere is not" in shown.err
    assert re.search(r"\n32 images in .*: logits differ by ", shown.out)


@pytest.mark.parametrize("there", ["model.onnx", "model.onnx.json"])
def test_nothing_is_overwritten(there: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(UserError, match=rf"^--out: {tmp_path / there} exists; give another file$"):
        call(monkeypatch, run, "--format", "onnx", "--out", tmp_path / "model.onnx")
    assert tree(tmp_path) == {there: b"precious"}


def test_packages_that_are_missing_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = r"^--format: onnx needs onnxscript, onnxruntime; run pip install 'sluice-train\[export\]'$"
    with pytest.raises(UserError, match=line):
        call(monkeypatch, run, "--format", "onnx", "--out", tmp_path / "model.onnx")
    call(monkeypatch, run, "--format", "torchvision", "--out", tmp_path / "model.pth")


def test_a_network_that_differs_is_refused(run: Path) -> None:
    source = open_source(run, load_run(run, []))
    inputs = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert largest_difference(source, source.network, inputs) < 1e-5
    with pytest.raises(
        UserError, match=r"^--format: the exported logits, up to .*, differ by .* from ours; give another"
    ):
        largest_difference(source, lambda rows: source.network(rows) + 0.01, inputs)


@pytest.mark.usefixtures("few_builtin")
def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The READMEs' lines in Python, in a folder with a run of the built-in images and an export of it."""
    cfg = load([])
    torch.manual_seed(0)
    network = build_resnet(cfg.model, 10)
    metadata = {"model": cfg.model.name, "classes": json.dumps([f"class {number}" for number in range(10)])}
    weights = save(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, {"sluice": json.dumps(metadata)}
    )
    place_checkpoint(tmp_path / "runs/builtin", cfg, {"model.safetensors": weights})
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, "runs/builtin", "--format", "onnx", "--out", "builtin.onnx")
    for name in ("image.jpg", "a.jpg", "b.png"):
        Image.linear_gradient("L").resize((90, 70)).convert("RGB").save(name)
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "trainer/README.md"))
    blocks = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    for words in ("load_file", "onnxruntime", "load_run"):
        assert any(words in block for block in blocks)
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), names)
        model = names.get("model")
        if isinstance(model, torch.nn.Module):
            inputs = torch.randn(2, 3, 64, 64)
            torch.testing.assert_close(model.eval()(inputs), network.eval()(inputs), atol=1e-5, rtol=1e-5)
