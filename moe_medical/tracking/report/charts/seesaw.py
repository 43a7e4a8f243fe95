"""The seesaw: gain and regress of all tasks, and which task paid in which interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from moe_medical.tracking.report.charts.shared import (
    DIVERGING,
    GAIN,
    LOSS,
    NAME_WIDTH,
    columns,
    data,
    task_axis,
)
from moe_medical.tracking.report.findings import Swings, swings
from moe_medical.tracking.report.record import Floats, RunRecord

_COLUMNS = 100
_WIDTH = 720
_CELL = 17
_PANEL_HEIGHT = 86
_VIOLET = "#8c6bd1"


@dataclass(frozen=True)
class _Intervals:
    """What the columns show: neighbouring intervals are added up where there are too many of them."""

    found: Swings
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, found: Swings) -> _Intervals:
        total = len(found.steps)
        size = math.ceil(total / _COLUMNS)
        starts = list(range(0, total, size))
        return cls(found, starts, [min(s + size, total) - 1 for s in starts])

    @property
    def steps(self) -> list[int]:
        return [self.found.steps[end] for end in self.ends]

    @property
    def width(self) -> int:
        return max(300, min(_WIDTH, 46 * len(self.ends)))

    def sums(self, values: Floats) -> Floats:
        """Added up over the last axis, what is missing left out."""
        return np.asarray(np.add.reduceat(np.nan_to_num(values), self.starts, axis=-1))

    def x(self, title: str | None = None) -> alt.X:
        shown = title is not None
        axis = alt.Axis(
            labelAngle=0, labelOverlap="parity", labels=shown, ticks=shown, domain=False, grid=False
        )
        scale = alt.Scale(type="band", domain=self.steps, paddingInner=0.06)
        return alt.X("step:O", title=title, axis=axis, scale=scale)


def seesaw(run: RunRecord) -> Any | None:
    """Index, gains and losses, and the map of tasks and intervals, one above the other."""
    if len(run.evaluations) < 2:
        return None
    intervals = _Intervals.of(swings(run))
    parts = [_index(run, intervals), _balance(run, intervals), _map(intervals)]
    return alt.vconcat(*parts, spacing=18, bounds="flush").resolve_scale(color="independent", x="independent")


def _left(**settings: Any) -> alt.Axis:
    """The same width in all parts, so that their columns stand above each other."""
    return alt.Axis(minExtent=NAME_WIDTH, maxExtent=NAME_WIDTH, titlePadding=-150, **settings)


def _index(run: RunRecord, intervals: _Intervals) -> Any:
    ends = [
        (step, run.seesaw_steps[1 + end].window)
        for step, end in zip(intervals.steps, intervals.ends, strict=True)
    ]
    rows = [("seesaw index", step, window.index) for step, window in ends]
    rows += [("paid share", step, window.paid) for step, window in ends]
    colour = alt.Scale(domain=["seesaw index", "paid share"], range=[_VIOLET, LOSS])
    legend = alt.Legend(title=f"over {run.seesaw.window} evaluations")
    y = {"scale": alt.Scale(domain=[0, 1]), "axis": _left(tickCount=3, format=".1f")}
    return (
        alt.Chart(data(**columns("name step value", rows)), width=intervals.width, height=_PANEL_HEIGHT)
        .mark_line(point={"size": 26}, strokeWidth=2)
        .encode(
            x=intervals.x(),
            y=alt.Y("value:Q", title=["seesaw", "0 to 1"], **y),
            color=alt.Color("name:N", scale=colour, legend=legend),
            tooltip=["name:N", "step:O", alt.Tooltip("value:Q", format=".3f")],
        )
    )


def _balance(run: RunRecord, intervals: _Intervals) -> Any:
    gain = intervals.sums(np.array([s.step.gain for s in run.seesaw_steps[1:]]))
    regress = intervals.sums(np.array([-s.step.regress for s in run.seesaw_steps[1:]]))
    rows = [("gain", *pair) for pair in zip(intervals.steps, gain, strict=True)]
    rows += [("regress", *pair) for pair in zip(intervals.steps, regress, strict=True)]
    colour = alt.Scale(domain=["gain", "regress"], range=[GAIN, LOSS])
    return (
        alt.Chart(data(**columns("name step value", rows)), width=intervals.width, height=_PANEL_HEIGHT)
        .mark_bar()
        .encode(
            x=intervals.x(),
            y=alt.Y(
                "value:Q",
                title=["loss won or lost", "mean of all tasks"],
                axis=_left(format="+.1%", tickCount=4),
            ),
            color=alt.Color("name:N", scale=colour, legend=alt.Legend(title="in the interval")),
            tooltip=["name:N", "step:O", alt.Tooltip("value:Q", format="+.2%")],
        )
    )


def _map(intervals: _Intervals) -> Any:
    found = intervals.found
    beyond_TE = intervals.sums(found.beyond_TE)
    source = data(
        task=[task for task in found.tasks for _ in intervals.steps],
        step=intervals.steps * len(found.tasks),
        beyond=beyond_TE.ravel(),
        change=intervals.sums(found.delta_TE).ravel(),
    )
    most = _reach(beyond_TE)
    scale = alt.Scale(domain=[-most, 0, most], range=DIVERGING, clamp=True)
    legend = alt.Legend(title=["change of the loss", "beyond noise"], format="+.1%", gradientLength=110)
    tips = [
        alt.Tooltip("change:Q", format="+.2%"),
        alt.Tooltip("beyond:Q", format="+.2%", title="beyond noise"),
    ]
    return (
        alt.Chart(source, width=intervals.width, height=alt.Step(_CELL))
        .mark_rect(cornerRadius=1)
        .encode(
            x=intervals.x("step of the evaluation at the end of the interval"),
            y=alt.Y("task:N", sort=found.tasks, title=None, axis=task_axis(minExtent=NAME_WIDTH)),
            color=alt.Color("beyond:Q", scale=scale, legend=legend),
            tooltip=["task:N", "step:O", *tips],
        )
    )


def _reach(beyond_TE: Floats) -> float:
    """End of the colour scale: nearly all that was lost, so that the first great gains do not pale it."""
    lost = -beyond_TE[beyond_TE < 0]
    sizes = np.abs(beyond_TE[beyond_TE != 0])
    if not len(sizes):
        return 0.01
    return max(0.01, float(np.quantile(lost if len(lost) else sizes, 0.95 if len(lost) else 0.8)))
