"""Folders of snapshots in the memory of a node, and the tokens that tie them to runs (see `snapshots`)."""

import os
import platform
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from data_pipeline.common.atomic_io import replace_file, why_untrusted
from data_pipeline.common.errors import UserError, require

TOKEN, RUN = "checkpoints/.snapshots", "run.txt"


def open_base(place: str) -> Path:
    """Make the folder in `place` for all snapshots of this user. Raises `UserError`."""
    base = Path(place) / f"sluice-{os.getuid()}"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        why = why_untrusted(base)
    except OSError as error:
        raise UserError(
            f"run.snapshot_dir: cannot write to {base} ({error.strerror}); give a folder of each node's own"
        ) from None
    require(why is None, f"run.snapshot_dir: {why}; give a folder of each node's own")
    return base


def read_token(run: Path) -> Path | None:
    """Read the beginning of the names of a run's snapshot folders; None where it has none, or is a copy of one that has."""
    try:
        token, _, owner = (run / TOKEN).read_bytes().partition(b"\0")
    except FileNotFoundError:
        return None
    return Path(os.fsdecode(token)) if owner == os.fsencode(run.absolute()) else None


def new_token(run: Path, base: Path) -> Path:
    """Tie a run to snapshots in `base` that nobody has written yet. Raises `UserError`."""
    token = base / secrets.token_hex(8)
    try:
        (run / TOKEN).parent.mkdir(parents=True, exist_ok=True)
        replace_file(run / TOKEN, os.fsencode(token) + b"\0" + os.fsencode(run.absolute()))
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {run} ({error.strerror}); make room") from None
    return token


def home_of(token: Path) -> Path:
    """Folder of the snapshots on this node; other nodes have others, also where they share a machine, as in tests."""
    return token.with_name(f"{token.name}-{_node()}")


def make_home(token: Path, run: Path) -> Path:
    """Make the folder of a run's snapshots on this node. Raises `UserError`."""
    home = home_of(token)
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        (home / RUN).write_bytes(os.fsencode(run))
    except OSError as error:
        raise UserError(f"run.snapshot_dir: cannot write to {home} ({error.strerror}); make room") from None
    return home


def sweep(base: Path) -> None:
    """Remove the snapshots on this node that belong to no run any more."""
    for home in base.glob(f"*-{_node()}"):
        with suppress(OSError):
            token = read_token(Path(os.fsdecode((home / RUN).read_bytes())))
            if token is None or home_of(token) != home:
                shutil.rmtree(home, ignore_errors=True)


def forget(run: Path) -> None:
    """Remove a run's snapshots on this node, as far as possible."""
    with suppress(OSError):
        token = read_token(run)
        if token and token.parent.name == f"sluice-{os.getuid()}" and (home_of(token) / RUN).exists():
            shutil.rmtree(home_of(token), ignore_errors=True)


def _node() -> str:
    return quote(os.environ.get("SLURMD_NODENAME") or platform.node(), safe="")
