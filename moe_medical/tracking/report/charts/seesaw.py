"""The seesaw: gain and regress of all tasks, and which task paid in which interval."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import numpy as np

from moe_medical.tracking.report.charts.shared import DIVERGING, GAIN, LOSS, NAME_WIDTH, data, task_axis
from moe_medical.tracking.report.findings import Swings, seesaw_steps, swings
from moe_medical.tracking.report.record import RunRecord

_COLUMNS, _WIDTH, _CELL = 100, 760, 17
_DASHED = [5, 3]


def seesaw(run: RunRecord) -> Any | None:
    """Index, gains and losses, and the map of tasks and intervals, one above the other."""
    if len(run.evaluations) < 2:
        return None
    found = _merged(swings(run))
    width = max(300, min(_WIDTH, 46 * len(found.steps)))
    parts = [_index(run, width), _balance(run, width), _map(found, width)]
    return alt.vconcat(*parts, spacing=16, bounds="flush").resolve_scale(color="independent", x="independent")


def _steps(title: str | None = None, labels: bool = True) -> alt.X:
    axis = alt.Axis(labelAngle=0, labelOverlap="parity", labels=labels, ticks=labels, domain=False)
    return alt.X("step:O", title=title, axis=axis, scale=alt.Scale(paddingInner=0.06))


def _index(run: RunRecord, width: int) -> Any:
    rows = [
        (name, e.step, value)
        for e, s in list(zip(run.evaluations, seesaw_steps(run), strict=True))[1:]
        for name, value in (
            ("seesaw index", s.window.index),
            ("paid share", s.window.paid),
        )
    ]
    names = ["seesaw index", "paid share"]
    columns = dict(zip(("name", "step", "value"), zip(*rows, strict=True), strict=True))
    colour = alt.Scale(domain=names, range=["#8c6bd1", LOSS])
    legend = alt.Legend(title=f"over {run.seesaw.window} evaluations")
    return (
        alt.Chart(data(**columns), width=width, height=90)
        .mark_line(point={"size": 26}, strokeWidth=2)
        .encode(
            x=_steps(labels=False),
            y=alt.Y("value:Q", title="0 to 1", scale=alt.Scale(domain=[0, 1]), axis=_left(tickCount=3)),
            color=alt.Color("name:N", scale=colour, legend=legend),
            tooltip=["name:N", "step:O", alt.Tooltip("value:Q", format=".3f")],
        )
    )


def _left(**settings: Any) -> alt.Axis:
    """The same width in all three parts, so that their columns stand above each other."""
    return alt.Axis(minExtent=NAME_WIDTH, maxExtent=NAME_WIDTH, titleAnchor="middle", **settings)


def _balance(run: RunRecord, width: int) -> Any:
    rows = [
        (name, e.step, value)
        for e, s in list(zip(run.evaluations, seesaw_steps(run), strict=True))[1:]
        for name, value in (("gain", s.step.gain), ("regress", -s.step.regress))
    ]
    columns = dict(zip(("name", "step", "value"), zip(*rows, strict=True), strict=True))
    colour = alt.Scale(domain=["gain", "regress"], range=[GAIN, LOSS])
    return (
        alt.Chart(data(**columns), width=width, height=90)
        .mark_bar()
        .encode(
            x=_steps(labels=False),
            y=alt.Y("value:Q", title="mean of all tasks", axis=_left(format="+.1%", tickCount=4)),
            color=alt.Color("name:N", scale=colour, legend=alt.Legend(title="in the interval")),
            tooltip=["name:N", "step:O", alt.Tooltip("value:Q", format="+.2%")],
        )
    )


def _map(found: Swings, width: int) -> Any:
    tasks, steps = np.meshgrid(np.arange(len(found.tasks)), np.arange(len(found.steps)), indexing="ij")
    source = data(
        task=[found.tasks[i] for i in tasks.ravel()],
        step=[found.steps[i] for i in steps.ravel()],
        beyond=found.beyond_TE.ravel(),
        change=found.delta_TE.ravel(),
        noise=found.gate_TE.ravel(),
    )
    most = _reach(found)
    scale = alt.Scale(domain=[-most, 0, most], range=DIVERGING, clamp=True)
    legend = alt.Legend(title=["change of the loss", "beyond noise"], format="+.0%", gradientLength=110)
    tips = [alt.Tooltip(f"{name}:Q", format="+.2%") for name in ("change", "beyond")]
    return (
        alt.Chart(source, width=width, height=alt.Step(_CELL))
        .mark_rect(cornerRadius=1)
        .encode(
            x=_steps("evaluation at the end of the interval, step"),
            y=alt.Y("task:N", sort=found.tasks, title=None, axis=task_axis(minExtent=NAME_WIDTH)),
            color=alt.Color("beyond:Q", scale=scale, legend=legend),
            tooltip=["task:N", "step:O", *tips, alt.Tooltip("noise:Q", format=".2%")],
        )
    )


def _reach(found: Swings) -> float:
    """End of the colour scale: nearly all of the changes, so that the first fall does not pale the rest."""
    sizes = np.abs(found.beyond_TE[np.isfinite(found.beyond_TE) & (found.beyond_TE != 0)])
    return max(0.01, float(np.quantile(sizes, 0.8))) if len(sizes) else 0.01


def _merged(found: Swings) -> Swings:
    """Neighbouring intervals added up where there are too many for columns."""
    group = math.ceil(len(found.steps) / _COLUMNS)
    if group == 1:
        return found
    starts = np.arange(0, len(found.steps), group)
    ends = np.minimum(starts + group, len(found.steps)) - 1
    beyond = np.add.reduceat(np.nan_to_num(found.beyond_TE), starts, axis=1)
    return Swings(found.tasks, [found.steps[e] for e in ends], beyond, np.zeros_like(beyond))
