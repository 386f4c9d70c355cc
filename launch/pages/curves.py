"""Curves as inline SVG: no script, no picture file; colours come from the page's style sheet, by day and by night."""

import html
import math
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import numpy as np

COLOURS = (
    ("#0b62c4", "#6db1ff"),
    ("#c2410c", "#ff9d5c"),
    ("#0f7b3f", "#54d08a"),
    ("#a21caf", "#ea8bf5"),
    ("#8a6500", "#e3bd45"),
    ("#b4123b", "#ff8ba7"),
    ("#0e7490", "#4fd3e8"),
    ("#57534e", "#c9c4bd"),
)
"""Of the first, second, ... run: on white and on black. A ninth run has the first colour again, dashed."""
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 30, 38  # margins: numbers at the left, title above, axis below
_POINTS = 200
"""Most points of a curve: beyond that each stands for the mean of its stretch."""


class Curve(NamedTuple):
    """One run's line in a chart."""

    number: int
    """Of the run, from 0: decides colour and dashes."""
    name: str
    points: list[tuple[float, float]]
    """x ascending; a y that is NaN leaves a gap."""


def style() -> str:
    """CSS of the charts, for a page that shows `dark` colours where its reader prefers them."""

    def colours(night: int) -> str:
        return "".join(f"--c{number}:{pair[night]};" for number, pair in enumerate(COLOURS))

    series = "".join(f".c{number}{{color:var(--c{number})}}" for number in range(len(COLOURS)))
    return f":root{{{colours(0)}}}@media(prefers-color-scheme:dark){{:root{{{colours(1)}}}}}{series}"


def swatch(number: int) -> str:
    """A short piece of the run's line, for a legend."""
    return (
        f'<svg class="{_colour(number)}" width="28" height="10" aria-hidden="true">'
        f'<line x1="1" x2="27" y1="5" y2="5" {_stroke(number)}/></svg>'
    )


def chart(title: str, unit: str, curves: list[Curve], *, from_zero: bool) -> str:
    """The curves over epochs as an SVG element; `unit` labels the values, which begin `from_zero` or at the least.

    From zero, what is beyond three times the 95th percentile is drawn at the top, and the title says so: a first row that
    waits for everything, or a run that diverges, would else flatten all others.
    """
    curves = [curve._replace(points=thinned(curve.points)) for curve in curves]
    points = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    usual = 3 * float(np.quantile([y for _, y in points], 0.95)) if points and from_zero else 0.0
    if 0 < usual < max(y for _, y in points):
        curves = [curve._replace(points=[(x, _lower(y, usual)) for x, y in curve.points]) for curve in curves]
        points = [(x, _lower(y, usual)) for x, y in points]
        unit += "; peaks cut"
    heading = f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)} <tspan>({html.escape(unit)})</tspan></text>'
    opening = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    if not points:
        return f'{opening}{heading}<text x="{_LEFT}" y="60">no figures yet</text></svg>'

    across = _Axis((0, *(x for x, _ in points)), _LEFT, _WIDTH - _RIGHT)
    up = _Axis((*((0,) if from_zero else ()), *(y for _, y in points)), _HEIGHT - _BOTTOM, _TOP)
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in up.ticks
    ) + "".join(
        f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in across.ticks
    )
    label = f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">epoch</text>'
    return f"{opening}{heading}{grid}{label}{''.join(_line(curve, across, up) for curve in curves)}</svg>"


def _lower(value: float, limit: float) -> float:
    """The lower of both, or NaN."""
    return limit if value > limit else value


class _Axis:
    """From values to pixels, with room up to the next tick at both ends."""

    def __init__(self, values: Iterable[float], start_px: float, end_px: float) -> None:
        values = list(values)
        self.ticks = ticks(min(values), max(values))
        self._low, self._high = self.ticks[0], self.ticks[-1]
        self._start_px, self._end_px = start_px, end_px

    def __call__(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._start_px + share * (self._end_px - self._start_px)


def ticks(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`; never one alone."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    size = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5.5)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [float(f"{number * size:.12g}") for number in range(first, max(last, first + 1) + 1)]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same curve in at most 200 points: means of stretches of equal width in x, NaN where one holds a NaN."""
    if len(points) <= _POINTS:
        return points
    x, y = np.array(points).T
    stretch = np.minimum(((x - x[0]) / (x[-1] - x[0] or 1) * _POINTS).astype(int), _POINTS - 1)
    count = np.bincount(stretch)
    filled = count > 0
    means = (np.bincount(stretch, weights=values)[filled] / count[filled] for values in (x, y))
    return list(zip(*(mean.tolist() for mean in means), strict=True))


def _line(curve: Curve, across: _Axis, up: _Axis) -> str:
    """The curve in pieces, from gap to gap; a dot for each point where there are few."""
    pieces, dots = "", ""
    for finite, run in groupby(curve.points, lambda point: math.isfinite(point[1])):
        if finite:
            at = [(f"{across(x):.1f}", f"{up(y):.1f}") for x, y in run]
            pieces += f'<polyline points="{" ".join(",".join(pair) for pair in at)}" {_stroke(curve.number)}/>'
            if len(at) == 1 or len(curve.points) <= 12:
                dots += "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in at)
    return f'<g class="{_colour(curve.number)}"><title>{html.escape(curve.name)}</title>{pieces}{dots}</g>'


def _colour(number: int) -> str:
    return f"c{number % len(COLOURS)}"


def _stroke(number: int) -> str:
    dashes = _DASHES[number // len(COLOURS) % len(_DASHES)]
    return 'fill="none" stroke="currentColor" stroke-width="1.8"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
