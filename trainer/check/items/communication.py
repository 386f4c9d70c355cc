"""Items about several processes: which devices they have, and how fast they sum. Without DALI."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer.check.items import common
from trainer.check.items.common import run_module
from trainer.check.rank_report import shared_gpus, slowest_pair
from trainer.check.results import Found, Skip
from trainer.distributed import gpu_count


def ranks_and_devices() -> Found:
    ranks = gpu_count() or 2
    places = report(ranks, values=1)["places"]
    assert [one["rank"] for one in places] == list(range(ranks)), f"ranks are {[one['rank'] for one in places]}"
    shared = shared_gpus(places)
    assert not shared, "; ".join(shared)
    told = (f"{one['rank']}: {one['uuid'] or one['device']} with {one['cores']} cores" for one in places)
    return Found(f"{ranks} ranks on {places[0]['node']}, {places[0]['device']}; {', '.join(told)}")


def all_reduce() -> Found:
    gpus = gpu_count()
    if gpus == 1:
        raise Skip("there is one GPU")
    found = report(gpus or 2, common.SCALE.values)
    together = found["together_gb_s"]
    told = f"{len(found['places'])} ranks, {found['megabytes']:.0f} MB: {together:.2f} GB/s; {slowest_pair(found)}"
    return Found(told, {"all-reduce, GB/s": together})


def report(ranks: int, values: int) -> dict[str, Any]:
    """Run `trainer.check.ranks` in so many processes of this machine."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "ranks.json"
        run_module("trainer.check.ranks", str(file), str(values), ranks=ranks)
        found: dict[str, Any] = json.loads(file.read_text())
        return found
