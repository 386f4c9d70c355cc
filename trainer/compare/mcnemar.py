"""McNemar's test of two models on the same images, over all images and for each class.

Only those pairs of predictions count in which one is right and the other wrong. If the models were equally good, either
would be the right one as often as a coin shows heads (McNemar 1947, Psychometrika 12:153-157).
"""

from pathlib import Path

import numpy as np
import pandas as pd

from data_pipeline.common.errors import UserError, require

PREDICTIONS = "report/predictions.csv"
"""Place in the run folder where `python -m trainer.report RUN` writes predictions."""
ALL = "all classes"


def read_predictions(run: Path) -> pd.DataFrame | None:
    """Read a run's predictions on its validation images, columns `image`, `label`, `predicted` as text.

    None where there are none. Raises `UserError` for a file of another kind.
    """
    file = run / PREDICTIONS
    if not file.exists():
        return None
    try:
        table = pd.read_csv(file, usecols=["image", "label", "predicted"], dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read ({why}); make it anew with python -m trainer.report") from None
    require(table.image.is_unique, f"{file}: an image is in it twice; make it anew with python -m trainer.report")
    return table


def per_class(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Make a row for all images that both have under the same label, then one for each class, by p.

    Columns: `class`, `images`, `first_pct` and `second_pct` right, `difference` (second less first, points), `only_first`
    and `only_second` right (images), `p` of McNemar's exact test, two-sided, and `p_holm`, adjusted over the classes; the row
    for all images is one test and has its p in both. Empty where no image is in both.
    """
    both = first.merge(second, on=["image", "label"], suffixes=("_first", "_second"))
    if both.empty:
        return pd.DataFrame()
    one, other = both.predicted_first == both.label, both.predicted_second == both.label
    right = pd.DataFrame({"class": both.label, "first": one, "second": other})
    right["only_first"], right["only_second"] = one & ~other, other & ~one
    classes = _counted(right.groupby("class", sort=True))
    classes["p_holm"] = holm(classes.p.to_numpy())
    whole = _counted(right.assign(**{"class": ALL}).groupby("class"))
    whole["p_holm"] = whole.p
    return pd.concat([whole, classes.sort_values("p", kind="stable")], ignore_index=True)


def _counted(groups: "pd.api.typing.DataFrameGroupBy") -> pd.DataFrame:
    sums, images = groups.sum(), groups.size()
    shares = 100 * sums.div(images, axis=0)
    table = pd.DataFrame(
        {
            "images": images,
            "first_pct": shares["first"],
            "second_pct": shares["second"],
            "difference": shares["second"] - shares["first"],
            "only_first": sums.only_first,
            "only_second": sums.only_second,
        }
    )
    table["p"] = [
        mcnemar(*counts) for counts in zip(table.only_first.tolist(), table.only_second.tolist(), strict=True)
    ]
    return table.reset_index()


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute the two-sided p of the exact test: the smaller count or less, doubled, among fair coins."""
    coins = only_first + only_second
    ways = below = 1  # of no heads, and of up to as many heads; whole numbers, so nothing is rounded
    for heads in range(min(only_first, only_second)):
        ways = ways * (coins - heads) // (heads + 1)
        below += ways
    return min(1.0, 2 * below / 2**coins)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p [N] of N tests so that the chance of any false one stays the same (Holm 1979, Scand. J. Stat. 6:65-70)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order, kind="stable")]
