"""Any series of the runs as small pictures: throughput, memory, health, conflicts and routing over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from moe_medical.tracking.report.charts.shared import GAIN, data, headers, run_colour, thinned
from moe_medical.tracking.report.record import RunRecord

_POINTS = 150


def series(runs: Sequence[RunRecord], names: Sequence[str]) -> Any | None:
    """A small picture of each series that a run has, over its steps."""
    rows = [
        (_title(name), run.name, step, value)
        for name in names
        for run in runs
        for step, _, value in zip(*(c.tolist() for c in thinned(run.curve(name), _POINTS)), strict=True)
    ]
    if not rows:
        return None
    columns = dict(zip(("series", "run", "step", "value"), zip(*rows, strict=True), strict=True))
    order = list(dict.fromkeys(columns["series"]))
    several = len(runs) > 1
    panel = (
        alt.Chart(data(**columns), width=216, height=96)
        .mark_line(strokeWidth=1.6, point={"size": 10} if len(rows) < 60 * len(order) else False)
        .encode(
            x=alt.X("step:Q", title=None, axis=alt.Axis(format="~s", grid=False, tickCount=4)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4, format="~s")),
            color=run_colour([run.name for run in runs]) if several else alt.value(GAIN),
            tooltip=["series:N", "run:N", "step:Q", alt.Tooltip("value:Q", format=",.4~f")],
        )
    )
    facet = alt.Facet("series:N", sort=order, header=headers())
    return panel.facet(facet, columns=4, spacing=16).resolve_scale(y="independent")


def of_speed(run: RunRecord) -> list[str]:
    """Names of the series of throughput, memory and health."""
    names = ["tokens_per_second", "step_seconds", "grad_norm", "learning_rate"]
    return names + [f"health/{name}" for name in sorted(run.names("health"))]


def _title(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")
