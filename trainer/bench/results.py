"""Tables, ratios, a plot and one sentence from the figures of `bench`."""

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
from trainer.bench import roofline
from trainer.bench.options import wandb_mode
from trainer.bench.peers import CONTESTANTS, PLAIN_STEP
from trainer.config import Config

RESTLESS = 1.5  # a factor between rounds from which on their medians say little

TELLING = 3  # steps of a turn from which on it says something, where more were asked for

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
    return middle.div(middle.iloc[:, 0], axis=0).agg(["median", "min", "max"]) if len(middle) else middle


def ideal_scaling(facts: dict[int, dict[str, Any]], worlds: list[int]) -> dict[int, float]:
    """The hardware that each of `worlds` uses over that of the first: GPUs, or where there are none processor cores."""
    used = {world: world * (1 if facts[world]["gpu"] else facts[world]["cores"]) for world in worlds}
    return {world: used[world] / used[worlds[0]] for world in worlds}


def report(turns: pd.DataFrame, facts: dict[int, dict[str, Any]], cfg: Config) -> str:
    """Tables and sentences for people, one set for each world."""
    summed, parts = summary(turns), []
    for world in summed.world.unique():
        fact, rows = facts[world], summed[summed.world == world].set_index("part")
        parts += [
            f"{_setting(fact, cfg)}; {_processes(fact)}",
            _table(rows, fact),
            _effort(turns[turns.world == world], fact),
            *_ratio_lines(turns, fact),
            *(f"left out: {line}" for line in fact["left_out"]),
            _conclusion(rows, fact, cfg),
            "",
        ]
    scaled = scaling(turns)
    first, *others = [int(world) for world in scaled.columns] or [0]
    ideal = ideal_scaling(facts, [first, *others]) if others else {}
    for world in others:
        row, pair = scaled[world], f"{_processes(facts[world])} / {_processes(facts[first])}"
        parts.append(f"{pair}, end to end: {_spread(row, 3)}, efficiency {row['median'] / ideal[world]:.0%}")
    return "\n".join(parts).rstrip()


def _setting(fact: dict[str, Any], cfg: Config) -> str:
    return f"{cfg.model.name}, {fact['size_px']} px, batch {fact['batch']}, {fact['precision']}"


def _effort(turns: pd.DataFrame, fact: dict[str, Any]) -> str:
    """Say how much was measured, and why not more."""
    asked, steps, minutes = fact["asked"]
    repeats = turns.groupby("repeat")["round"].nunique()
    line = f"medians and ranges of {_many(int(repeats.sum()), 'interleaved round')} of {_many(fact['steps'], 'step')}"
    if repeats.max() == asked and fact["steps"] == steps:
        return line
    wanted = f"{_many(asked, 'round')} of {_many(steps, 'step')}"
    return f"{line}; asked for were {wanted}, in at most {minutes:.3g} minutes (--minutes)"


def _conclusion(rows: pd.DataFrame, fact: dict[str, Any], cfg: Config) -> str:
    """Say what holds the run back, if the measurement shows it."""
    needed = {LOADER, COMPUTE, BOTH, MATMUL, *([JOINED] if fact["world"] > 1 else [])}
    missing = sorted(needed - {*rows.index})
    if missing:
        return f"what holds this run back is not known without {', '.join(missing)}"
    if fact["steps"] < min(TELLING, fact["asked"][1]):
        return f"turns of {_many(fact['steps'], 'step')} are too short to say what holds this run back"
    factor = rows["max"][COMPUTE] / rows["min"][COMPUTE]
    if factor > RESTLESS:
        busy = f"other work kept the machine busy: compute alone varied by a factor of {factor:.1f}"
        return f"{busy}, too much to say what holds this run back; measure again"
    return verdict(rows["median"], fact, cfg)


def verdict(rates: pd.Series, fact: dict[str, Any], cfg: Config) -> str:
    """Apply `roofline.verdict` to one world's medians."""
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
    """Make a table of each part's speed, and its share of its ceiling."""
    medians = rows["median"]
    ceiling = {
        LOADER: (medians.get(DECODE), DECODE),
        **dict.fromkeys((COMPUTE, JOINED, BOTH), (medians.get(MATMUL, 0) / fact["flops_per_image"], MATMUL)),
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
    parts = {*there.part}
    if {BOTH, joined} <= parts:
        yield f"end to end / compute: {_spread(_span(ratios(turns, world, BOTH, joined)), 3)}"
    if {JOINED, COMPUTE, REDUCE} <= parts:
        yield f"with / without communication: {_spread(_span(ratios(turns, world, JOINED, COMPUTE)), 3)}"
        rates, batch = summary(there).set_index("part")["median"], fact["batch"]
        exposed_ms = 1e3 * batch * (1 / rates[JOINED] - 1 / rates[COMPUTE])
        alone_ms = 1e3 * fact["gradient_bytes"] / rates[REDUCE]
        yield (
            f"communication: {exposed_ms:.1f} ms of a step of {1e3 * batch / rates[JOINED]:.1f} ms are exposed; "
            f"alone, {fact['gradient_bytes'] / 1e6:.1f} MB take {alone_ms:.1f} ms"
        )
    for part in there.part.unique():
        mine = COMPUTE if part == PLAIN_STEP else BOTH
        if part in CONTESTANTS and mine in parts:
            yield f"ours / {part}: {_spread(_span(ratios(turns, world, mine, part)), 2)}"


def _span(values: pd.Series) -> pd.Series:
    return values.agg(["median", "min", "max"])


def _spread(row: pd.Series, digits: int) -> str:
    return f"{row['median']:.{digits}f} ({row['min']:.{digits}f} to {row['max']:.{digits}f})"


def _processes(fact: dict[str, Any]) -> str:
    world = fact["world"]
    return f"{world} process{'es' * (world > 1)} x {fact['gpu'] or _many(fact['cores'], 'core')}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def plot(turns: pd.DataFrame, facts: dict[int, dict[str, Any]], cfg: Config) -> bytes:
    """Plot images per second, speed-up and efficiency over the number of processes, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    speed, gain = figure.subplots(1, 2)
    summed, scaled = summary(turns), scaling(turns)
    worlds = [int(world) for world in scaled.columns]

    # On the left: images per second of each part, from the slowest turn to the fastest.
    for part, marker in ((LOADER, "s"), (COMPUTE, "^"), (JOINED, "D"), (BOTH, "o")):
        rows = summed[summed.part == part].sort_values("world")
        whiskers = [rows["median"] - rows["min"], rows["max"] - rows["median"]]
        speed.errorbar(rows.world, rows["median"], whiskers, marker=marker, capsize=3, label=part)
    speed.set(xlabel="processes", ylabel="images/s", xticks=worlds, yscale="log")
    _whole_numbers(speed.yaxis)
    speed.legend()

    # On the right: how many times as fast as the fewest processes, against what this hardware allows.
    first, ideal = worlds[0], ideal_scaling(facts, worlds)
    medians, least, most = scaled.to_numpy()
    gain.plot(worlds, [*ideal.values()], "k:", label="ideal on the hardware used")
    gain.errorbar(worlds, medians, [medians - least, most - medians], color="C3", marker="o", capsize=3, label=BOTH)
    for world, median in zip(worlds, medians, strict=True):
        gain.annotate(
            f"{median:.2f}x, {median / ideal[world]:.0%}",
            (world, median),
            (0, -20),
            textcoords="offset points",
            ha="center",
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "pad": 0.2},
        )
    gain.set(xlabel="processes", ylabel=f"speed-up over {first} process" + "es" * (first > 1), xticks=worlds)
    gain.set_ylim(0, 1.1 * max(*ideal.values(), *most))
    gain.margins(x=0.2)
    gain.legend(title="speed-up, efficiency", loc="upper left" if ideal[worlds[-1]] > 1 else "lower left")
    figure.suptitle(f"{_setting(facts[first], cfg)}\n{_hardware(facts, worlds)}")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _whole_numbers(axis: Any) -> None:
    """Make a logarithmic axis show 100 and 200 instead of powers, as its range is often less than one of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _hardware(facts: dict[int, dict[str, Any]], worlds: list[int]) -> str:
    gpu = facts[worlds[0]]["gpu"]
    if gpu:
        return f"{gpu}, one for each process"
    return f"{_processor()}: {', '.join(_processes(facts[world]) for world in worlds)}"


def write(turns: pd.DataFrame, facts: dict[int, dict[str, Any]], cfg: Config, out: Path) -> None:
    """Write bench.csv, a row for each turn; bench.json; for several worlds scaling.png."""
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
    if len(scaling(turns).columns) > 1:
        replace_file(out / "scaling.png", plot(turns, facts, cfg))


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


def log_to_wandb(turns: pd.DataFrame, cfg: Config, out: Path) -> None:
    """Log the medians as one row of a W&B run of its own, whose files lie in `out`. Raises `UserError`."""
    from trainer.tracking.wandb_sink import WandbSink  # imported here: it takes up to two seconds

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
