"""Accept a machine before trusting it: python -m trainer.check [--only ITEM ...] [--out DIR]

Each item runs in a process of its own within a time limit, so that one crash hides no other. The table grows as they end;
check.json and check.md keep it. An item for which the machine lacks something (a GPU, a second process, a package) is
skipped, with the reason. The exit code is 1 where an item failed.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_pipeline.common.cli import parse_plain, plain_parser
from data_pipeline.common.errors import UserError, printable
from trainer.check.names import ITEMS, find
from trainer.check.results import FAIL, PASS, SKIPPED, Found, Result, Skip, check_free, write

_PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-nccl-cu13",
    "nvidia-nccl-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "triton",
    "deepspeed",
    "numpy",
)
_RESULT = "check-result: "  # begins the line in which an item's process reports its result
ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = plain_parser(
        prog="python -m trainer.check",
        description="Accept a machine: decode, train, save, resume and measure here, in a few minutes.",
        epilog="Items: " + ", ".join(ITEMS),
    )
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="These items alone.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="A folder for check.json and check.md.")
    parser.add_argument("--limit_s", type=float, metavar="S", help="Seconds that an item may take, for its own limit.")
    parser.add_argument("--item", help=argparse.SUPPRESS)  # for the processes of single items
    args = parse_plain(parser, sys.argv[1:])
    if args.item:
        _run_here(args.item)
        return
    names = _chosen(args.only)
    if args.out:
        check_free(args.out)
    about = describe_machine()
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n", flush=True)
    results: list[Result] = []
    for name in names:
        results.append(run_item(name, args.limit_s or ITEMS[name].limit_s))
        print(results[-1].line(), flush=True)
        if args.out:
            write(args.out, about, results)
    failed = [result.item for result in results if result.state == FAIL]
    if failed:
        print(f"{len(failed)} of {len(results)} failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def run_item(name: str, limit_s: float) -> Result:
    """Run one item in a process group of its own, and end all of it when its time is up."""
    start = time.monotonic()
    figures: dict[str, float] = {}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.check", "--item", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=alone(),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        state, told = FAIL, f"it took longer than {limit_s:g} s"
    else:
        state, told, figures = _read(output, process.returncode)
    finally:
        _end(process)
    return Result(name, state, told, round(time.monotonic() - start, 1), figures)


def alone() -> dict[str, str]:
    """Make an environment for another process of ours, that joins no others and finds the same packages as this one."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ours = {name: value for name, value in os.environ.items() if name not in launched}
    return ours | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), ours.get("PYTHONPATH")]))}


def _end(process: subprocess.Popen[str]) -> None:
    """End all processes that an item has left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(output: str, code: int) -> tuple[str, str, dict[str, float]]:
    """Read an item's state, message and figures from the output of its process."""
    lines = output.splitlines()
    said = next((line for line in reversed(lines) if line.startswith(_RESULT)), None)
    if said is not None:
        state, told, figures = json.loads(said.removeprefix(_RESULT))
        return state, told, figures
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return FAIL, printable(f"{how}: {last[:300]}"), {}


def _run_here(name: str) -> None:
    """Run an item in this process, and print its result in a line for `_read`."""
    try:
        found = find(name)()
        state = PASS
    except Skip as why:
        state, found = SKIPPED, Found(str(why))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        ours = package in ("", "data_pipeline", "trainer", "torch")
        state, found = (FAIL, Found(str(error))) if ours else (SKIPPED, Found(f"{error.name} is not installed"))
    except Exception as error:  # any error is a finding
        state, found = FAIL, Found(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    print(f"\n{_RESULT}{json.dumps([state, printable(found.told), found.figures])}", flush=True)


def _chosen(only: list[str] | None) -> list[str]:
    unknown = sorted(set(only or ()) - set(ITEMS))
    if unknown:
        raise UserError(f"--only: there is no item {unknown[0]}; choose from {', '.join(ITEMS)}")
    return [name for name in ITEMS if only is None or name in only]


def describe_machine() -> dict[str, str]:
    """Describe hardware, driver and versions, each in a few words."""
    about = {
        "machine": f"{len(os.sched_getaffinity(0))} cores ({_processor()}), Python {platform.python_version()}",
        "system": platform.platform(),
    }
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,uuid", "--format=csv,noheader"]
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
    return {name: printable(value) for name, value in about.items()}


def _processor() -> str:
    """Name the model of the CPU, or at least its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
