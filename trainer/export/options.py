"""Options of `python -m trainer.export`, and their mistakes."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from data_pipeline.common.cli import parse_known, plain_parser
from data_pipeline.common.errors import require
from trainer.config import run_folder

FORMATS = ("torchvision", "safetensors", "onnx", "torch_export")
"""Formats that a run can be written in; `cli` has a writer for each."""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this command; the run's are returned beside them. Raises `UserError`."""
    parser = plain_parser(
        prog="python -m trainer.export",
        description="Write a run's best weights for other programs.",
        epilog="Besides, --data.path FOLDER and the other options of python -m trainer: the images of the check.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="The run folder; it comes first.")
    parser.add_argument("--format", choices=FORMATS, help="What to write.")
    parser.add_argument("--out", type=Path, metavar="PATH", help="The file to write; PATH.json comes beside it.")
    args, rest = parse_known(parser, arguments)
    run_folder(arguments, parser.prog)
    require(args.format is not None, f"--format: it is missing; give one of {', '.join(FORMATS)}")
    require(args.out is not None, "--out: it is missing; give the file to write, such as model.onnx")
    _check(args.format, args.out)
    return args, rest


def _check(name: str, out: Path) -> None:
    for file in (out, beside(out)):
        require(not file.exists(), f"--out: {file} exists; give another file")
    require(out.parent.is_dir(), f"--out: {out.parent} is not a folder; make it, or give another file")
    missing = [module for module in ("onnx", "onnxscript", "onnxruntime") if name == "onnx" and not find_spec(module)]
    require(not missing, f"--format: onnx needs {', '.join(missing)}; run pip install 'sluice-train[export]'")


def beside(out: Path) -> Path:
    """Path of the file beside `out` that says how an image becomes an input."""
    return out.with_name(f"{out.name}.json")
