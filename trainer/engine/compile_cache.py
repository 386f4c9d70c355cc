"""Cache of torch.compile for restarts: a folder that nobody else can write to, because its contents are run."""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_pipeline.common.atomic_io import why_untrusted
from data_pipeline.common.errors import UserError
from data_pipeline.sources.builtin import cache_root
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig

VARIABLE, THREADS = "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"
_ELF_HEADER = 64  # bytes


def keep_compiled(cfg: EngineConfig, ctx: DistContext) -> Callable[[], None]:
    """Let torch.compile work in a folder of this node, filled from the one in which restarted runs find what was made.

    To be called before anything is compiled; returns what one rank of each node does at the end, to copy what is new. The
    shared folder may lie on a network, where the locks of many ranks are slow. Collective. Raises `UserError` where somebody
    else could have put code into it.
    """
    if cfg.compile == "off" or (cfg.compile == "auto" and ctx.device.type != "cuda"):
        return lambda: None
    shared = ctx.raise_together(lambda: _cache(cfg))
    here = _node_folder() or shared
    os.environ[VARIABLE] = str(here)
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if first:
        _copy_new(shared, here)
        drop_damaged(here)
    if THREADS not in os.environ:
        os.environ[THREADS] = str(ctx.cores)  # torch starts as many processes as the node has cores, in each rank
        if config := sys.modules.get("torch._inductor.config"):
            config.compile_threads = ctx.cores  # type: ignore[attr-defined]
    ctx.barrier()
    return partial(_copy_new, here, shared) if first else lambda: None


def _node_folder() -> Path | None:
    """Return a folder on this node's disk, which all runs of this user share; None where none can be trusted, or run from."""
    folder = Path(tempfile.gettempdir()) / f"sluice-compiled-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or _untrusted(folder) or os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return None
    except OSError:
        return None
    return folder


def _copy_new(source: Path, target: Path) -> None:
    """Copy the files of `source` that `target` lacks, as far as there is room; each is there as a whole or not at all."""
    if source == target:
        return
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        part = copy.with_name(f".{copy.name}.{os.getpid()}")
        try:
            if file.is_symlink() or not file.is_file() or file.suffix == ".lock" or copy.exists():
                continue
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(file, part)
            part.replace(copy)
        except OSError:
            part.unlink(missing_ok=True)


def _cache(cfg: EngineConfig) -> Path:
    """Return the shared folder, made if it does not exist. Raises `UserError`."""
    try:
        folder = Path(cfg.compile_cache) if cfg.compile_cache else cache_root() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, UserError):
        if cfg.compile_cache:
            raise UserError(
                f"engine.compile_cache: {cfg.compile_cache} cannot be made; give a folder that you may write to"
            ) from None
        return Path(tempfile.mkdtemp(prefix="sluice-compiled-"))  # no place of its own: a folder for this run alone
    if untrusted := _untrusted(folder):
        option = "engine.compile_cache" if cfg.compile_cache else "cache"
        raise UserError(
            f"{option}: {untrusted}, and what lies there is run; take it over and chmod go-w, or give another "
            "--engine.compile_cache"
        )
    return folder


def _untrusted(folder: Path) -> str | None:
    """Say why somebody else may have put code into a folder; None where nobody can have."""
    root = 0
    if not (why := why_untrusted(folder, root)) and folder.stat().st_mode & stat.S_IWGRP:
        return f"its group may write to {folder}"
    return why


def drop_damaged(cache: Path) -> None:
    """Remove libraries that a kill or a full disk has cut short: torch would load them and fail at every start."""
    for library in cache.rglob("*.so"):
        try:
            if not _is_whole(library):
                library.unlink()
        except OSError:
            continue  # another process has removed it, or it belongs to somebody else


def _is_whole(library: Path) -> bool:
    """Return True where an ELF file reaches to the end of its table of sections, which compilers write last."""
    with library.open("rb") as file:
        header = file.read(_ELF_HEADER)
    if len(header) < _ELF_HEADER or header[:4] != b"\x7fELF":
        return False
    start, size, count = (
        int.from_bytes(header[at : at + length], "little") for at, length in ((40, 8), (58, 2), (60, 2))
    )
    return library.stat().st_size >= start + size * count
