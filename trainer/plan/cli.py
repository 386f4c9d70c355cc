"""Predict a recipe's speed on more GPUs: python -m trainer.plan [--config RECIPE] [--OPTION VALUE ...] [--nodes 1,2,4,8]

One process is measured here, or read from a file that an earlier call wrote on the machine with the GPUs; many processes
are computed by a model. In the table a ~ stands before extrapolated figures. Under torchrun, it also measures the
link between the processes.

A step takes the computation and that part of the all-reduce that the backward pass does not hide. DDP reduces the
gradients in buckets, one after another, each as soon as the backward pass has it (Li et al. 2020, arXiv 2006.15704, sec.
3.2). The loader works ahead on cores of its own; without GPUs it shares them with the computation and with what sends
the gradients, whose work is measured under torchrun only, and their times add up. Stragglers,
evaluation, checkpoints and what compressing takes are left out, and so is what decoding on a GPU takes from training.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.common.errors import UserError, require
from data_pipeline.common.worker_pool import progress
from trainer.config import Config
from trainer.distributed import open_dist_context
from trainer.plan import measurements as parts_of
from trainer.plan.allreduce_model import Link, ring_seconds, tree_seconds
from trainer.plan.measurements import Parts, Step, measure, recipe_of
from trainer.plan.options import AllReduce, Layout

ASSUMED = {
    ("inside", False): Link(10e-6, 200e9),  # NVLink
    ("between", False): Link(20e-6, 50e9),  # InfiniBand of 400 Gbit/s
    ("inside", True): Link(50e-6, 2e9),  # gloo between processes of one machine
    ("between", True): Link(100e-6, 1.25e9),  # Ethernet of 10 Gbit/s
}
"""Links to assume where none is measured or given, on GPUs and, True, on cores that loader and computation share."""


@dataclass(frozen=True)
class Cluster:
    """Machines, and the division of the work among them."""

    nodes: int
    gpus_per_node: int
    gpu_images: int
    """Images per GPU and optimizer step."""
    inside: Link | None
    """Link from a GPU to another in its node; may be None where a node has one."""
    between: Link | None
    """Link from a node to another, its bandwidth that of all adapters of a node; may be None for one node."""
    all_reduce: AllReduce = "best"
    """ring; tree: a chain in each node and two trees over the nodes; best: the faster one for a bucket, as NCCL chooses."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def all_reduce_s(self, size_bytes: float) -> float:
        """Compute the seconds of an all-reduce over all GPUs."""
        links = [*self._within, *self._across]
        if not links:
            return 0.0
        slowest = Link(max(link.latency_s for link in links), min(link.bytes_per_s for link in links))
        depth_s = sum((self.gpus_per_node - 1) * link.latency_s for link in self._within)
        depth_s += sum(math.ceil(math.log2(self.nodes)) * link.latency_s for link in self._across)
        ring_s = ring_seconds(slowest, self.gpus, size_bytes)
        tree_s = tree_seconds(slowest.bytes_per_s, depth_s, size_bytes)
        return {"ring": ring_s, "tree": tree_s, "best": min(ring_s, tree_s)}[self.all_reduce]

    @property
    def _within(self) -> list[Link]:
        return [self.inside] if self.gpus_per_node > 1 and self.inside else []

    @property
    def _across(self) -> list[Link]:
        return [self.between] if self.nodes > 1 and self.between else []


class Prediction(NamedTuple):
    """Speed of a cluster; all but `compute_s` of a measured size and `loader_s` is extrapolated."""

    step_s: float
    """Seconds of an optimizer step."""
    compute_s: float
    """Seconds of it in which a GPU computes; measured here where `measured`."""
    measured: bool
    loader_s: float
    """Seconds that the loader needs for one GPU's images of a step."""
    network_s: float
    """Seconds of all all-reduces of a step."""
    exposed_s: float
    """Seconds of these that the backward pass does not hide."""
    images_per_s: float
    efficiency: float
    """images_per_s over that of as many GPUs which only compute, with the best of the measured batches."""
    epoch_s: float
    limit: Literal["compute", "loader", "network"]
    """Part that is busy longest in a step, so that speeding up the others would gain least."""


def predict(parts: Parts, cluster: Cluster) -> Prediction:
    """Predict the speed of training on `cluster`; its epochs are whole steps."""
    # The times of the parts, each as if it were alone.
    step, measured = _step_of(parts.steps, cluster.gpu_images)
    times_s = [cluster.all_reduce_s(bucket.sent_bytes) for bucket in parts.buckets]
    exposed_s = _exposed_s(step.backward_s, [bucket.ready for bucket in parts.buckets], times_s)
    loader_s, network_s = cluster.gpu_images * parts.loader_s, sum(times_s)
    if parts.shared_cores:
        host_s = parts.host_s_per_byte * sum(bucket.sent_bytes for bucket in parts.buckets) if cluster.gpus > 1 else 0.0
        # While the network is waited for the cores are free: the loader works ahead, and the sums are prepared.
        step_s = step.compute_s + max(loader_s + host_s, exposed_s)
        # The network is the limit where it takes longer than both that share the cores.
        alone_s = network_s - min(step.compute_s, loader_s)
        busy_s = {"compute": step.compute_s, "loader": loader_s, "network": alone_s}
    else:
        step_s = max(step.compute_s + exposed_s, loader_s)
        busy_s = {"compute": step.compute_s, "loader": loader_s, "network": network_s}
    # Compare with GPUs that only compute: that is what more of them could bring at best.
    batch = cluster.gpus * cluster.gpu_images
    best_images_per_s = max(step.images / step.compute_s for step in parts.steps)
    return Prediction(
        step_s=step_s,
        compute_s=step.compute_s,
        measured=measured,
        loader_s=loader_s,
        network_s=network_s,
        exposed_s=exposed_s,
        images_per_s=batch / step_s,
        efficiency=cluster.gpu_images / step_s / best_images_per_s,
        epoch_s=math.ceil(parts.epoch_images / batch) * step_s,
        limit=max(busy_s, key=lambda name: busy_s[name]),  # type: ignore[arg-type]
    )


def _exposed_s(backward_s: float, ready: list[float], times_s: list[float]) -> float:
    """Seconds from the end of the backward pass to that of the last all-reduce, one running at a time."""
    end_s = 0.0
    for share, time_s in zip(ready, times_s, strict=True):
        end_s = max(end_s, share * backward_s) + time_s
    return max(0.0, end_s - backward_s)


def _step_of(steps: tuple[Step, ...], images: int) -> tuple[Step, bool]:
    """Estimate a step of `images`, and say if this size was measured; between two measured sizes it is interpolated.

    Beyond the smallest and the largest, times are assumed to be in proportion to the images.
    """
    sizes = [step.images for step in steps]
    inner = min(max(images, sizes[0]), sizes[-1])
    times_s = [images / inner * float(np.interp(inner, sizes, column)) for column in list(zip(*steps, strict=True))[1:]]
    return Step(images, *times_s), images in sizes


# ---- the command ----------------------------------------------------------------------------------------------------


def plan(parts: Parts, clusters: list[Cluster], price_per_gpu_hour: float | None) -> pd.DataFrame:
    """Make one row for each cluster: nodes, gpus, gpu_images, batch, the fields of `Prediction`, cost of an epoch if priced."""
    rows = []
    for cluster in clusters:
        row = {"nodes": cluster.nodes, "gpus": cluster.gpus, "gpu_images": cluster.gpu_images}
        predicted = predict(parts, cluster)
        cost = (
            {"epoch_cost": predicted.epoch_s / 3600 * cluster.gpus * price_per_gpu_hour} if price_per_gpu_hour else {}
        )
        rows.append({**row, "batch": cluster.gpus * cluster.gpu_images, **predicted._asdict(), **cost})
    return pd.DataFrame(rows)


def table(planned: pd.DataFrame) -> str:
    """Format the plan for people, with a ~ before extrapolated figures."""
    known = np.where(planned.measured, "", "~")
    shown = {
        "nodes": planned.nodes,
        "GPUs": planned.gpus,
        "batch": planned.batch,
        "compute ms": [f"{mark}{1e3 * value:.1f}" for mark, value in zip(known, planned.compute_s, strict=True)],
        "loader ms": [f"{1e3 * value:.1f}" for value in planned.loader_s],
        "network ms": [f"~{1e3 * value:.1f}" for value in planned.network_s],
        "exposed ms": [f"~{1e3 * value:.1f}" for value in planned.exposed_s],
        "images/s": [f"~{value:.0f}" for value in planned.images_per_s],
        "efficiency": [f"~{value:.0%}" for value in planned.efficiency],
        "s/epoch": [f"~{value:.1f}" for value in planned.epoch_s],
    }
    if "epoch_cost" in planned:
        shown["cost/epoch"] = [f"~{value:.3g}" for value in planned.epoch_cost]
    return pd.DataFrame({**shown, "first limit": planned.limit}).to_string(index=False)


def origins(parts: Parts, cluster: Cluster) -> str:
    """Say in one line each where the figures come from."""
    sizes = ", ".join(str(step.images) for step in parts.steps)
    lines = [f"compute, loader: measured on {parts.measured_on}: {parts.recipe}, {sizes} images per GPU and step"]
    for name, link, measured in (
        ("inside", cluster.inside, parts.inside),
        ("between", cluster.between, parts.between),
    ):
        if link:
            assumed = link == ASSUMED[name, parts.shared_cores]
            how = f"assumed: give yours by --{name}_us and --{name}_gb_per_s" if assumed else "as given"
            how = "measured there" if link == measured else how
            lines.append(f"link {name} nodes: {1e6 * link.latency_s:.3g} µs, {link.bytes_per_s / 1e9:.3g} GB/s, {how}")
    shared = (
        "share the cores: their times add up" if parts.shared_cores else "have processors of their own: they overlap"
    )
    return "\n".join(
        [*lines, f"~ extrapolated by the model ({cluster.all_reduce} all-reduce); loader and compute {shared}"]
    )


def _link(args: argparse.Namespace, name: str, measured: Link | None, assumed: Link | None) -> Link | None:
    """Choose the link: the given one, else the measured, else the assumed."""
    latency_us, gb_per_s = getattr(args, f"{name}_us"), getattr(args, f"{name}_gb_per_s")
    if latency_us is None and gb_per_s is None:
        return measured or assumed
    return Link(latency_us / 1e6, gb_per_s * 1e9)


def _read(file: Path, cfg: Config) -> Parts:
    parts = parts_of.read(file)
    wanted = recipe_of(cfg)
    require(
        parts.recipe == wanted,
        f"--parts: {file} is of {parts.recipe}, and the recipe is {wanted}; give the options that it was measured with",
    )
    return parts


def plan_nodes(args: argparse.Namespace, cfg: Config, layout: Layout) -> None:
    """Measure, plan and print, as the command's options say. Collective. Raises `UserError`."""
    nodes, gpus_per_node, images = layout
    out, kept = Path(args.out) if args.out else None, Path(args.save_parts) if args.save_parts else None
    with (
        progress("opening the data"),
        open_dist_context(device=cfg.engine.device, bind_cores=cfg.engine.bind_cores) as ctx,
    ):
        parts = _read(Path(args.parts), cfg) if args.parts else measure(cfg, ctx, images, gpus_per_node)
    if not ctx.primary:
        return
    if kept:
        parts_of.save(parts, kept)
    shared = parts.shared_cores
    inside = _link(args, "inside", parts.inside, ASSUMED["inside", shared] if gpus_per_node > 1 else None)
    between = _link(args, "between", parts.between, ASSUMED["between", shared] if max(nodes) > 1 else None)
    all_reduce: AllReduce = args.all_reduce or ("ring" if parts.shared_cores else "best")
    clusters = [
        Cluster(count, gpus_per_node, share, inside, between, all_reduce)
        for count, share in zip(nodes, images, strict=True)
    ]
    planned = plan(parts, clusters, args.price_per_gpu_hour)
    print(table(planned), origins(parts, clusters[-1]), sep="\n")
    if out:
        _write(planned, parts, clusters, out)


def _write(planned: pd.DataFrame, parts: Parts, clusters: list[Cluster], out: Path) -> None:
    """Write plan.csv, one line for each cluster, and plan.json, the same with its measurements and clusters."""
    tree: dict[str, Any] = {
        "origins": origins(parts, clusters[-1]).splitlines(),
        "measured": ["loader_s", "compute_s where `measured`"],
        "plan": planned.to_dict("records"),
        "clusters": [asdict(cluster) for cluster in clusters],
        "parts": asdict(parts),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "plan.csv", planned.to_csv(index=False).encode())
        replace_file(out / "plan.json", (json.dumps(tree, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written to: {error.strerror}; give another folder") from None
