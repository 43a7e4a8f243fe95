"""What all charts share: colours that hold on white and on dark, compact data, thinned series.

The middle of a diverging scale is transparent: it is the page, whatever its colour.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from moe_medical.tracking.report.record import Curve, Floats

GAIN = "#3b7dd8"
LOSS = "#d9542b"
GREY = "#8a939c"
RUN_COLOURS = ["#3b7dd8", "#e0822f", "#1f9e89", "#c2478d", "#8c6bd1", "#a08c1b", "#d64545", "#6b7785"]
TASK_COLOURS = [
    *("#3b7dd8", "#e0822f", "#1f9e89", "#c2478d", "#8c6bd1", "#c9a227", "#d64545", "#5aa9a0", "#9a6b4f"),
    "#8a939c",
]
DIVERGING = ["rgba(217,84,43,1)", "rgba(128,128,128,0.07)", "rgba(59,125,216,1)"]
SEQUENTIAL = ["rgba(59,125,216,0.04)", "rgba(59,125,216,1)"]
WIDTH = 1040
"""Pixels of a chart that takes the whole page."""
NAME_WIDTH = 210
"""Pixels of a task's name at most."""


def data(**columns: Sequence[Any] | Floats) -> alt.InlineData:
    """Columns of equal length as CSV, a third of the size of records; what is not finite is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(map(_plain, column) for column in columns.values()), strict=True))
    kinds = {name: _kind(column) for name, column in columns.items()}
    return alt.InlineData(values=text.getvalue(), format=alt.CsvDataFormat(type="csv", parse=kinds))


def columns(names: str, rows: Sequence[tuple[Any, ...]]) -> dict[str, Sequence[Any]]:
    """Rows as named columns for `data`; there must be a row."""
    return dict(zip(names.split(), zip(*rows, strict=True), strict=True))


def _plain(value: Any) -> str | int:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("e+0", "e").replace("e-0", "e-") if math.isfinite(value) else ""
    return int(value) if isinstance(value, int | np.integer) else "" if value is None else str(value)


def _kind(column: Sequence[Any] | Floats) -> Any:
    known = next((value for value in column if value is not None), None)
    return "number" if isinstance(known, int | float | np.number) else "string"


def thinned(curve: Curve, points: int) -> Curve:
    """At most so many means of neighbours; values that are not finite do not count."""
    if len(curve.steps) <= points:
        return curve
    parts = np.array_split(np.arange(len(curve.steps)), points)
    return Curve(*(np.array([_mean(column[part]) for part in parts]) for column in curve))


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def task_axis(**settings: Any) -> alt.Axis:
    """An axis with a task's name at each place."""
    keys: Mapping[str, Any] = {"labelLimit": NAME_WIDTH, "ticks": False, "domain": False, "grid": False}
    return alt.Axis(**{**keys, **settings})


def run_colour(names: Sequence[str], **settings: Any) -> alt.Color:
    """The colour of each run, the same in all charts; without a legend for one run."""
    scale = alt.Scale(domain=list(names), range=RUN_COLOURS[: len(names)])
    legend = alt.Legend(orient="top", labelLimit=300, symbolOpacity=1, **settings) if len(names) > 1 else None
    return alt.Color("run:N", scale=scale, legend=legend, title=None)


def small_multiples(
    panel: Any, by: str, order: Sequence[str], columns: int, title: str = "", gap: int = 50
) -> Any:
    """A grid of panels of one size, each with axes of its own, aligned by their plots."""
    facet = alt.Facet(by, sort=list(order), header=headers())
    gaps = {"row": 46, "column": gap}
    grid = panel.facet(facet, columns=columns, spacing=gaps, bounds="flush")
    grid = grid.resolve_scale(y="independent").resolve_axis(x="independent")
    return grid.properties(title=alt.TitleParams(title, dy=-14)) if title else grid


def plain_numbers(**settings: Any) -> alt.Axis:
    """0.002 and 8.2k, never 2m."""
    text = "abs(datum.value) >= 10000 ? format(datum.value, '~s') : format(datum.value, '~r')"
    return alt.Axis(**{"labelExpr": text, "tickCount": 4, "labelFlush": True, **settings})


def headers(**settings: Any) -> alt.Header:
    """Above each small multiple."""
    keys = {
        "labelLimit": 190,
        "labelFontWeight": "bold",
        "labelPadding": 4,
        "title": None,
        "labelAnchor": "start",
    }
    return alt.Header(**{**keys, **settings})


def short_layers(layers: Sequence[str]) -> list[str]:
    """Layer names without what all of them begin or end with."""
    if len(layers) < 2:
        return list(layers)
    parts = [name.split(".") for name in layers]
    before = _equal(parts)
    after = _equal([part[::-1] for part in parts])
    short = [".".join(part[before : len(part) - after]) for part in parts]
    return short if all(short) else list(layers)


def _equal(parts: Sequence[Sequence[str]]) -> int:
    """Places from the start at which all are the same."""
    return next((i for i, at in enumerate(zip(*parts, strict=False)) if len(set(at)) > 1), 0)
