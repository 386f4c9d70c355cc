"""Items about whole runs, from files to scores, as a user starts them."""

import gzip
import inspect
import json
import resource
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader
from data_pipeline.sources.catalog import open_catalog
from trainer.check.cli import alone
from trainer.check.items import common
from trainer.check.items.common import complaint, make_engine, run_module, small_dataset
from trainer.check.results import Found, Skip
from trainer.config import load
from trainer.distributed import DistContext, gpu_count, open_dist_context
from trainer.loop import fit
from trainer.resilience.signals import StopFlag
from trainer.scoring import evaluate

STEPS, BATCH = 50, 16
PROFILED = range(8, 13)
"""Steps of a profile, counted from 1."""


def options(data: Path, run: Path, **more: object) -> list[str]:
    """Make the options of a run of `STEPS` steps that is soon at its first checkpoint, and has more to do."""
    chosen = {
        "data.path": data,
        "data.size_px": 64,
        "data.batch": BATCH,
        "run.epochs": 2,
        "run.save_every": 5,
        "run.log_every": 1,
        "run.dir": run,
        "model.width": common.SCALE.width,
        "tracking.wandb": "off",
        "tracking.tensorboard": "false",
        "tracking.histograms_every": 0,
    }
    return [
        f"--{name}={value}" for name, value in {**chosen, **{n.replace("__", "."): v for n, v in more.items()}}.items()
    ]


def ranks_train() -> Found:
    """Let all ranks train as a user starts them: what they say to each other, and each other's files."""
    ranks = gpu_count() or 2
    if ranks == 1:
        raise Skip("there is one GPU")
    if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:
        raise Skip(f"torch {torch.__version__} is older than training on several ranks needs")
    with small_dataset(STEPS * ranks, 64) as folder, TemporaryDirectory() as runs:
        run, batch = Path(runs) / "run", 4 * ranks
        more = {"data__batch": batch, "run__snapshot_every": 2, "run__snapshot_dir": Path(runs) / "memory"}
        more |= {"run__max_steps": 6, "run__save_every": 4, "engine__sync_bn": str(gpu_count() > 0).lower()}
        run_module("trainer", *options(folder, run, **more), ranks=ranks)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert max(row["step"] for row in rows) == 6, "steps are missing"
        assert any("val/loss" in row for row in rows), "it was not validated"
        assert any("perf/snapshot_write_s" in row for row in rows), "no snapshot was kept"
        wait_ms = [row["perf/comm_ms"] for row in rows if "perf/comm_ms" in row]
    return Found(f"{ranks} ranks made 6 steps of {batch} images, with {median(wait_ms):.1f} ms to sum gradients")


def kill_and_resume() -> Found:
    with small_dataset(STEPS // 2 * BATCH) as folder, TemporaryDirectory() as runs:
        run = Path(runs) / "run"
        command = [sys.executable, "-m", "trainer", *options(folder, run)]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=alone())
        # Kill it without warning, as a lost node dies, once there is something to go on from.
        while first.poll() is None and not (run / "checkpoints/last").exists():
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        _, said = first.communicate()
        assert (run / "checkpoints/last").exists(), f"no checkpoint came: {complaint(said)}"
        saved = json.loads((run / "checkpoints/last/progress.json").read_text())["step"]
        assert 0 < saved < STEPS, f"it was at step {saved} of {STEPS} when it was killed"
        # The same command must go on, and the result must be usable.
        again = run_module("trainer", *options(folder, run))
        assert f"at step {saved} of {STEPS}" in again, "it has not resumed where it was saved"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "train/loss" in row and "val/loss" not in row]
        assert max(row["step"] for row in rows) == STEPS and len(set(steps)) == len(steps), "steps are missing or twice"
        if gpu_count():
            there = {name for row in rows for name in row}
            missing = {"perf/gpu_mem_gib", "perf/mfu_pct", "perf/step_ms_p50", "perf/data_wait_pct"} - there
            assert not missing, f"its metrics lack {', '.join(sorted(missing))}"
            assert all(0 < row["perf/mfu_pct"] < 100 for row in rows if "perf/mfu_pct" in row), "its MFU is impossible"
        scored = run_module("trainer.evaluate", str(run))
    return Found(f"killed after step {saved}, went on to {STEPS}; {scored.strip().rpartition(': ')[2]}")


def validation_memory() -> Found:
    """Validate thrice beside a training loader, as a run does after its first epoch."""
    used = []
    with small_dataset(4 * BATCH) as folder, open_dist_context() as ctx:
        cfg = DataConfig(path=str(folder), batch=BATCH, size_px=64)
        train = Loader(cfg, open_catalog(cfg, "train"), ctx, training=True)
        val = Loader(cfg, open_catalog(cfg, "val"), ctx, training=False)
        engine = make_engine(ctx, classes=len(train.catalog.classes))
        for _ in range(3):
            for batch in train:
                engine.step([batch], 1e-3)
            evaluate(engine.predict, val, ctx)
            used.append(used_mib(ctx))
    assert used[2] <= 1.05 * used[1] + 32, (
        f"memory grows with each validation: {', '.join(f'{u:.0f}' for u in used)} MiB"
    )
    where = "of the GPU" if ctx.device.type == "cuda" else "of the process, at most"
    return Found(f"{', '.join(f'{u:.0f}' for u in used)} MiB {where}, after three validations")


def used_mib(ctx: DistContext) -> float:
    """Memory in use: of the whole GPU, DALI's included, or at most by this process."""
    if ctx.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(ctx.device)
        return (total - free) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step_gaps() -> Found:
    """Profile a run, and look for what lies between its steps."""
    first, last = PROFILED[0], PROFILED[-1]
    with small_dataset(STEPS // 2 * BATCH // 2) as folder, TemporaryDirectory() as runs, open_dist_context() as ctx:
        run = Path(runs) / "run"
        more = {"run__profile": f"{first}-{last}", "run__max_steps": last + 1, "run__save_every": 100}
        with StopFlag() as stop:
            fit(load(options(folder, run, **more)), ctx, stop)
        with gzip.open(next((run / "profile").glob("*.json.gz")), "rt") as file:
            events = json.load(file)["traceEvents"]
    steps = spans(events, "step ")
    assert len(steps) == last - first + 1, f"the profile has {len(steps)} steps, not {last - first + 1}"
    data_ms = sum(end - start for start, end in spans(events, "data")) / len(steps) / 1e3
    step_ms = median(after[0] - before[0] for before, after in pairwise(steps)) / 1e3
    gap_ms = median(after[0] - before[1] for before, after in pairwise(steps)) / 1e3
    told = f"a step takes {step_ms:.1f} ms, with {data_ms:.1f} ms for its data and {gap_ms:.2f} ms to the next one"
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if ctx.device.type != "cuda":
        return Found(told)
    assert kernels, "the profile has no kernels"
    return Found(f"{told}; the GPU is idle for {idle_share(kernels):.0%}")


def spans(events: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """List start and end, in microseconds, of the ranges on the CPU whose names begin so, in their order."""
    found = (event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(name))
    return sorted((event["ts"], event["ts"] + event["dur"]) for event in found)


def idle_share(kernels: list[dict[str, Any]]) -> float:
    """Share of the time from the first kernel to the end of the last in which none ran."""
    busy, end = 0.0, float("-inf")
    for start, duration in sorted((event["ts"], event["dur"]) for event in kernels):
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    whole = end - min(event["ts"] for event in kernels)
    return 1 - busy / whole if whole else 0.0
