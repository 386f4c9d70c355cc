"""Options of `python -m trainer.report`, and their mistakes."""

from pathlib import Path

from data_pipeline.common.cli import parse_known, plain_parser
from data_pipeline.common.errors import require
from trainer.config import run_folder


def parse(arguments: list[str]) -> tuple[Path, list[str], Path]:
    """Parse the run folder, the options of the run, and the output folder. Raises `UserError`."""
    parser = plain_parser(
        prog="python -m trainer.report",
        description="Report where a run is right and wrong on its validation images, or on those of another folder.",
        epilog="Besides, --data.path FOLDER and the other options of python -m trainer: other images.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="The run folder; it comes first.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="The folder to write; RUN/report if not given.")
    parser.add_argument("--force", action="store_true", help="Replace the report that is there.")
    args, rest = parse_known(parser, arguments)
    folder, _ = run_folder(arguments, parser.prog)
    out = args.out or folder / "report"
    require(not out.exists() or out.is_dir(), f"--out: {out} is a file; give a folder")
    mine = (out / "scores.json").is_file()  # the first file of a report
    remedy = "--force to replace the report in it, or another folder" if mine else "another folder"
    require(
        not out.is_dir() or not any(out.iterdir()) or (args.force and mine),
        f"--out: {out} is not empty; give {remedy}",
    )
    return folder, rest, out
