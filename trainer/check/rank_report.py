"""Read what the processes of `trainer.check.ranks` have written. Nothing heavy is imported here."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any


def shared_gpus(places: list[dict[str, Any]]) -> list[str]:
    """Say of each GPU that several ranks have, which ones."""
    having = defaultdict(list)
    for one in places:
        if one["uuid"]:
            having[one["node"], one["uuid"]].append(one["rank"])
    return [
        f"ranks {', '.join(map(str, ranks))} share {uuid} on {node}"
        for (node, uuid), ranks in having.items()
        if len(ranks) > 1
    ]


def slowest_pair(report: Mapping[str, Any]) -> str:
    """Name the slowest pair, by its nodes where it has two; empty without pairs."""
    if not report["pairs"]:
        return ""
    worst = min(report["pairs"], key=lambda pair: pair["gb_s"])
    middle = median(pair["gb_s"] for pair in report["pairs"])
    nodes = " and ".join(dict.fromkeys(worst["nodes"]))
    ranks = " and ".join(map(str, worst["ranks"]))
    return f"slowest pair: ranks {ranks} on {nodes}, {worst['gb_s']:.2f} GB/s (median {middle:.2f})"
