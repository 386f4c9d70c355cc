"""Train ResNets, and use what was trained.

>>> from trainer import load_run
>>> run = load_run("runs/builtin")
>>> labels, probabilities = run.predict(["a.jpg", "b.png"])

The names below are imported when they are first used, so that `import trainer` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import Prediction, TrainedRun, load_run, train
    from trainer.config import Config, load

__all__ = ["Config", "Prediction", "TrainedRun", "load", "load_run", "train"]

_HOMES = {"Config": "trainer.config", "load": "trainer.config"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "trainer.api")), name)
