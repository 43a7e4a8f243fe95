"""What each task got of the run: shares and repeats, at the end and over time, with the decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from moe_medical.tracking.report.charts.shared import (
    GAIN,
    GREY,
    LOSS,
    TASK_COLOURS,
    data,
    plain_numbers,
    task_axis,
)
from moe_medical.tracking.report.findings import Standing, standings
from moe_medical.tracking.report.record import Floats, RunRecord

_POINTS = 80
_OTHERS = "all others"
_ACTIONS = {"mixture": GREY, "reweight": "#c9a227", "freeze": GAIN, "stop": LOSS}


def mixture(run: RunRecord) -> Any | None:
    """Share and repeats of each task, as bars."""
    found = [s for s in standings(run) if s.share == s.share]
    if not found:
        return None
    shares = _bars(found, [s.share for s in found], "share of the samples", ".0%", named=True)
    repeats = _bars(found, [s.repeats for s in found], "times that its rows were seen", "~g", named=False)
    return alt.hconcat(shares, repeats, spacing=26)


def _bars(found: Sequence[Standing], values: Sequence[float], title: str, format: str, named: bool) -> Any:
    tasks = [s.task for s in found]
    label = ".1%" if format == ".0%" else ".2f"
    base = alt.Chart(data(task=tasks, value=values), width=340, height=alt.Step(15)).encode(
        x=alt.X("value:Q", title=title, axis=alt.Axis(format=format, tickCount=5)),
        y=alt.Y("task:N", sort=tasks, title=None, axis=task_axis(labels=named)),
        tooltip=["task:N", alt.Tooltip("value:Q", format=label, title=title)],
    )
    numbers = base.mark_text(align="left", dx=3, fontSize=10, color=GREY).encode(
        text=alt.Text("value:Q", format=label)
    )
    return base.mark_bar(color=GAIN, opacity=0.75, height={"band": 0.72}) + numbers


def over_time(run: RunRecord) -> Any | None:
    """Shares in force and repeats so far, of the tasks with most of them; lines mark decisions."""
    tasks = [task for task in run.tasks if len(run.curve(f"mix/{task}").steps) > 1]
    if not tasks:
        return None
    steps, shares_TP = _shares_in_force(run, tasks)
    top = [tasks[i] for i in np.argsort(-np.nan_to_num(shares_TP).max(1), kind="stable")]
    shown = top if len(top) <= len(TASK_COLOURS) else top[: len(TASK_COLOURS) - 1]
    by_task = dict(zip(tasks, shares_TP, strict=True))
    curves = {task: by_task[task] for task in shown}
    if len(shown) < len(tasks):
        curves[_OTHERS] = np.sum([by_task[task] for task in tasks if task not in shown], axis=0)
    return alt.hconcat(_areas(run, steps, curves), _repeats(run, steps, list(curves)), spacing=30)


def _shares_in_force(run: RunRecord, tasks: Sequence[str]) -> tuple[Floats, Floats]:
    """Share of each task in the steps up to each of some steps; the series hold those from the start."""
    steps = run.curve(f"mix/{tasks[0]}").steps
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(_POINTS, len(steps))).round().astype(int))
    at = steps[chosen]
    seen_TP = np.array([np.interp(at, *_steps_and_values(run, f"mix/{task}")) for task in tasks]) * at
    taken_TP = np.diff(seen_TP, prepend=0.0, axis=1)
    total_P = taken_TP.sum(0)
    return at, np.clip(taken_TP / np.where(total_P > 0, total_P, np.nan), 0, 1)


def _steps_and_values(run: RunRecord, name: str) -> tuple[Floats, Floats]:
    curve = run.curve(name)
    return curve.steps, curve.values


def _colour(names: Sequence[str]) -> alt.Color:
    colours = [GREY if name == _OTHERS else TASK_COLOURS[i] for i, name in enumerate(names)]
    scale = alt.Scale(domain=list(names), range=colours)
    return alt.Color("task:N", scale=scale, sort=list(names), legend=alt.Legend(title=None, labelLimit=190))


def _areas(run: RunRecord, steps: Floats, curves: dict[str, Floats]) -> Any:
    names = list(curves)
    source = data(
        task=[name for name in names for _ in steps],
        step=[step for _ in names for step in steps],
        share=np.concatenate([curves[name] for name in names]),
        place=[i for i, _ in enumerate(names) for _ in steps],
    )
    areas = (
        alt.Chart(source, width=390, height=230, title="share of the samples in force")
        .mark_area(opacity=0.8)
        .encode(
            x=alt.X("step:Q", axis=plain_numbers(grid=False, tickCount=6)),
            y=alt.Y("share:Q", stack="normalize", title=None, axis=alt.Axis(format="%")),
            color=_colour(names),
            order="place:Q",
            tooltip=["task:N", "step:Q", alt.Tooltip("share:Q", format=".2%")],
        )
    )
    return areas + _decisions(run) if run.decisions else areas


def _decisions(run: RunRecord) -> Any:
    done = run.decisions
    source = data(
        step=[d.step for d in done],
        action=[d.action for d in done],
        of=[d.task or "all tasks" for d in done],
        cause=[d.cause for d in done],
    )
    seen = [action for action in _ACTIONS if any(d.action == action for d in done)]
    scale = alt.Scale(domain=seen, range=[_ACTIONS[action] for action in seen])
    return (
        alt.Chart(source)
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.6)
        .encode(
            x="step:Q",
            stroke=alt.Stroke(
                "action:N", scale=scale, legend=alt.Legend(title="decisions", symbolType="stroke")
            ),
            tooltip=["step:Q", "action:N", "of:N", "cause:N"],
        )
    )


def _repeats(run: RunRecord, steps: Floats, names: Sequence[str]) -> Any:
    tasks = [name for name in names if name != _OTHERS]
    source = data(
        task=[name for name in tasks for _ in steps],
        step=[step for _ in tasks for step in steps],
        times=np.concatenate([np.interp(steps, *_steps_and_values(run, f"repeats/{t}")) for t in tasks]),
    )
    return (
        alt.Chart(source, width=240, height=230, title="times that a task's rows were seen")
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("step:Q", axis=plain_numbers(grid=False)),
            y=alt.Y("times:Q", title=None),
            color=_colour(names),
            tooltip=["task:N", "step:Q", alt.Tooltip("times:Q", format=".2f")],
        )
    )
