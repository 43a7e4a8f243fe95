"""Any series of the runs as small pictures: throughput, memory, health, conflicts and routing over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from moe_medical.tracking.report.charts.shared import (
    GAIN,
    columns,
    data,
    plain_numbers,
    run_colour,
    small_multiples,
    thinned,
)
from moe_medical.tracking.report.record import RunRecord

_POINTS = 900
"""Of a small picture, all runs together."""


def series(runs: Sequence[RunRecord], names: Sequence[str]) -> Any | None:
    """A small picture of each series that a run has, over its steps."""
    rows = [
        (_title(name), run.name, step, value)
        for name in names
        for run in runs
        for step, _, value in zip(
            *(c.tolist() for c in thinned(run.curve(name), min(150, _POINTS // len(runs)))), strict=True
        )
    ]
    if not rows:
        return None
    order = list(dict.fromkeys(row[0] for row in rows))
    several = len(runs) > 1
    panel = (
        alt.Chart(data(**columns("series run step value", rows)), width=210, height=92)
        .mark_line(strokeWidth=1.6, point={"size": 10} if len(rows) < 60 * len(order) else False)
        .encode(
            x=alt.X("step:Q", title=None, axis=plain_numbers(grid=False)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=plain_numbers()),
            color=run_colour([run.name for run in runs]) if several else alt.value(GAIN),
            tooltip=["series:N", "run:N", "step:Q", alt.Tooltip("value:Q", format=",.4~f")],
        )
    )
    return small_multiples(panel, "series:N", order, columns=4, gap=62)


def of_speed(run: RunRecord) -> list[str]:
    """Names of the series of throughput, memory and health."""
    names = ["tokens_per_second", "step_seconds", "grad_norm", "learning_rate"]
    return names + [f"health/{name}" for name in sorted(run.names("health"))]


def _title(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")
