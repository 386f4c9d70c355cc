"""The planner beside real runs: ranks in network namespaces, joined by a bridge, each sending at a rate that `tc` sets.

    python -m tests.stress.shaped [--ranks 2] [--size_px 64] [--images 16] [--rounds 7]

All rates are measured in turn, round after round, by the same processes: a machine that slows down slows them all. Each
round also times the computation, of all ranks at once but without communication, as they share the machine. It needs root,
`ip`, `tc`, `nsenter` and `unshare`. The namespaces have no names: they go with the processes, and those with this one.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from shutil import which
from statistics import mean, median
from typing import Any

import pandas as pd

from tests.support.runs import ROOT, environment
from trainer.config import Config, load
from trainer.distributed import DistContext, open_dist_context
from trainer.engine.base import Engine
from trainer.engine.config import Compression
from trainer.plan.allreduce_model import Link, host_seconds_per_byte, measure_link
from trainer.plan.cli import Cluster, predict
from trainer.plan.measurements import Bucket, Parts, Step, measure_step, synthetic
from trainer.setup.parts import build_engine

CLASSES, STEPS = 10, 3
PAYLOAD = 1448 / 1514  # of an Ethernet frame, the TCP data
VETH_LATENCY_S = 1e-4  # about what a small message takes when nothing is shaped
COMPRESSIONS: tuple[Compression, ...] = ("none", "bf16")
TOOLS = ("ip", "tc", "nsenter", "unshare")


@dataclass(frozen=True)
class Case:
    mbit_per_s: int | None
    """Rate at which each rank sends; None for as fast as it can."""
    compression: Compression = "none"

    def __str__(self) -> str:
        rate = f"{self.mbit_per_s} Mbit/s" if self.mbit_per_s else "unshaped"
        return rate if self.compression == "none" else f"{rate}, {self.compression}"


CASES = [Case(100), Case(100, "bf16"), Case(200), Case(300), Case(500), Case(1000), Case(None)]


def possible() -> bool:
    """Return True where this process may make namespaces and shape their traffic."""
    return os.geteuid() == 0 and all(which(tool) for tool in TOOLS)


# ---- the network ----------------------------------------------------------------------------------------------------


class Ranks:
    """Processes that each sit in a network namespace and do what they are told."""

    def __init__(self, options: list[str], processes: list["subprocess.Popen[str]"]) -> None:
        self.options, self.processes = options, processes

    def all(self, *order: object) -> list[Any]:
        """Send `order` to all ranks at once, and return each rank's answer."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self.processes]

    def shape(self, mbit_per_s: int | None) -> None:
        for process in self.processes:
            _in(process.pid, "tc qdisc del dev eth0 root", check=False)
            if mbit_per_s:
                # The bucket holds two of the largest packets that the stack hands over, of 64 KiB.
                _in(process.pid, f"tc qdisc add dev eth0 root tbf rate {mbit_per_s}mbit burst 128kb latency 400ms")

    def _answer(self, process: "subprocess.Popen[str]") -> Any:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a rank ended with exit code {process.wait()}")
        return json.loads(line)


@contextmanager
def open_ranks(world: int, options: list[str]) -> Iterator[Ranks]:
    """`world` ranks with the configuration of `options`, joined by a bridge; none is left when the context ends."""
    processes: list[subprocess.Popen[str]] = []
    try:
        hub = _isolated(["cat"])
        processes.append(hub)
        for rank in range(world):
            processes.append(_isolated([sys.executable, "-m", "tests.stress.shaped", "--serve", *options], rank, world))
        _wait_until_isolated(processes)
        _in(hub.pid, "ip link add bridge type bridge")
        _in(hub.pid, "ip link set bridge up")
        for rank, process in enumerate(processes[1:]):
            _in(hub.pid, f"ip link add port{rank} type veth peer name eth0 netns {process.pid}")
            _in(hub.pid, f"ip link set port{rank} master bridge up")
            _in(process.pid, f"ip address add {_address(rank)}/24 dev eth0")
            _in(process.pid, "ip link set lo up")
            _in(process.pid, "ip link set eth0 up")
        ranks = Ranks(options, processes[1:])
        ranks.all("join")
        yield ranks
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _isolated(command: list[str], rank: int = 0, world: int = 1) -> "subprocess.Popen[str]":
    joined = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world,  # they share this machine's cores
        "MASTER_ADDR": _address(0),
        "MASTER_PORT": 29500,
    }
    return subprocess.Popen(
        ["unshare", "--net", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment(), **{name: str(value) for name, value in joined.items()}},
    )


def _wait_until_isolated(processes: list["subprocess.Popen[str]"]) -> None:
    ours = os.readlink("/proc/self/ns/net")
    while any(os.readlink(f"/proc/{process.pid}/ns/net") == ours for process in processes):
        time.sleep(0.01)


def _in(pid: int, command: str, check: bool = True) -> None:
    """Run `command` in the network namespace of a process."""
    entered = ["nsenter", "--target", str(pid), "--net", *command.split()]
    subprocess.run(entered, check=check, stderr=None if check else subprocess.DEVNULL)


def _address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


# ---- a rank ---------------------------------------------------------------------------------------------------------


def serve(options: list[str]) -> None:
    """Answer the orders on stdin with a line of JSON each, until it is closed."""
    cfg = load(options)
    answers, order = sys.stdout, json.loads(sys.stdin.readline())
    assert order == ["join"]  # before that there is no network
    with redirect_stdout(sys.stderr), open_dist_context() as ctx:
        bench = Bench(cfg, ctx)
        answer: object = None
        while order:
            print(json.dumps(answer), file=answers, flush=True)
            order = json.loads(sys.stdin.readline() or "null")
            if order:
                answer = getattr(bench, order[0])(*order[1:])


class Bench:
    """Orders that a rank obeys."""

    def __init__(self, cfg: Config, ctx: DistContext) -> None:
        self.cfg, self.ctx = cfg, ctx
        self.alone = replace(ctx, rank=0, world=1)
        self.images = cfg.data.batches[-1] // ctx.world
        self.engines: dict[str, Engine] = {
            how: build_engine(replace(cfg, engine=replace(cfg.engine, compression=how)), CLASSES, ctx)
            for how in COMPRESSIONS
        }
        self.engines["alone"] = build_engine(cfg, CLASSES, self.alone)
        self.batches = synthetic(cfg, CLASSES, self.alone, self.images)

    def parts(self) -> tuple[Step, tuple[Bucket, ...]]:
        self.ctx.barrier()
        return measure_step(self.cfg, CLASSES, self.alone, self.images)

    def steps(self, kind: str) -> list[float]:
        """Seconds of each of a few updates in a row, together or `alone`, after one that does not count."""
        engine, marks = self.engines[kind], []
        engine.step(self.batches, 1e-3)
        self.ctx.barrier()
        marks.append(time.perf_counter())
        for _ in range(STEPS):
            engine.step(self.batches, 1e-3)
            marks.append(time.perf_counter())
        return [end - start for start, end in pairwise(marks)]

    def host(self) -> float:
        return host_seconds_per_byte(self.ctx)

    def link(self) -> Link:
        return measure_link(self.ctx)


# ---- the comparison -------------------------------------------------------------------------------------------------


def compare(ranks: Ranks, cases: list[Case], images: int, rounds: int) -> pd.DataFrame:
    """One row a case: measured and predicted seconds of an update, the latter by the shaped and by the measured link."""
    world = len(ranks.processes)
    step, buckets = ranks.all("parts")[0]
    host_s_per_byte = max(ranks.all("host"))
    alone_s: list[float] = []
    taken_s: dict[Case, list[float]] = {case: [] for case in cases}
    links: dict[Case, list[Link]] = {case: [] for case in cases}
    for number in range(rounds):
        alone_s.append(_together(ranks.all("steps", "alone")))
        for case in cases:
            ranks.shape(case.mbit_per_s)
            taken_s[case].append(_together(ranks.all("steps", case.compression)))
            if number % 3 == 0 and case.compression == "none":
                links[case].append(Link(*ranks.all("link")[0]))
        ranks.shape(None)
    rows = []
    for case in cases:
        parts = _as_parts(
            Step(*step), _sent([Bucket(*bucket) for bucket in buckets], case), median(alone_s), host_s_per_byte
        )
        measured_link = next(links[other] for other in cases if links[other] and other.mbit_per_s == case.mbit_per_s)
        given = [Link(VETH_LATENCY_S, case.mbit_per_s / 8 * 1e6 * PAYLOAD)] if case.mbit_per_s else []
        found = Link(*(median(column) for column in zip(*measured_link, strict=True)))
        by_link = [predict(parts, Cluster(world, 1, images, None, link, "ring")).step_s for link in (*given, found)]
        rows.append(
            {
                "case": str(case),
                "compute_s": median(alone_s),
                "measured_s": median(taken_s[case]),
                "least_s": min(taken_s[case]),
                "most_s": max(taken_s[case]),
                "shaped_s": by_link[0] if given else float("nan"),
                "link_s": by_link[-1],
                "link_mbit_per_s": found.bytes_per_s * 8 / 1e6,
                "link_latency_s": found.latency_s,
                "host_s_per_byte": host_s_per_byte,
            }
        )
    compared = pd.DataFrame(rows)
    for name in ("shaped", "link"):
        compared[f"{name}_off"] = compared[f"{name}_s"] / compared.measured_s - 1
    return compared


def _together(by_rank: list[list[float]]) -> float:
    """Seconds of an update that ends when its slowest rank ends, on average."""
    return mean(max(seconds) for seconds in zip(*by_rank, strict=True))


def _sent(buckets: list[Bucket], case: Case) -> tuple[Bucket, ...]:
    """The buckets of uncompressed gradients, as they are sent."""
    share = 1.0 if case.compression == "none" else 0.5
    return tuple(bucket._replace(sent_bytes=share * bucket.size_bytes) for bucket in buckets)


def _as_parts(step: Step, buckets: tuple[Bucket, ...], compute_s: float, host_s_per_byte: float) -> Parts:
    """Parts without a loader, the computation as long as it took in between the runs."""
    scale = compute_s / step.compute_s
    step = Step(step.images, *(scale * seconds for seconds in step[1:]))
    return Parts("here", "", 1, (step,), buckets, loader_s=0.0, shared_cores=True, host_s_per_byte=host_s_per_byte)


def table(compared: pd.DataFrame) -> str:
    """For the README: measured and predicted seconds of an update, and how far off the predictions are."""
    lines = [
        "| each rank sends | measured s (range) | predicted, link as shaped | off | predicted, link measured | off |",
        "|---|---|---|---|---|---|",
    ]
    for row in compared.to_dict("records"):
        shaped = [f"{row['shaped_s']:.3f}", f"{row['shaped_off']:+.1%}"]
        cells = [
            row["case"],
            f"{row['measured_s']:.3f} ({row['least_s']:.3f} to {row['most_s']:.3f})",
            *(["", ""] if math.isnan(row["shaped_s"]) else shaped),
            f"{row['link_s']:.3f} ({row['link_mbit_per_s']:.0f} Mbit/s)",
            f"{row['link_off']:+.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def options_of(world: int, size_px: int, images: int) -> list[str]:
    """The configuration of the ranks, as a command line."""
    return ["--data.size_px", str(size_px), "--data.batch", str(world * images), "--engine.precision", "fp32"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.shaped")
    for name, default in (("ranks", 2), ("size_px", 64), ("images", 16), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if not possible():
        sys.exit(f"this needs root and {', '.join(TOOLS)}")
    with open_ranks(args.ranks, options_of(args.ranks, args.size_px, args.images)) as ranks:
        compared = compare(ranks, CASES, args.images, args.rounds)
    print(table(compared))
    print(
        f"ResNet-18, {args.size_px} px, {args.ranks} ranks x {args.images} images; computation alone "
        f"{compared.compute_s[0]:.3f} s; medians of {args.rounds} interleaved rounds of {STEPS} updates"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    else:
        main()
