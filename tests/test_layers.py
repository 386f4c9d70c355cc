"""Rules of imports: read from the sources, and from what a process has loaded."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.config import load, to_yaml

LAYERS = ("data_pipeline", "trainer", "launch")  # each may import itself and those before it
HEAVY = {
    "wandb": {"trainer.tracking.wandb_sink", "trainer.tracking.wandb_process", "launch.pages.dashboards"},
    "wandb_workspaces": {"launch.pages.dashboards"},
    "deepspeed": {"trainer.engine.deepspeed"},
    "submitit": {"launch.slurm.submit", "launch.sweep.cli"},
}
"""Packages that take long to import, and the modules that may do so whenever they are imported themselves."""


@cache
def modules() -> dict[str, ast.Module]:
    """Name -> source tree of every module of ours."""
    paths = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every name imported, "package.module.name" where it is one from a module; whether within a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", False) for alias in node.names)
        else:
            within = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from ((name, nested or within) for name, nested in imports(node))


def ours(name: str) -> str | None:
    """The module of ours that an imported name is, or comes from."""
    return next((module for module in (name, name.rpartition(".")[0]) if module in modules()), None)


def dotted(node: ast.AST) -> str:
    """The expression a.b.c as "a.b.c"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_there_is_something_to_read() -> None:
    assert {"data_pipeline.loader", "trainer.loop"} < modules().keys()
    assert ("data_pipeline.sources.catalog.Catalog", False) in imports(modules()["data_pipeline.loader"])
    assert ("trainer.tracking.wandb_sink.WandbSink", True) in imports(modules()["trainer.tracking.tracker"])


def test_no_import_runs_upward() -> None:
    for module, tree in modules().items():
        allowed = LAYERS[: LAYERS.index(module.split(".")[0]) + 1]
        for name, _ in imports(tree):
            package = name.split(".")[0]
            assert package not in (*LAYERS, "tests") or package in allowed, f"{module} imports {name}"


def test_no_circle_exists() -> None:
    uses = {
        module: {target for name, _ in imports(tree) if (target := ours(name)) and target != module}
        for module, tree in modules().items()
    }
    while free := [module for module, used in uses.items() if not used & uses.keys()]:
        for module in free:
            del uses[module]
    assert uses == {}, "each of these imports another one of them"


def test_no_circle_of_packages_exists() -> None:
    uses: dict[str, set[str]] = {}
    for module, tree in modules().items():
        targets = {target for name, _ in imports(tree) if (target := ours(name)) and target not in LAYERS}
        uses.setdefault(package_of(module), set()).update({package_of(target) for target in targets})
    for package, used in uses.items():
        used.discard(package)
    while free := [package for package, used in uses.items() if not used & uses.keys()]:
        for package in free:
            del uses[package]
    assert uses == {}, "each of these imports another one of them"


def package_of(module: str) -> str:
    """The package, or the module beside packages, that a module belongs to: trainer.engine of trainer.engine.ddp."""
    return ".".join(module.split(".")[:2])


def test_a_training_needs_no_command_of_another_name() -> None:
    loaded = {".".join(name.split(".")[:2]) for name in modules_loaded_by("import trainer.__main__, trainer.loop")}
    commands = {".".join(path.relative_to(ROOT).parent.parts) for path in ROOT.glob("*/*/__main__.py")}
    assert "trainer.bench" in commands and "trainer.engine" in loaded
    assert not loaded & commands


def test_dali_is_named_in_one_package() -> None:
    for module, tree in modules().items():
        for name, _ in imports(tree):
            assert not name.startswith("nvidia") or module.startswith("data_pipeline.dali"), f"{module} imports {name}"


def test_folders_stay_small() -> None:
    for layer in (*LAYERS, "slurm", "tests"):
        for folder in (ROOT / layer, *(path for path in (ROOT / layer).rglob("*") if path.is_dir())):
            files = [path.name for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
            if folder.name != "__pycache__":
                assert len(files) <= 15, f"{folder.relative_to(ROOT)} has {len(files)} files"


def test_only_the_machine_asks_for_cuda() -> None:
    asking = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if dotted(node).endswith(("cuda.is_available", "cuda.device_count"))
    }
    assert asking == {"trainer.distributed"}


def test_heavy_packages_wait_until_they_are_needed() -> None:
    for module, tree in modules().items():
        for name, nested in imports(tree):
            package = name.split(".")[0]
            assert nested or package not in HEAVY or module in HEAVY[package], f"{module} imports {name}"


def modules_loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(output.stdout.split())


def packages_loaded_by(statement: str) -> set[str]:
    return {name.split(".")[0] for name in modules_loaded_by(statement)}


def test_options_are_read_before_anything_heavy_is_loaded() -> None:
    loaded = packages_loaded_by("import trainer.__main__; from trainer.config import load; load(['--run.epochs', '3'])")
    assert "trainer" in loaded and not loaded & {"torch", "torchvision", "nvidia", "numpy", "pandas", "rich", *HEAVY}


@pytest.mark.parametrize(
    "command",
    [
        "trainer --lr 3",
        "trainer.evaluate nowhere",
        "trainer.evaluate RUN --data.pth x",
        "trainer.predict RUN tests --out README.md",
        "trainer.report RUN --out tests",
        "trainer.export RUN --format onnx --out README.md",
        "trainer.plan --nodes 0",
        "trainer.plan --gpus_per_node 1 --inside_us 3",
        "trainer.bench --rounds 0",
        "trainer.check --only nope",
        "trainer.compare nowhere nowhere",
        "data_pipeline.show --out README.md",
        "data_pipeline.bench --out README.md",
        "data_pipeline.pack tests tests",
        "data_pipeline.verify tests --workers many",
    ],
)
def test_a_mistake_is_told_before_anything_heavy_is_loaded(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load([])))
    name, *arguments = (str(tmp_path) if word == "RUN" else word for word in command.split())
    program = (
        "import atexit, runpy, sys; atexit.register(lambda: print(*sys.modules)); sys.argv[0] = sys.argv.pop(1)\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, name, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ended.returncode, ended.stderr[:7], ended.stderr.count("\n")) == (2, "error: ", 1), ended.stderr
    assert not {"torch", "nvidia"} & set(ended.stdout.split())


def test_training_starts_without_heavy_packages() -> None:
    loaded = packages_loaded_by("import trainer.loop")
    assert {"trainer", "data_pipeline", "nvidia", "torch"} <= loaded
    assert not loaded & {*HEAVY, "tensorboard", "launch"}


def test_an_engine_needs_torch_alone() -> None:
    """`trainer.check` tries the engine on machines without network, where little else is installed."""
    loaded = modules_loaded_by("import trainer.engine.ddp, trainer.check.cli")
    assert "trainer.engine.ddp" in loaded and "nvidia.dali" not in loaded
    assert not {name.split(".")[0] for name in loaded} & {
        *HEAVY,
        "jsonargparse",
        "yaml",
        "pandas",
        "timm",
        "safetensors",
        "psutil",
    }


def test_layers_lie_where_they_should() -> None:
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert there <= {*LAYERS, "tests"}
    assert LAYERS[0] in there
