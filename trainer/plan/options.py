"""Options of `python -m trainer.plan`, and their mistakes."""

import argparse
import math
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from data_pipeline.common.cli import parse_known, plain_parser
from data_pipeline.common.errors import UserError, require
from trainer.config import Config

AllReduce = Literal["ring", "tree", "best"]

NODES = (1, 2, 4, 8)
"""Numbers of nodes that are planned by default, as far as their GPUs can share the batch evenly."""


class Layout(NamedTuple):
    """Numbers of GPUs that are planned."""

    nodes: list[int]
    gpus_per_node: int
    gpu_images: list[int]
    """Images per GPU and step, for each number of nodes."""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the planner's own options; the rest of the command line is returned beside them. Raises `UserError`."""
    parser = plain_parser(
        prog="python -m trainer.plan",
        description="Predict speed, time and cost of a recipe on more GPUs. Options of python -m trainer are known too.",
    )
    add = parser.add_argument

    # The machines.
    add(
        "--nodes",
        metavar="N,N",
        help="Numbers of nodes, one row each. Default: those of 1,2,4,8 whose GPUs can share the batch evenly.",
    )
    add(
        "--gpus_per_node",
        type=int,
        default=8,
        metavar="N",
        help="Default: %(default)s. On CPUs: processes as this one.",
    )
    add(
        "--gpu_batch",
        type=int,
        metavar="IMAGES",
        help="Images per GPU and step, so that the batch grows with the GPUs (weak scaling). If not given, data.batch is "
        "divided among the GPUs, as python -m trainer does (strong scaling): the same training, sooner.",
    )

    # The network between them, of which nothing is known here.
    for name, what in (
        ("inside", "from GPU to GPU in a node"),
        ("between", "between nodes, all adapters of one together"),
    ):
        add(f"--{name}_us", type=float, metavar="US", help=f"Latency {what}, in microseconds.")
        add(
            f"--{name}_gb_per_s",
            type=float,
            metavar="GB",
            help=f"Bandwidth {what}, in 10^9 bytes a second and direction.",
        )
    add(
        "--all_reduce",
        choices=get_args(AllReduce),
        help="Algorithm. Default: best on GPUs, as NCCL; ring on CPUs, as gloo.",
    )

    # What is read and written.
    add("--price_per_gpu_hour", type=float, metavar="PRICE", help="Adds the cost of an epoch, in the same currency.")
    add("--parts", metavar="FILE", help="Plan with what --save_parts wrote; nothing is measured.")
    add("--save_parts", metavar="FILE", help="Write what was measured here.")
    add("--out", metavar="DIR", help="A folder for plan.csv and plan.json.")
    return parse_known(parser, arguments)


def layout_of(args: argparse.Namespace, cfg: Config) -> Layout:
    """Check all options and lay out what is planned. Raises `UserError`."""
    require(cfg.engine.name == "ddp", f"engine.name: {cfg.engine.name} cannot be planned; give ddp")
    gpus_per_node = args.gpus_per_node
    require(gpus_per_node > 0, f"--gpus_per_node: {gpus_per_node} is not positive; give the GPUs of a node")
    nodes = _node_counts(args.nodes) if args.nodes else _default_nodes(cfg, gpus_per_node, args.gpu_batch)
    price = args.price_per_gpu_hour
    require(price is None or price > 0, f"--price_per_gpu_hour: {price} is not positive; leave it out for no cost")
    images = gpu_images_of(cfg, [gpus_per_node * count for count in nodes], args.gpu_batch)
    for name in ("inside", "between"):
        _check_link(name, getattr(args, f"{name}_us"), getattr(args, f"{name}_gb_per_s"))
    out = Path(args.out) if args.out else None
    require(not out or out.is_dir() or not out.exists(), f"--out: {out} is a file; give a folder")
    _refuse_present(*[out / name for name in ("plan.csv", "plan.json")] if out else [])
    _refuse_present(Path(args.save_parts) if args.save_parts else None)
    return Layout(nodes, gpus_per_node, images)


def gpu_images_of(cfg: Config, gpus: list[int], gpu_images: int | None) -> list[int]:
    """Images per GPU and step on each number of `gpus`. Raises `UserError` where the batch cannot be shared."""
    batch, micro_batches = cfg.data.batch_at(cfg.run.epochs - 1, cfg.run.epochs), cfg.optim.accumulate
    if gpu_images is not None:
        require(
            gpu_images > 0 and gpu_images % micro_batches == 0,
            f"--gpu_batch: {gpu_images} images cannot be shared by {micro_batches} micro-batches; give a multiple of it",
        )
        return [gpu_images] * len(gpus)
    shares = math.lcm(*gpus) * micro_batches
    require(
        batch % shares == 0,
        f"data.batch: {batch} images cannot be shared by {', '.join(map(str, gpus))} GPUs x {micro_batches} micro-batches; "
        f"choose a multiple of {shares}, or give --gpu_batch",
    )
    return [batch // number for number in gpus]


def _default_nodes(cfg: Config, gpus_per_node: int, gpu_images: int | None) -> list[int]:
    """Choose the numbers of nodes to plan where none are given: at least one."""
    batch, micro_batches = cfg.data.batch_at(cfg.run.epochs - 1, cfg.run.epochs), cfg.optim.accumulate
    fits = [nodes for nodes in NODES if gpu_images or batch % (nodes * gpus_per_node * micro_batches) == 0]
    return fits or [1]


def _node_counts(text: str) -> list[int]:
    counts = text.split(",")
    require(
        all(count.isdecimal() and int(count) > 0 for count in counts),
        f"--nodes: {text} does not fit; give numbers of nodes with commas between, as 1,2,4,8",
    )
    return [int(count) for count in counts]


def _check_link(name: str, latency_us: float | None, gb_per_s: float | None) -> None:
    if latency_us is None and gb_per_s is None:
        return
    if latency_us is None or gb_per_s is None or latency_us < 0 or gb_per_s <= 0:
        raise UserError(
            f"--{name}_us, --{name}_gb_per_s: {latency_us}, {gb_per_s} are no link; give both, the bandwidth above 0"
        )


def _refuse_present(*files: Path | None) -> None:
    for file in files:
        require(file is None or not file.exists(), f"{file} exists and is kept; give another name")
