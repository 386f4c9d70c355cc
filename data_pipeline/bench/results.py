"""Results of the benchmark of loaders: a table, a plot, and the files."""

import io
from pathlib import Path

import pandas as pd

from data_pipeline.bench.peers import OURS
from data_pipeline.bench.runner import Turn
from data_pipeline.common.atomic_io import replace_file

Row = tuple[object, ...]
"""size_px, loader, round and the fields of `Turn`."""


def turns_of(rows: list[Row]) -> pd.DataFrame:
    """Make a table of the rows, with images_per_s and cpu_ms for each image."""
    turns = pd.DataFrame(rows, columns=["size_px", "loader", "round", *Turn._fields])
    turns["images_per_s"] = turns.images / turns.wall_s
    turns["cpu_ms"] = 1e3 * turns.cpu_s / turns.images
    return turns


def summary(turns: pd.DataFrame) -> pd.DataFrame:
    """Make a row for each size and loader: medians and ranges, and its CPU time over the first one's, round by round."""
    ours = turns[turns.loader == turns.loader.iloc[0]].set_index(["size_px", "round"]).cpu_ms.rename("ours")
    turns = turns.join(ours, on=["size_px", "round"])
    turns["ratio"] = turns.cpu_ms / turns.ours
    groups = turns.groupby(["size_px", "loader"], sort=False)
    return pd.DataFrame(
        {
            f"{column}_{name}": groups[column].agg(how)
            for column in ("images_per_s", "cpu_ms", "ratio")
            for name, how in (("median", "median"), ("min", "min"), ("max", "max"))
        }
    ).reset_index()


def table(summed: pd.DataFrame) -> str:
    """Format the summary for people."""

    def cells(column: str, digits: int) -> list[str]:
        values = zip(*(summed[f"{column}_{name}"] for name in ("median", "min", "max")), strict=True)
        return [f"{middle:.{digits}f}  ({low:.{digits}f} to {high:.{digits}f})" for middle, low, high in values]

    return pd.DataFrame(
        {
            "size": summed.size_px,
            "loader": summed.loader,
            "images/s": cells("images_per_s", 0),
            "CPU ms/image": cells("cpu_ms", 3),
            f"CPU over {'ours' if summed.loader[0] == OURS else summed.loader[0]}": cells("ratio", 2),
        }
    ).to_string(index=False)


def plot(summed: pd.DataFrame) -> bytes:
    """Plot the summary as a PNG: bars for each size, whiskers from the least to the most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    sizes = summed.size_px.unique()
    loaders = summed.loader.unique()
    for axes, column, label in zip(
        figure.subplots(1, 2), ("images_per_s", "cpu_ms"), ("images/s", "CPU ms per image"), strict=True
    ):
        for number, loader in enumerate(loaders):
            rows = summed[summed.loader == loader]
            middle = rows[f"{column}_median"]
            whiskers = [middle - rows[f"{column}_min"], rows[f"{column}_max"] - middle]
            places = [list(sizes).index(size) + 0.85 * ((number + 0.5) / len(loaders) - 0.5) for size in rows.size_px]
            axes.bar(places, middle, 0.8 / len(loaders), yerr=whiskers, label=loader, error_kw={"elinewidth": 0.8})
        axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
        axes.set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def write(turns: pd.DataFrame, out: Path) -> None:
    """Write bench.csv, one line for each turn, and bench.png."""
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "bench.csv", turns.to_csv(index=False).encode())
    replace_file(out / "bench.png", plot(summary(turns)))
