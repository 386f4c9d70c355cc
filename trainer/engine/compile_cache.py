"""Cache of torch.compile for restarts: a folder that nobody else can write to, because its contents are run."""

import os
import stat
import tempfile
from pathlib import Path

from data_pipeline.common.atomic_io import why_untrusted
from data_pipeline.common.errors import UserError
from data_pipeline.sources.builtin import cache_root
from trainer.distributed import DistContext
from trainer.engine.config import EngineConfig

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_ELF_HEADER = 64  # bytes


def keep_compiled(cfg: EngineConfig, ctx: DistContext) -> None:
    """Keep what torch.compile makes where a restarted run finds it. To be called before anything is compiled. Collective.

    Raises `UserError` where somebody else could have put code there.
    """
    if cfg.compile == "off" or (cfg.compile == "auto" and ctx.device.type != "cuda"):
        return
    os.environ[VARIABLE] = str(ctx.raise_together(lambda: _cache(cfg)))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one process a node: the cache may lie on a disk of its own
        drop_damaged(Path(os.environ[VARIABLE]))
    ctx.barrier()


def _cache(cfg: EngineConfig) -> Path:
    """Return the folder, made if it does not exist. Raises `UserError`."""
    try:
        folder = Path(cfg.compile_cache) if cfg.compile_cache else cache_root() / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, UserError):
        if cfg.compile_cache:
            raise UserError(
                f"engine.compile_cache: {cfg.compile_cache} cannot be made; give a folder that you may write to"
            ) from None
        return Path(tempfile.mkdtemp(prefix="sluice-compiled-"))  # no place of its own: a folder for this run alone
    root = 0
    untrusted = why_untrusted(folder, root)
    if not untrusted and folder.stat().st_mode & stat.S_IWGRP:
        untrusted = f"its group may write to {folder}"
    if untrusted:
        option = "engine.compile_cache" if cfg.compile_cache else "cache"
        raise UserError(
            f"{option}: {untrusted}, and what lies there is run; take it over and chmod go-w, or give another "
            "--engine.compile_cache"
        )
    return folder


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
