"""What the figures of `bench` mean: tables, ratios, a plot, and one sentence."""

import io
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.common.atomic_io import replace_file
from data_pipeline.config import require
from trainer.bench import roofline
from trainer.bench.peers import CONTESTANTS, PLAIN_STEP
from trainer.config import Config

RESTLESS = 1.5  # a factor between rounds from which on their medians say little

LOADER, COMPUTE, JOINED, BOTH = "loader", "compute", "compute + communication", "end to end"
MATMUL, DECODE, REDUCE = "large matmul", "bare decoding", "all-reduce of the gradients"
_UNITS = {MATMUL: ("GFLOP/s", 1e9), REDUCE: ("MB/s", 1e6)}


def summary(turns: pd.DataFrame) -> pd.DataFrame:
    """One row for each world and part: median, min and max of its rate per second, over all rounds."""
    return turns.groupby(["world", "part"], sort=False).rate.agg(["median", "min", "max"]).reset_index()


def ratios(turns: pd.DataFrame, world: int, part: str, other: str) -> pd.Series:
    """The rate of `part` over that of `other`, one value a round."""
    rates = turns[turns.world == world].set_index(["repeat", "round", "part"]).rate.unstack("part")
    return rates[part] / rates[other]


def scaling(turns: pd.DataFrame) -> pd.DataFrame:
    """End to end for each world over the first of them: median, min and max over the repeats of the rounds' medians."""
    middle = turns[turns.part == BOTH].groupby(["repeat", "world"], sort=False).rate.median().unstack("world")
    return middle.div(middle.iloc[:, 0], axis=0).agg(["median", "min", "max"])


def report(turns: pd.DataFrame, facts: dict[int, dict[str, Any]], cfg: Config) -> str:
    """Tables and sentences for people, one set for each world."""
    summed, parts = summary(turns), []
    for world, fact in facts.items():
        rows = summed[summed.world == world].set_index("part")
        parts += [
            f"{cfg.model.name}, {fact['size_px']} px, batch {fact['batch']}, {fact['precision']}; {_processes(fact)}",
            _table(rows, fact),
            *_ratio_lines(turns, fact),
            *(f"left out: {line}" for line in fact["left_out"]),
            *_unrest(rows),
            verdict(rows["median"], fact, cfg),
            "",
        ]
    first, *others = facts
    for world in others:
        row = scaling(turns)[world]
        parts.append(f"{_processes(facts[world])} / {_processes(facts[first])}, end to end: {_spread(row, 3)}")
    return "\n".join(parts).rstrip()


def verdict(rates: pd.Series, fact: dict[str, Any], cfg: Config) -> str:
    """`ceilings.verdict` of one world's medians."""
    measured = roofline.Rates(
        loader=rates[LOADER],
        compute=rates[COMPUTE],
        joined=rates.get(JOINED, rates[COMPUTE]),
        end_to_end=rates[BOTH],
        decode=rates.get(DECODE),
    )
    setting = roofline.Setting(
        cores=fact["cores"],
        gpu=fact["gpu"] is not None,
        precision=fact["precision"],
        best_precision=fact["best_precision"],
        compile=cfg.engine.compile,
        compression=cfg.engine.compression,
        accumulate=cfg.optim.accumulate,
        threads=cfg.data.threads,
        decode=cfg.data.decode,
        mfu=rates[BOTH] * fact["flops_per_image"] / rates[MATMUL],
    )
    return roofline.verdict(measured, setting)


def _table(rows: pd.DataFrame, fact: dict[str, Any]) -> str:
    """What each part does per second, and which share of its ceiling that is."""
    ceiling = {
        LOADER: (rows["median"].get(DECODE), DECODE),
        **dict.fromkeys((COMPUTE, JOINED, BOTH), (rows["median"][MATMUL] / fact["flops_per_image"], MATMUL)),
    }
    lines = []
    for part, row in rows.iterrows():
        unit, scale = _UNITS.get(str(part), ("images/s", 1.0))
        limit, name = ceiling.get(str(part), (None, ""))
        share = f"{row['median'] / limit:.0%} of {name}" if limit else ""
        lines.append((part, f"{_spread(row / scale, 1)} {unit}", share))
    return pd.DataFrame(lines, columns=["part", "median (range)", "share of its ceiling"]).to_string(index=False)


def _ratio_lines(turns: pd.DataFrame, fact: dict[str, Any]) -> Iterator[str]:
    world, joined = fact["world"], JOINED if fact["world"] > 1 else COMPUTE
    there = turns[turns.world == world]
    yield f"end to end / compute: {_spread(_span(ratios(turns, world, BOTH, joined)), 3)}"
    if world > 1:
        yield f"with / without communication: {_spread(_span(ratios(turns, world, JOINED, COMPUTE)), 3)}"
        rates, batch = summary(there).set_index("part")["median"], fact["batch"]
        exposed_ms = 1e3 * batch * (1 / rates[JOINED] - 1 / rates[COMPUTE])
        alone_ms = 1e3 * fact["gradient_bytes"] / rates[REDUCE]
        yield (
            f"communication: {exposed_ms:.1f} ms of a step of {1e3 * batch / rates[JOINED]:.1f} ms are exposed; "
            f"alone, {fact['gradient_bytes'] / 1e6:.1f} MB take {alone_ms:.1f} ms"
        )
    for part in there.part.unique():
        if part in CONTESTANTS:
            mine = COMPUTE if part == PLAIN_STEP else BOTH
            yield f"ours / {part}: {_spread(_span(ratios(turns, world, mine, part)), 2)}"


def _unrest(rows: pd.DataFrame) -> Iterator[str]:
    """A warning, where the same computation was much faster in one round than in another."""
    factor = rows["max"][COMPUTE] / rows["min"][COMPUTE]
    if factor > RESTLESS:
        yield f"other work kept the machine busy: compute alone varied by a factor of {factor:.1f}; measure again"


def _span(values: pd.Series) -> pd.Series:
    return values.agg(["median", "min", "max"])


def _spread(row: pd.Series, digits: int) -> str:
    return f"{row['median']:.{digits}f} ({row['min']:.{digits}f} to {row['max']:.{digits}f})"


def _processes(fact: dict[str, Any]) -> str:
    several, cores = "es" * (fact["world"] > 1), fact["cores"]
    return f"{fact['world']} process{several} x {fact['gpu'] or f'{cores} core' + 's' * (cores > 1)}"


def plot(turns: pd.DataFrame) -> bytes:
    """Images per second over the number of processes as a PNG, beside what the smallest number would scale to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    summed = summary(turns)
    worlds = sorted(summed.world.unique())
    for part in (LOADER, COMPUTE, JOINED, BOTH):
        rows = summed[summed.part == part].sort_values("world")
        whiskers = [rows["median"] - rows["min"], rows["max"] - rows["median"]]
        axes.errorbar(rows.world, rows["median"], whiskers, marker="o", capsize=3, label=part)
    first = summed[(summed.part == BOTH) & (summed.world == worlds[0])]["median"].item() / worlds[0]
    axes.plot(worlds, [first * world for world in worlds], "k:", label="linear")
    axes.set(xlabel="processes", ylabel="images/s", xticks=worlds, yscale="log")
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def write(turns: pd.DataFrame, facts: dict[int, dict[str, Any]], cfg: Config, out: Path) -> None:
    """bench.csv, a row a turn; bench.json; for several worlds scaling.png."""
    out.mkdir(parents=True, exist_ok=True)
    medians = {
        str(world): rows.set_index("part")["median"].to_dict() for world, rows in summary(turns).groupby("world")
    }
    content = {
        "command": _command(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "processor": _processor(),
        "facts": list(facts.values()),
        "config": asdict(cfg),
        "medians": medians,
        "rounds": turns.to_dict("records"),
    }
    replace_file(out / "bench.csv", turns.to_csv(index=False).encode())
    replace_file(out / "bench.json", json.dumps(content, indent=1).encode())
    if len(facts) > 1:
        replace_file(out / "scaling.png", plot(turns))


_PACKAGES = ("sluice-train", "torch", "torchvision", "nvidia-dali-cuda130", "deepspeed", "timm", "lightning")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command() -> str:
    world = os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", f"--nproc_per_node={world}"] if world else ["python"]
    return shlex.join([*launcher, "-m", "trainer.bench", *sys.argv[1:]])


def wandb_mode(cfg: Config) -> str:
    """auto, online or offline. Raises `UserError` where it is off."""
    mode = os.environ.get("WANDB_MODE") or "auto" if cfg.tracking.wandb == "auto" else cfg.tracking.wandb
    require(
        mode not in ("off", "disabled"), f"--wandb: tracking.wandb is {mode}; give --tracking.wandb offline or online"
    )
    return mode


def log_to_wandb(turns: pd.DataFrame, cfg: Config, out: Path) -> None:
    """The medians as one row of a W&B run of its own, whose files lie in `out`. Raises `UserError`."""
    from trainer.tracking.wandb_sink import WandbSink  # here, for its import takes up to two seconds

    out.mkdir(parents=True, exist_ok=True)
    sink = WandbSink(
        wandb_mode(cfg),
        cfg.tracking.project,
        cfg.tracking.entity,
        out,
        f"bench-{cfg.run.name}",
        asdict(cfg),
        note=print,
        on_stop=lambda: None,
    )
    rows = zip(*(summary(turns)[column] for column in ("world", "part", "median")), strict=True)
    named = {f"bench/{world}/{re.sub(r'[^a-z]+', '_', part.lower())}_per_s": rate for world, part, rate in rows}
    sink.write(named, step=0, epoch=0.0)
    sink.close(failed=False)
