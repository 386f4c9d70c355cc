"""The folder in which Numba keeps compiled code, and whether it can be trusted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache

from data_pipeline.common.atomic_io import why_untrusted
from data_pipeline.common.launcher import warn_on_rank0


def may_cache(function: Callable[..., Any], what: str) -> bool:
    """Return True where compiled code of the file of `function` may be cached; a line says of `what` that it may not be.

    Numba runs what its cache holds, so nobody else may have written it.
    """
    try:
        folder = Path(FunctionCache(function).cache_path)
        folder.mkdir(parents=True, exist_ok=True)
        untrusted = why_untrusted(folder, Path(function.__code__.co_filename).stat().st_uid)
    except (OSError, RuntimeError) as error:  # numba finds no folder that it can write
        untrusted = str(error)
    if untrusted:
        warn_on_rank0(
            f"compiling {what} anew each time, in some three seconds: {untrusted}; mend that, or set "
            "NUMBA_CACHE_DIR to a folder of your own"
        )
    return not untrusted
