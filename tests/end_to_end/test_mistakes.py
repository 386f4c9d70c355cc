"""A user's mistake, to every command: exactly one line on stderr, exit code 2, and nothing is written."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from data_pipeline.common.entry_point import run_command
from tests.support.runs import images, place_checkpoint, tree
from trainer.config import RECIPES, load, recipes, to_yaml
from trainer.distributed import open_dist_context
from trainer.model.resnet import ModelConfig, build_resnet

NO_DATA = (
    "data.path: nowhere is not a folder; give one with train/CLASS/ images, a table or archive "
    "(.csv, .tsv, .parquet, .zip, .arrow), or a name (imagenette, cifar10, flowers102, oxford_pets, food101)"
)
NO_RUN = "nowhere is not a run folder: it has no config.yaml; give one such as runs/builtin"
NO_SUBMISSION = "no run of that name was submitted from here; `python -m launch status` lists them"
RECIPE_NAMES = ", ".join(recipes())

# IMAGES is a folder of images, RUN a run folder with a checkpoint; the other names are of files in the working folder.
MISTAKES = {
    # options
    "trainer stray": "stray: no such option; see --help",
    "trainer --optim.lrr 1": "--optim.lrr: no such option; did you mean --optim.lr?",
    "trainer --optm.lr=1": "--optm.lr: no such option; did you mean --optim.lr?",
    "trainer --optim.l 1": "--optim.l: no such option; did you mean --optim.lr?",
    "trainer --lr 3": "--lr: no such option; did you mean --optim.lr?",
    "trainer --batch-size 3": "--batch-size: no such option; did you mean --data.batch?",
    "trainer '--\x1b[31m' 1": "--\\x1b[31m: no such option; see --help",
    "trainer --zzz 1": "--zzz: no such option; see --help",
    "trainer --optim.lr": "--optim.lr: expected one argument; see python -m trainer --help",
    "trainer --optim.lr -1": "optim.lr: -1.0 is not positive; give a learning rate above 0",
    "trainer --model.shortcut max": "model.shortcut: max does not fit; give one of 'conv', 'pool'",
    "trainer --model.stem thick": "model.stem: thick does not fit; give one of 'conv', 'deep', 'patch'",
    "trainer --model.width 0": "model.width: 0.0 is out of range; give a factor above 0, up to 16",
    "trainer --model.bn_momentum 0": "model.bn_momentum: 0.0 is out of range; give a share above 0, up to 1",
    "trainer --optim.loss hinge": "optim.loss: hinge does not fit; give one of 'cross_entropy', 'binary'",
    "trainer --optim.name muon --engine.name deepspeed": "optim.name: muon needs whole weights, which ZeRO divides; "
    "choose one of sgd, adamw, or set engine.zero_stage to 0",
    "trainer --run.stall_s -1": "run.stall_s: -1.0 is no time; give seconds such as 600, or 0 for off",
    "trainer --run.on_nonfinite skip": "run.on_nonfinite: skip does not fit; give one of 'stop', 'back'",
    "trainer --optim.name sgdd": "optim.name: sgdd does not fit; give one of 'sgd', 'adamw', 'lars', 'lamb', 'muon'",
    "trainer --optim.nesterov maybe": "optim.nesterov: maybe does not fit; give true or false",
    "trainer --optim.betas '[0.9]'": "optim.betas: [0.9] does not fit; give a list of 2 values",
    "trainer --run.epochs 1.5": "run.epochs: 1.5 does not fit; give a whole number",
    "trainer --run.max_steps 0.5": "run.max_steps: 0.5 does not fit; give a whole number or null",
    "trainer --run.max_steps 0": "run.max_steps: 0 is not positive; leave it out to train all epochs",
    "trainer --run.log_every 0": "run.log_every: 0 is not positive; give a number of steps",
    "trainer --run.save_every -1": "run.save_every: -1 is not positive; give a number of steps",
    "trainer --run.seed -1": "run.seed: -1 is out of range; give a number from 0 to 2^63",
    "trainer --run.name ..": "run.name: '..' is no folder name; give a word such as first",
    "trainer --data.size_px big": "data.size_px: big does not fit; give a whole number or a list",
    "trainer --optim.lr fast": "optim.lr: fast does not fit; give a number",
    "trainer --optim.lr 'fa\nst'": "optim.lr: fa st does not fit; give a number",
    "trainer --optim.momentum 1.5": "optim.momentum: 1.5 is out of range; give a number from 0 to below 1",
    "trainer --run.epochs 0": "run.epochs: 0 is not positive; give the number of passes",
    "trainer --run.dir ''": "run.dir: it is empty; give a folder, or leave it out for runs/NAME",
    "trainer --run.name a/b": "run.name: 'a/b' is no folder name; give a word such as first",
    "trainer --run.profile 12-10": "run.profile: '12-10' names no steps; give the first and the last, such as 10-12",
    "trainer --data.path ''": 'data.path: it is empty; give a folder of images or "builtin"',
    "trainer --data.batch '[]'": "data.batch: [] is not positive; give the number of images per optimizer step",
    "trainer --data.mean '[1,2]'": "data.mean: [1.0, 2.0] has 2 numbers; give three, for R, G, B",
    "trainer --data.size_px '[32,5000]'": "data.size_px, eval_size_px: [32, 5000], None must be 8 to 4096 pixels",
    "trainer --data.augment.policy rand": "data.augment.policy: rand does not fit; "
    "give one of 'none', 'randaugment', 'trivialaugment', 'autoaugment', 'threeaugment'",
    "trainer --data.augment.color_jitter '[1,2]'": "data.augment.color_jitter: [1, 2] does not fit; "
    "give a list of 4 values",
    "trainer --engine.name deepspeed --engine.sync_bn true": "engine.sync_bn: it is for DDP only; leave it out, "
    "or set engine.name to ddp",
    "trainer --tracking.project ''": "tracking.project: '' is no W&B project name; give 1 to 128 characters, "
    "none of /\\#?%:",
    # recipes
    "trainer --config": "--config: expected one argument; see python -m trainer --help",
    "trainer --config nope": f"--config: nope is neither a file nor a recipe; the recipes are {RECIPE_NAMES}",
    "trainer --config /": f"--config: / is neither a file nor a recipe; the recipes are {RECIPE_NAMES}",
    "trainer --config builtin --optim.lr 1 --config=builtin": "--config: it comes after other options and would undo "
    "them; put it first",
    "trainer --config typo.yaml": "typo.yaml: optim.lrr: no such option; did you mean optim.lr?",
    "trainer --config empty.yaml": f"empty.yaml: it holds no options; write them as in {RECIPES / 'builtin.yaml'}",
    "trainer --config bytes.yaml": "--config: bytes.yaml cannot be read: 'utf-8' codec can't decode byte 0xff "
    "in position 0: invalid start byte",
    "trainer --optim.lr 1 --config builtin": "--config: it comes after other options and would undo them; put it first",
    # data
    "trainer --data.path nowhere": NO_DATA,
    "trainer --data.path photos": "data.path: photos has no class folders; put the images of each class into photos/CLASS/, or "
    "give a CSV table of image names and labels",
    "trainer --data.path table.csv": "data.images: 1 of the 1 images that table.csv names are not in .: missing.jpg; "
    "give the folder that they are in as --data.images",
    "trainer --data.path IMAGES --data.quarantine nowhere": "data.quarantine: cannot read nowhere "
    "(No such file or directory); give a list that verify wrote",
    "trainer --data.path IMAGES --data.batch 12 --optim.accumulate 5": "data.batch: 12 images cannot be shared by "
    "1 ranks x 5 micro-batches; choose a multiple of 5",
    # the run folder
    "trainer --data.path IMAGES --run.dir photos": "run.dir: photos is in use and holds no run; give another --run.dir",
    "trainer --data.path IMAGES --run.dir file.txt": "run.dir: file.txt is in use and holds no run; "
    "give another --run.dir",
    "trainer --data.path IMAGES --run.dir file.txt/run": "run.dir: cannot write to file.txt/run (Not a directory); "
    "give another --run.dir",
    "trainer --data.path IMAGES --run.dir unfinished --optim.lr 0.5": "run.dir: unfinished was started with other options "
    "(optim.lr was 0.1, now 0.5); to resume it: python -m trainer --config unfinished/config.yaml --run.dir unfinished; "
    "to train anew: python -m trainer --config unfinished/config.yaml --optim.lr 0.5 --run.dir unfinished-2",
    # evaluate
    "trainer.evaluate": "RUN: no run folder given; call python -m trainer.evaluate RUN [--data.path FOLDER], "
    "as with runs/builtin",
    "trainer.evaluate nowhere": NO_RUN,
    "trainer.evaluate unfinished": "unfinished has no complete checkpoint yet; train it first",
    "trainer.evaluate odd": "odd/config.yaml: nope: no such option; see --help",
    "trainer.evaluate RUN --config builtin": "--config: RUN has a configuration of its own; leave it out, "
    "or give single options",
    "trainer.evaluate RUN --model.name resnet34": "model.name: RUN holds a resnet18, not a resnet34",
    "trainer.evaluate RUN --data.pth x": "--data.pth: no such option; did you mean --data.path?",
    "trainer.evaluate RUN --data.path nowhere": NO_DATA,
    # export
    "trainer.export": "RUN: no run folder given; call python -m trainer.export RUN [--data.path FOLDER], "
    "as with runs/builtin",
    "trainer.export nowhere --format onnx --out new": NO_RUN,
    "trainer.export unfinished --format onnx --out new": "unfinished has no complete checkpoint yet; train it first",
    "trainer.export RUN --out new": "--format: it is missing; give one of torchvision, safetensors, onnx, torch_export",
    "trainer.export RUN --format onnx": "--out: it is missing; give the file to write, such as model.onnx",
    "trainer.export RUN --format keras --out new": "--format: invalid choice: 'keras' (choose from 'torchvision', "
    "'safetensors', 'onnx', 'torch_export'); see python -m trainer.export --help",
    "trainer.export RUN --format onnx --out file.txt": "--out: file.txt exists; give another file",
    "trainer.export RUN --format onnx --out nowhere/new": "--out: nowhere is not a folder; make it, or give another file",
    "trainer.export RUN --format onnx --out new --model.name resnet34": "model.name: RUN holds a resnet18, "
    "not a resnet34",
    # bench
    "trainer.bench --rounds 0": "--rounds: 0 is not positive; give a number of turns such as 9",
    "trainer.bench --rounds many": "--rounds: invalid int value: 'many'; see python -m trainer.bench --help",
    "trainer.bench --worlds 1,1": "--worlds: 1,1 does not fit; give different numbers of processes, such as 1,2",
    "trainer.bench --worlds 1,2 --profile new": "--worlds: no trace is made of several numbers of processes; "
    "leave out --profile",
    "trainer.bench --wandb": "--wandb: W&B keeps files in a folder; give --out DIR",
    "trainer.bench --out file.txt": "--out: file.txt is a file; give a folder",
    "trainer.bench --peer": "--peer: no such option; see --help",
    "trainer.bench --data.path nowhere": NO_DATA,
    # plan
    "trainer.plan --nodes 0": "--nodes: 0 does not fit; give numbers of nodes with commas between, as 1,2,4,8",
    "trainer.plan --gpus_per_node 0": "--gpus_per_node: 0 is not positive; give the GPUs of a node",
    "trainer.plan --price_per_gpu_hour -1": "--price_per_gpu_hour: -1.0 is not positive; leave it out for no cost",
    "trainer.plan --all_reduce star": "--all_reduce: invalid choice: 'star' (choose from 'ring', 'tree', 'best'); "
    "see python -m trainer.plan --help",
    "trainer.plan --engine.name deepspeed": "engine.name: deepspeed cannot be planned; give ddp",
    "trainer.plan --nodes 1 --gpus_per_node 1 --parts nowhere": "--parts: nowhere cannot be read: "
    "No such file or directory; give a file of --save_parts",
    "trainer.plan --nodes 1 --gpus_per_node 1 --parts table.csv": "--parts: table.csv holds no parts; "
    "give a file that --save_parts has written",
    "trainer.plan --nodes 1 --gpus_per_node 1 --save_parts file.txt": "file.txt exists and is kept; give another name",
    "trainer.plan --nodes 1 --gpus_per_node 1 --out file.txt": "--out: file.txt is a file; give a folder",
    # pack
    "data_pipeline.pack": "following arguments are required: src, dst; see python -m data_pipeline.pack --help",
    "data_pipeline.pack nowhere new": NO_DATA,
    "data_pipeline.pack IMAGES photos": "DST: photos exists and is no pack; give a folder that is not there yet",
    "data_pipeline.pack IMAGES new --quality 0": "--quality: 0 is out of range; give 1 to 95",
    "data_pipeline.pack IMAGES new --quality high": "--quality: high does not fit; give a whole number",
    "data_pipeline.pack IMAGES new --qualty 90": "--qualty: no such option; see python -m data_pipeline.pack --help",
    "data_pipeline.pack IMAGES new --short-side 4": "--short-side: 4 is out of range; give 8 to 4096 pixels",
    "data_pipeline.pack IMAGES new --shard-size big": "--shard-size: big is no size; give one such as 256MB, "
    "or a number of images",
    # verify
    "data_pipeline.verify": "following arguments are required: path; see python -m data_pipeline.verify --help",
    "data_pipeline.verify nowhere": NO_DATA,
    "data_pipeline.verify IMAGES --quarantine file.txt": "--quarantine: file.txt exists; remove it, or give another file",
    "data_pipeline.verify IMAGES --quarantine nowhere/new": "--quarantine: nowhere is not a folder; make it, "
    "or give another file",
    "data_pipeline.verify IMAGES --workers 0": "--workers: 0 is not positive; leave it out to use the processors there are",
    "data_pipeline.verify IMAGES --data.val_share 2": "data.val_share: 2.0 is not a share; give a number in (0, 1]",
    "data_pipeline.verify table.csv --data.label_column nope": "data.label_column: table.csv has no column nope; "
    "it has image, label",
    # show
    "data_pipeline.show --data.path nowhere": NO_DATA,
    "data_pipeline.show --out new.jpg": "--out: new.jpg is no PNG; give a name that ends in .png",
    "data_pipeline.show --out there.png": "--out: there.png exists; give another file, or --force to replace it",
    "data_pipeline.show --epoch -1": "--epoch: -1 is negative; give a number from 0",
    "data_pipeline.show --data.augment.flip 2": "data.augment.flip: 2.0 is not a chance; give a number from 0 to 1",
    "data_pipeline.show --data.augment.policy rand": "--data.augment.policy: rand does not fit; "
    "give one of 'none', 'randaugment', 'trivialaugment', 'autoaugment', 'threeaugment'",
    # data_pipeline.bench
    "data_pipeline.bench --sizes 7": "--sizes: 7 does not fit; give different sides of 8 to 4096 pixels, as 224,128,64",
    "data_pipeline.bench --data.path nowhere": NO_DATA,
    "data_pipeline.bench --size 64": "--size: no such option; see python -m data_pipeline.bench --help",
    "data_pipeline.bench --out file.txt": "--out: file.txt is a file; give a folder",
    # launch, on a machine without SLURM
    "launch nope": "nope: no such command; give one of COMMANDS",
    "launch local -n 0": "-n: '0' is no number of processes; give one such as 2, or leave it out for one a GPU",
    "launch submit --nodes 0": "nodes: 0 is not positive; give the number of nodes",
    "launch submit --nodes many": "nodes: many does not fit; give a whole number",
    "launch submit --time tomorrow": "time: 'tomorrow' is no time; give one such as \"24:00:00\", in quotes",
    "launch submit --profile nope": "--profile: 'nope' is neither a file nor a profile; the profiles are dev, example",
    "launch submit --profile secret.yaml": "env: API_TOKEN would be written into the job's script; set it in your shell, "
    "and name it in export",
    "launch submit --gpus_per_node 2 --tasks_per_node 3": "tasks_per_node: 3 beside gpus_per_node 2; leave it out, "
    "as each GPU has one process",
    "launch submit -- --optim.lrr 1": "--optim.lrr: no such option; did you mean --optim.lr?",
    "launch submit -- --run.dir new": "no sbatch here: this machine has no SLURM; `python -m launch local` trains on "
    "this machine alone",
    "launch status": "no squeue here: this machine has no SLURM; `python -m launch local` trains on this machine alone",
    "launch logs": "following arguments are required: RUN; see python -m launch logs --help",
    "launch logs nope": f"nope: {NO_SUBMISSION}",
    "launch cancel": "following arguments are required: RUN; see python -m launch cancel --help",
    "launch cancel nope": f"nope: {NO_SUBMISSION}",
    "launch resubmit": "RUN: no run given; call python -m launch resubmit RUN [--nodes N ...]",
    "launch resubmit unfinished": f"unfinished: {NO_SUBMISSION}",
    "launch overview": "following arguments are required: RUNS; see python -m launch overview --help",
    "launch overview nowhere": "RUNS: nowhere is not a folder; give run folders, or one of them such as runs",
    "launch overview photos": "RUNS: photos holds no run, that is no config.yaml; give run folders, or one of them",
    "launch overview unfinished --out file.txt": "--out: file.txt exists; give another file, or --force to replace it",
    "launch dashboard --entity": "--entity: expected one argument; see python -m launch dashboard --help",
    "launch dashboard --entity a --nope": "--nope: no such option; see python -m launch dashboard --help",
}
"""Command -> the line that it answers with."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint."""
    about = json.dumps({"model": "resnet18", "classes": '["cat", "dog"]'})
    network = build_resnet(ModelConfig("resnet18"), 2)
    weights = save(network.state_dict(), {"sluice": about})
    return place_checkpoint(tmp_path_factory.mktemp("trained") / "a run", load([]), {"model.safetensors": weights})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with files of every kind."""
    place = tmp_path_factory.mktemp("place")
    (place / "typo.yaml").write_text("optim:\n  lrr: 0.1\n")
    (place / "empty.yaml").write_text("")
    (place / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (place / "secret.yaml").write_text("env:\n  API_TOKEN: abc\n")
    (place / "table.csv").write_text("image,label\nmissing.jpg,cat\n")
    for name in ("file.txt", "there.png", "photos/1.jpg"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("precious")
    for name, text in (("unfinished", to_yaml(load(["--optim.lr", "0.1"]))), ("odd", "run: {}\nnope: 1\n")):
        (place / name).mkdir()
        (place / name / "config.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("PATH", "/nowhere")  # so that there is no SLURM
        yield place


def entry_point(name: str) -> Callable[[], None]:
    module = import_module(name if name == "trainer.evaluate" else f"{name}.__main__")
    main: Callable[[], None] = module.main
    return main


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake(
    command: str,
    place: Path,
    run: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert "RANK" not in os.environ
    here = {"IMAGES": str(images(tmp_path_factory.getbasetemp())), "RUN": str(run)}
    name, *arguments = (here.get(word, word) for word in shlex.split(command))
    main = entry_point(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    kept = [place, run] if run.name in str(arguments) else [place]
    before = [tree(folder) for folder in kept]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    line = MISTAKES[command].replace("RUN has", f"{run} has").replace("RUN holds", f"{run} holds")
    if "COMMANDS" in line:
        line = line.replace("COMMANDS", ", ".join(import_module("launch.cli").COMMANDS))
    assert capfd.readouterr() == ("", f"error: {line}\n")
    assert ended.value.code == 2
    assert [tree(folder) for folder in kept] == before


@pytest.mark.parametrize("options", ["--engine.sync_bn true", "--data.decode gpu"])
def test_what_needs_a_gpu_is_refused_before_anything_is_written(
    options: str, place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    data = images(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(sys, "argv", ["", "--data.path", str(data), "--run.dir", "new", *options.split()])
    before = tree(place)
    with pytest.raises(SystemExit) as ended:
        run_command(entry_point("trainer"))
    assert ended.value.code == 2
    assert tree(place) == before


def test_a_gpu_that_cannot_be_used_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SLURM has handed out one, and here is no driver; a CPU is trained on only if it is asked for."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    monkeypatch.setattr(sys, "argv", ["", "--run.dir", "new", "--run.max_steps", "1"])
    before = tree(place)
    with pytest.raises(SystemExit) as ended:
        run_command(entry_point("trainer"))
    said = capfd.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    assert said.startswith(f"error: engine.device: SLURM_JOB_GPUS is 0, but torch {torch.__version__} can use no GPU: ")
    assert tree(place) == before
    with open_dist_context(device="cpu") as ctx:
        assert ctx.device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with open_dist_context() as ctx:
        assert ctx.device.type == "cpu"


def test_every_command_is_there() -> None:
    """Those of the modules that can be run, and those of `launch`, as far as this table is theirs."""
    named = {" ".join(command.split()[: 1 + command.startswith("launch ")]) for command in MISTAKES}
    modules = {"trainer", *(f"trainer.{name}" for name in ("evaluate", "export", "bench", "plan"))}
    modules |= {f"data_pipeline.{name}" for name in ("pack", "verify", "show", "bench")}
    commands = ("local", "submit", "status", "logs", "cancel", "resubmit", "overview", "dashboard")
    assert modules | {f"launch {name}" for name in commands} <= named
    assert len(MISTAKES) > 40
