"""Accept a machine before trusting it: python -m trainer.check [--only ITEM ...] [--out DIR]

Each item runs in a process of its own within a time limit, so that one crash hides no other. The table grows as they end;
check.json and check.md keep it. An item for which the machine lacks something (a GPU, a second process, DALI) is skipped,
with the reason. The exit code is 1 where an item failed.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.cli import parse_plain, plain_parser
from data_pipeline.common.errors import UserError

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"
_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "deepspeed", "numpy")
_RESULT = "check-result: "  # begins the line in which an item's process reports its result


@dataclass(frozen=True)
class Result:
    """Result of one item."""

    item: str
    state: str
    """PASS, FAIL or SKIPPED."""
    told: str
    """Measured figure, or the reason."""
    seconds: float


def main() -> None:
    parser = plain_parser(
        prog="python -m trainer.check",
        description="Accept a machine: decode, train, save, resume and measure here, in a few minutes.",
    )
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="These items alone.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="A folder for check.json and check.md.")
    parser.add_argument("--limit_s", type=float, default=180.0, metavar="S", help="Seconds that an item may take.")
    parser.add_argument("--item", help=argparse.SUPPRESS)  # for the processes of single items
    args = parse_plain(parser, sys.argv[1:])
    if args.item:
        _run_here(args.item)
        return
    names = _chosen(args.only)
    if args.out and any((args.out / name).exists() for name in ("check.json", "check.md")):
        raise UserError(f"--out: {args.out} holds a check already; give another folder")
    results = []
    about = describe_machine()
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n", flush=True)
    for name in names:
        results.append(run_item(name, args.limit_s))
        print(_line(results[-1]), flush=True)
    if args.out:
        _write(args.out, about, results)
    failed = [result.item for result in results if result.state == FAIL]
    if failed:
        print(f"{len(failed)} of {len(results)} failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def run_item(name: str, limit_s: float) -> Result:
    """Run one item in a process group of its own, and end all of it when its time is up."""
    start = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.check", "--item", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        output, state, told = "", FAIL, f"it took longer than {limit_s:g} s"
    else:
        state, told = _read(output, process.returncode)
    finally:
        _end(process)
    return Result(name, state, told, round(time.monotonic() - start, 1))


def _end(process: subprocess.Popen[str]) -> None:
    """End all processes that an item has left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(output: str, code: int) -> tuple[str, str]:
    """Read an item's state and message from the output of its process."""
    lines = output.splitlines()
    said = next((line for line in reversed(lines) if line.startswith(_RESULT)), None)
    if said is not None:
        state, told = json.loads(said.removeprefix(_RESULT))
        return state, told
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return FAIL, f"{how}: {last[:300]}"


def _run_here(name: str) -> None:
    from trainer.check.items import ITEMS, Skip  # here, for torch and DALI take seconds

    try:
        state, told = PASS, ITEMS[name]()
    except Skip as why:
        state, told = SKIPPED, str(why)
    except Exception as error:  # any error is a finding
        first = " ".join(str(error).split())[:300]
        state, told = FAIL, f"{type(error).__name__}: {first}"
    print(f"\n{_RESULT}{json.dumps([state, told])}", flush=True)


def _chosen(only: list[str] | None) -> list[str]:
    from trainer.check.names import NAMES

    unknown = sorted(set(only or ()) - set(NAMES))
    if unknown:
        raise UserError(f"--only: there is no item {unknown[0]}; choose from {', '.join(NAMES)}")
    return [name for name in NAMES if only is None or name in only]


def describe_machine() -> dict[str, str]:
    """Describe hardware, driver and versions, each in a few words."""
    about = {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}"
    }
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        gpus = []
    about["GPUs"] = "; ".join(gpus) or "none (no nvidia-smi)"
    for package in _PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    return about


def _line(result: Result) -> str:
    return f"{result.state:8}{result.item:20}{result.seconds:7.1f} s  {result.told}"


def _write(out: Path, about: dict[str, str], results: list[Result]) -> None:
    rows = [f"| {r.item} | {r.state} | {r.told.replace('|', '/')} | {r.seconds} |" for r in results]
    page = [
        "# Check of a machine",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        "| item | | figure or reason | s |",
        "|---|---|---|---|",
        *rows,
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "check.md", ("\n".join(page) + "\n").encode())
        content = {"about": about, "results": [asdict(result) for result in results]}
        replace_file(out / "check.json", json.dumps(content, indent=2).encode())
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); give another folder") from None
