"""Data sets that `huggingface_hub` has downloaded: datasets--OWNER--NAME/snapshots/REVISION/, links to files in blobs/."""

import os
from pathlib import Path

from data_pipeline.common.errors import UserError, require
from data_pipeline.sources.folder_walk import look_into


def is_repository(root: Path) -> bool:
    """Return True for the folder of one repository in the hub's cache."""
    return os.path.isdir(root / "snapshots") and os.path.isdir(
        root / "blobs"
    )  # what cannot be listed is told elsewhere


def reference(root: Path) -> Path:
    """File that names the revision of the branch `main`."""
    return root / "refs" / "main"


def snapshot(root: Path) -> Path:
    """Find the snapshot of a repository that is meant: that of the branch `main`, or the only one. Raises `UserError`."""
    there = look_into(root / "snapshots").folders
    try:
        main = reference(root).read_text().strip()
    except FileNotFoundError:
        main = ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: cannot read {reference(root)} ({error}); download the data set again") from None
    chosen = [main] if main in there else there
    require(
        len(there) > 0,
        f"data.path: {root} has no snapshot; download the data set, as by hf download --repo-type dataset OWNER/NAME",
    )
    require(
        len(chosen) == 1,
        f"data.path: {root} has several snapshots ({', '.join(there[:3])}), and none of them is that of the branch main; give "
        f"one of their folders, as {root / 'snapshots' / there[0]}",
    )
    return root / "snapshots" / chosen[0]
