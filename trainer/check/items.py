"""Items of the check: each is a function that returns its measurement, or raises an error.

They run on a CPU and on a GPU, at a size for each; `Skip` names what a machine lacks.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch

from data_pipeline.bench.peers import bare_decoder
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import IGNORE_LABEL, Batch, Cursor, Loader
from data_pipeline.sources.catalog import open_catalog
from data_pipeline.sources.pil_decode import as_rgb, decode
from trainer.check.images import KINDS, SUFFIX, encoded, picture, write_dataset
from trainer.check.names import NAMES
from trainer.config import Config, load
from trainer.distributed import DistContext, gpu_count, open_dist_context
from trainer.engine.base import Engine
from trainer.engine.precision import resolve_precision
from trainer.setup import build_engine

ITEMS: dict[str, Callable[[], str]] = {}
"""Name, as in `NAMES` -> the item."""

ON_GPU = gpu_count() > 0
CLASSES, BATCH, SIZE_PX = 10, (256, 8)[not ON_GPU], (224, 64)[not ON_GPU]
FORMAT_TOLERANCE = 3.0  # mean difference from Pillow's pixels, of 255: decoders round, and scale chroma, differently


class Skip(Exception):
    """Raised where this machine lacks something that an item needs; the message names it."""


def item(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(function: Callable[[], str]) -> Callable[[], str]:
        ITEMS[name] = function
        return function

    assert name in NAMES
    return register


# ---- data -----------------------------------------------------------------------------------------------------------


@item("decode kinds")
def decode_kinds() -> str:
    worst = ("", 0.0)
    with TemporaryDirectory() as folder, open_dist_context() as ctx:
        for number, kind in enumerate(KINDS):
            path = Path(folder) / "train" / "all" / f"{number:02}.{SUFFIX[KINDS[kind][0]]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(number, 96), kind))
            other = Path(folder) / "train" / "other" / path.name
            other.parent.mkdir(exist_ok=True)
            other.write_bytes(path.read_bytes())
        # At their own size nothing is resized, so pixels can be compared one by one.
        cfg = DataConfig(path=folder, batch=4, size_px=96, eval_crop=1.0, val_share=0.5)
        catalog = open_catalog(cfg, "train")
        for batch in Loader(cfg, catalog, ctx, training=False):
            for row in range(batch.num_real):
                name = catalog.paths[int(batch.ids[row])]
                ours = batch.images[row].permute(1, 2, 0).cpu().numpy().astype(np.int16)
                theirs = np.asarray(as_rgb(decode(catalog.read(int(batch.ids[row]))))).astype(np.int16)
                difference = float(np.abs(ours - theirs).mean())
                worst = max(worst, (name, difference), key=lambda one: one[1])
    assert worst[1] < FORMAT_TOLERANCE, f"{worst[0]} differs from Pillow's pixels by {worst[1]:.2f} of 255 on average"
    return f"{len(KINDS)} kinds; largest mean difference from Pillow {worst[1]:.2f} of 255"


AUGMENTS = {
    "randaugment": AugmentConfig(policy="randaugment"),
    "trivialaugment": AugmentConfig(policy="trivialaugment"),
    "autoaugment": AugmentConfig(policy="autoaugment"),
    "jitter": AugmentConfig(color_jitter=(0.4, 0.4, 0.4, 0.1)),
    "rotation": AugmentConfig(rotate_deg=20),
    "erasing": AugmentConfig(erase=1.0),
}


@item("augment")
def augment() -> str:
    told = []
    with small_dataset() as folder, open_dist_context() as ctx:
        for name, augmented in AUGMENTS.items():
            cfg = DataConfig(path=str(folder), batch=8, size_px=64, augment=augmented)
            first, again = (pixels(cfg, ctx) for _ in range(2))
            assert torch.equal(first, again), f"{name} gives other pixels the second time"
            if ctx.device.type == "cuda":
                on_cpu = pixels(cfg, replace(ctx, device=torch.device("cpu")))
                told.append(f"{name} {(first.cpu().float() - on_cpu.float()).abs().mean():.2f}")
    return f"GPU from CPU, mean of 255: {', '.join(told)}" if told else f"{len(AUGMENTS)} repeat to the bit"


@item("damaged files")
def damaged_files() -> str:
    with small_dataset() as folder, open_dist_context() as ctx:
        cfg = DataConfig(path=str(folder), batch=8, size_px=64)
        catalog = open_catalog(cfg, "train")
        whole = pixels(cfg, ctx, training=False)
        broken = folder / "train" / catalog.paths[3]
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])  # after the scan, as in mid-run
        loader = Loader(cfg, catalog, ctx, training=False)
        batches = [batch._replace(images=batch.images.clone()) for batch in loader]
        named = [path for path, _ in loader.take_bad()]
    assert named == [catalog.paths[3]], f"named {named}, not {catalog.paths[3]}"
    assert batches[0].labels.tolist().count(IGNORE_LABEL) == 1, "the damaged row counts"
    assert torch.equal(torch.cat([batch.images for batch in batches[1:]]), whole[8:]), "the next batches are others"
    return "one truncated JPEG of 32 named, 31 counted"


@item("held batches")
def held_batches() -> str:
    with small_dataset() as folder, open_dist_context() as ctx:
        cfg = DataConfig(path=str(folder), batch=4, size_px=64)
        loader, held = Loader(cfg, open_catalog(cfg, "train"), ctx, training=False), []
        for batch in loader:
            held.append((batch.images, batch.images.clone()))
            busy = torch.randn(512, 512, device=ctx.device)
            for _ in range(4):
                busy = busy @ busy / 512
            if len(held) == 6:
                break
        assert all(torch.equal(images, copy) for images, copy in held), "a batch changed while it was held"
    return "six batches"


@item("worlds")
def worlds() -> str:
    with small_dataset() as folder, open_dist_context() as ctx:
        loads = (0.0, 0.75, 1.0) if ctx.device.type == "cuda" else (0.75,)
        for load_share in loads:
            cfg = DataConfig(path=str(folder), batch=8, size_px=64, hw_decoder_load=load_share)
            alone = pixels(cfg, ctx)
            ranks = [pixels(cfg, replace(ctx, rank=rank, world=2)) for rank in range(2)]
            together = torch.stack(ranks, dim=1).flatten(0, 1)  # two ranks take turns, image by image
            assert torch.equal(alone, together), f"pixels differ at a hardware decoder's load of {load_share}"
    return f"the same bits at one rank and two, hardware decoder's load {', '.join(map(str, loads))}"


@item("loader speed")
def loader_speed() -> str:
    told = []
    count = 4096 if ON_GPU else 128
    with small_dataset(count, 256) as folder, open_dist_context() as ctx:
        streams = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in folder.rglob("*.jpg")]
        bare, start = bare_decoder(), time.perf_counter()
        for stream in streams:
            bare(stream)
        bare_rate = len(streams) / (time.perf_counter() - start)
        for size_px in (224, 160):
            cfg = DataConfig(path=str(folder), batch=min(count // 4, 256), size_px=size_px)
            loader = Loader(cfg, open_catalog(cfg, "train"), ctx, training=True, epochs=1 << 20)
            rates = []
            for epoch in range(3):
                loader.seek(Cursor(epoch))
                start = time.perf_counter()
                images = sum(batch.num_real for batch in loader)
                synchronize(ctx)
                rates.append(images / (time.perf_counter() - start))
            told.append(f"{size_px} px {median(rates[1:]):.0f}")
    return f"images/s: {', '.join(told)}; bare decoding by one core {bare_rate:.0f}"


# ---- engine ---------------------------------------------------------------------------------------------------------


@item("optimizers")
def optimizers() -> str:
    steps = 0
    with open_dist_context() as ctx:
        precisions = ("bf16", "fp16", "fp32") if ctx.device.type == "cuda" else ("bf16", "fp32")
        for name in ("sgd", "adamw", "lars", "lamb", "muon"):
            for precision in precisions:
                for mixed in (False, True):
                    engine = small_engine(ctx, f"--optim.name={name}", f"--engine.precision={precision}")
                    sums = engine.step([synthetic(ctx, mixed=mixed)], 1e-3)
                    assert torch.isfinite(sums).all(), f"{name} in {precision}: {sums.tolist()}"
                    steps += 1
    return f"{steps} combinations"


@item("no host sync")
def no_host_sync() -> str:
    with open_dist_context() as ctx:
        if ctx.device.type != "cuda":
            raise Skip("there is no GPU")
        engine, batch = small_engine(ctx), synthetic(ctx)
        for _ in range(3):
            engine.step([batch], 1e-3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                engine.step([batch], 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "three warm steps"


@item("exact resume")
def exact_resume() -> str:
    with open_dist_context() as ctx, TemporaryDirectory() as folder:
        torch.backends.cudnn.benchmark = False
        if ctx.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        batches = [synthetic(ctx, seed=seed) for seed in range(10)]
        going_on = small_engine(ctx, "--optim.ema_decay=0.9")
        for batch in batches[:5]:
            going_on.step([batch], 1e-2)
        going_on.capture_state({})(Path(folder))
        resumed = small_engine(ctx, "--optim.ema_decay=0.9")
        resumed.load(Path(folder))
        for batch in batches[5:]:
            going_on.step([batch], 1e-2)
            resumed.step([batch], 1e-2)
        different = [name for name, value in states(going_on).items() if not torch.equal(value, states(resumed)[name])]
    assert not different, f"{len(different)} tensors differ, {different[0]} first"
    return f"{len(states(going_on))} tensors equal to the bit after five steps"


@item("capture")
def capture() -> str:
    with open_dist_context() as ctx, TemporaryDirectory() as folder:
        engine = small_engine(ctx)
        engine.step([synthetic(ctx)], 1e-2)
        synchronize(ctx)
        expected = {name: value.clone() for name, value in states(engine).items()}
        write = engine.capture_state({})
        for seed in range(3):
            engine.step([synthetic(ctx, seed=seed)], 1e-1)
        write(Path(folder))
        restored = small_engine(ctx)
        restored.load(Path(folder))
        different = [name for name, value in states(restored).items() if not torch.equal(value, expected[name])]
    assert not different, f"{different[0]} is not what it was when it was captured"
    return f"{len(expected)} tensors"


@item("fit memory")
def fit_memory() -> str:
    with open_dist_context() as ctx:
        if ctx.device.type != "cuda":
            raise Skip("there is no GPU whose memory could run out")
        engine = small_engine(ctx)
        free_bytes, _ = torch.cuda.mem_get_info()
        rows = (
            int(free_bytes / (SIZE_PX * SIZE_PX * 3 * 4 * 8)) or 1
        )  # far more than the activations of a network leave free
        engine.fit_memory(rows, SIZE_PX)  # type: ignore[attr-defined]
        pieces = engine.chunks_per_micro_batch  # type: ignore[attr-defined]
    return f"{rows} images of {SIZE_PX} px in {pieces} pieces"


@item("deepspeed")
def deepspeed() -> str:
    try:
        import deepspeed as _  # noqa: F401
    except ImportError as error:
        raise Skip(f"DeepSpeed cannot be imported ({error})") from None
    with open_dist_context() as ctx:
        for stage in range(3):
            engine = small_engine(
                ctx, "--engine.name=deepspeed", f"--engine.zero_stage={stage}", "--engine.precision=fp32"
            )
            sums = engine.step([synthetic(ctx)], 1e-3)
            assert torch.isfinite(sums).all(), f"stage {stage}: {sums.tolist()}"
    return "stages 0, 1, 2"


@item("step speed")
def step_speed() -> str:
    told = []
    with open_dist_context() as ctx:
        modes = ("off", "on") if ctx.device.type == "cuda" else ("off",)
        for model in ("resnet18", "resnet50"):
            for mode in modes:
                engine = small_engine(ctx, f"--model.name={model}", f"--engine.compile={mode}")
                batch = synthetic(ctx)
                for _ in range(10 if ctx.device.type == "cuda" else 1):
                    engine.step([batch], 1e-3)
                rates = []
                for _ in range(3):
                    synchronize(ctx)
                    start, steps = time.perf_counter(), 20 if ctx.device.type == "cuda" else 2
                    for _ in range(steps):
                        engine.step([batch], 1e-3)
                    synchronize(ctx)
                    rates.append(steps * BATCH / (time.perf_counter() - start))
                told.append(f"{model}{' compiled' if mode == 'on' else ''} {median(rates):.0f}")
        precision = resolve_precision("auto", ctx.device)
    return f"images/s at {SIZE_PX} px, batch {BATCH}, {precision}: {', '.join(told)}"


# ---- several processes, whole runs ----------------------------------------------------------------------------------

_REDUCE = """
import time, torch
from trainer.distributed import open_dist_context
with open_dist_context() as ctx:
    values = torch.ones({count}, device=ctx.device)
    seconds = []
    for _ in range(8):
        ctx.barrier()
        start = time.perf_counter()
        ctx.sum(values)
        ctx.barrier()
        seconds.append(time.perf_counter() - start)
    if ctx.primary:
        print("seconds", sorted(seconds)[4], ctx.device, flush=True)
"""


@item("all-reduce")
def all_reduce() -> str:
    gpus = gpu_count()
    if gpus == 1:
        raise Skip("there is one GPU")
    ranks, count = gpus or 2, 25_000_000 if gpus else 2_500_000
    with TemporaryDirectory() as folder:
        program = Path(folder) / "reduce.py"
        program.write_text(_REDUCE.format(count=count))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        ran = subprocess.run([*launcher, str(program)], capture_output=True, text=True, env=importable())
    said = next((line.split() for line in ran.stdout.splitlines() if line.startswith("seconds")), None)
    assert said, (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
    seconds = float(said[1])
    bus_gb_s = 2 * (ranks - 1) / ranks * 4 * count / seconds / 1e9
    return f"{ranks} processes, {4 * count / 1e6:.0f} MB in {1e3 * seconds:.1f} ms, {bus_gb_s:.2f} GB/s each way"


@item("kill and resume")
def kill_and_resume() -> str:
    with small_dataset(128 if not ON_GPU else 2048) as folder, TemporaryDirectory() as runs:
        # A run that is soon at its first checkpoint, and has more to do.
        run = Path(runs) / "run"
        options = {
            "data.path": folder,
            "data.size_px": 64,
            "data.batch": 16,
            "run.epochs": 3,
            "run.save_every": 3,
            "run.log_every": 1,
            "run.dir": run,
            "tracking.wandb": "off",
            "tracking.tensorboard": "false",
            "tracking.histograms_every": 0,
        }
        command = [sys.executable, "-m", "trainer", *(f"--{name}={value}" for name, value in options.items())]
        first = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=importable()
        )
        # Kill it without warning, as a lost node dies, once there is something to go on from.
        while first.poll() is None and not (run / "checkpoints/last").exists():
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        _, complaint = first.communicate()
        assert (run / "checkpoints/last").exists(), (complaint.strip().splitlines() or ["no checkpoint came"])[-1]
        # The same command must go on, and the result must be usable.
        again = subprocess.run(command, capture_output=True, text=True, env=importable())
        assert again.returncode == 0, (again.stderr.strip().splitlines() or ["it said nothing"])[-1]
        assert "resuming" in again.stdout, "it began anew"
        scored = subprocess.run(
            [sys.executable, "-m", "trainer.evaluate", str(run)], capture_output=True, text=True, env=importable()
        )
        assert scored.returncode == 0, scored.stderr.strip().splitlines()[-1]
        return "killed after a checkpoint, went on; " + scored.stdout.strip().rpartition(": ")[2]


# ---- helpers --------------------------------------------------------------------------------------------------------


@contextmanager
def small_dataset(count: int = 32, side_px: int = 96) -> Iterator[Path]:
    with TemporaryDirectory(prefix="sluice-check-") as folder:
        yield write_dataset(Path(folder), count, side_px)


def pixels(cfg: DataConfig, ctx: DistContext, *, training: bool = True) -> torch.Tensor:
    """Load [N, 3, H, W] all images of the first epoch for one rank, in their order."""
    loader = Loader(cfg, open_catalog(cfg, "train"), ctx, training=training)
    return torch.cat([batch.images.clone() for batch in loader])


def small_engine(ctx: DistContext, *options: str) -> Engine:
    torch.manual_seed(0)
    cfg: Config = load(["--run.name=check", "--engine.compile=off", *options])
    return build_engine(cfg, CLASSES, ctx)


def synthetic(ctx: DistContext, seed: int = 0, *, mixed: bool = False) -> Batch:
    """Make a batch of noise on the device; `mixed` has soft targets, as mixup gives."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (BATCH, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8, generator=draw)
    labels = torch.randint(CLASSES, (BATCH,), generator=draw)
    targets = torch.rand(BATCH, CLASSES, generator=draw).softmax(dim=1).to(ctx.device) if mixed else None
    on_device = images.to(ctx.device).to(memory_format=torch.channels_last)
    return Batch(on_device, labels.to(ctx.device), torch.arange(BATCH), BATCH, BATCH, targets)


def states(engine: Engine) -> dict[str, torch.Tensor]:
    return engine.module.state_dict()


def synchronize(ctx: DistContext) -> None:
    if ctx.device.type == "cuda":
        torch.cuda.synchronize(ctx.device)


def importable() -> dict[str, str]:
    """Make an environment in which another process finds the same packages as this one."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return ours | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), ours.get("PYTHONPATH")]))
    }
