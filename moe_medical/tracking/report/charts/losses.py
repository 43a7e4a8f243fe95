"""Losses and scores: of all tasks together, of each task over the run, and at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from moe_medical.tracking.report.charts.shared import (
    GAIN,
    GREY,
    WIDTH,
    columns,
    data,
    run_colour,
    small_multiples,
    task_axis,
    thinned,
)
from moe_medical.tracking.report.findings import Change, standings, versus
from moe_medical.tracking.report.record import RunRecord

_POINTS = 9_000
"""Of all training curves of a report together."""
_COLUMNS = 5
_PANEL = (158, 84)
_TOKENS = alt.Axis(labelExpr="datum.value == 0 ? '0' : datum.label", format="~s", tickCount=4, grid=False)


def macro(runs: Sequence[RunRecord]) -> Any | None:
    """Mean evaluation loss, and score, of all tasks over the tokens."""
    parts = [_macro(runs, "eval/macro_loss", "mean loss, nats per token")]
    parts.append(_macro(runs, "eval/macro_score", "mean score"))
    drawn = [part for part in parts if part is not None]
    return alt.hconcat(*drawn, spacing=40) if drawn else None


def _macro(runs: Sequence[RunRecord], series: str, title: str) -> Any | None:
    rows = [
        (run.name, step, tokens, value)
        for run in runs
        for step, tokens, value in zip(*(c.tolist() for c in run.curve(series)), strict=True)
    ]
    if not rows:
        return None
    names = [run.name for run in runs]
    source = data(**columns("run step tokens value", rows))
    return (
        alt.Chart(source, width=WIDTH // 2 - 75, height=230)
        .mark_line(point={"size": 28}, strokeWidth=2)
        .encode(
            x=alt.X("tokens:Q", title="tokens", axis=_TOKENS),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=run_colour(names),
            tooltip=["run:N", "step:Q", "tokens:Q", alt.Tooltip("value:Q", format=".4f")],
        )
    )


def task_losses(runs: Sequence[RunRecord]) -> Any | None:
    """A small picture of each task: training loss, and loss on the probe rows."""
    rows = [*_evaluated(runs), *_trained(runs)]
    if not rows:
        return None
    source = data(**columns("task run kind tokens loss", rows))
    return _small(runs, source, _loss_layers(runs), "loss of each task, nats per token")


def _evaluated(runs: Sequence[RunRecord]) -> Iterator[tuple[Any, ...]]:
    for run in runs:
        for evaluation in run.evaluations:
            tokens = run.tokens_at(evaluation.step)
            for task, point in evaluation.tasks.items():
                yield task, run.name, "probe rows", tokens, point.loss


def _trained(runs: Sequence[RunRecord]) -> Iterator[tuple[Any, ...]]:
    curves = [(run, task) for run in runs for task in run.tasks if task in run.names("train_loss")]
    points = min(150, max(15, _POINTS // max(len(curves), 1)))
    for run, task in curves:
        curve = thinned(run.curve(f"train_loss/{task}"), points)
        for tokens, loss in zip(curve.tokens.tolist(), curve.values.tolist(), strict=True):
            yield task, run.name, "training", tokens, loss


def _loss_layers(runs: Sequence[RunRecord]) -> list[Any]:
    base = alt.Chart().encode(
        x=alt.X("tokens:Q", title=None, axis=_TOKENS),
        y=alt.Y(
            "loss:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4, labelFlush=True)
        ),
        tooltip=["task:N", "run:N", "kind:N", "tokens:Q", alt.Tooltip("loss:Q", format=".4f")],
    )
    colour = run_colour([run.name for run in runs]) if len(runs) > 1 else alt.value(GAIN)
    thin = colour if len(runs) > 1 else alt.value(GREY)
    training = base.transform_filter("datum.kind == 'training'").mark_line(strokeWidth=1, opacity=0.45)
    probes = base.transform_filter("datum.kind == 'probe rows'").mark_line(
        strokeWidth=1.8, point={"size": 14, "opacity": 1}
    )
    return [training.encode(color=thin), probes.encode(color=colour)]


def _small(runs: Sequence[RunRecord], source: Any, layers: Sequence[Any], title: str) -> Any:
    order = list(dict.fromkeys(task for run in runs for task in run.tasks))
    panel = alt.layer(*layers, data=source).properties(width=_PANEL[0], height=_PANEL[1])
    return small_multiples(panel, "task:N", order, _COLUMNS, f"{title}, over tokens")


def task_scores(runs: Sequence[RunRecord]) -> Any | None:
    """A small picture of each task: its score with the 95 % interval."""
    rows = [
        (task, run.name, p.metric, run.tokens_at(e.step), p.score, p.low, p.high)
        for run in runs
        for e in run.evaluations
        for task, p in e.tasks.items()
        if p.score is not None
    ]
    if not rows:
        return None
    source = data(**columns("task run metric tokens score low high", rows))
    base = alt.Chart().encode(
        x=alt.X("tokens:Q", title=None, axis=_TOKENS),
        color=run_colour([run.name for run in runs]) if len(runs) > 1 else alt.value(GAIN),
        tooltip=["task:N", "run:N", "metric:N", "tokens:Q", *_score_tips()],
    )
    y = {"scale": alt.Scale(zero=False), "axis": alt.Axis(tickCount=4, labelFlush=True)}
    band = base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q", title=None, **y), y2="high:Q")
    line = base.mark_line(strokeWidth=1.8, point={"size": 14}).encode(y=alt.Y("score:Q", title=None, **y))
    layers = [band, line] if _has_intervals(rows) else [line]
    return _small(runs, source, layers, "score of each task, with its 95 % interval where there is one")


def _has_intervals(rows: Sequence[tuple[Any, ...]]) -> bool:
    return any(end is not None and math.isfinite(end) for row in rows for end in row[-2:])


def _score_tips() -> list[Any]:
    return [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("score", "low", "high")]


def last_scores(runs: Sequence[RunRecord]) -> Any | None:
    """Score of each task at the first and the last evaluation, with the last one's interval."""
    rows = [
        (s.task, run.name, s.metric, s.score_before, s.score, s.low, s.high)
        for run in runs
        for s in standings(run)
        if s.score == s.score
    ]
    if not rows:
        return None
    source = data(**columns("task run metric before score low high", rows))
    names = [run.name for run in runs]
    order = list(dict.fromkeys(row[0] for row in rows))
    offset = {"yOffset": alt.YOffset("run:N", sort=names)} if len(runs) > 1 else {}
    base = alt.Chart(source, width=WIDTH - 330, height=_height(order, len(runs))).encode(
        y=alt.Y("task:N", sort=order, title=None, axis=task_axis(grid=True)),
        color=run_colour(names) if len(runs) > 1 else alt.value(GAIN),
        tooltip=["task:N", "run:N", "metric:N", "before:Q", *_score_tips()],
        **offset,
    )
    scale = alt.Scale(domain=[0, 1]) if max(row[4] for row in rows) <= 1 else alt.Scale(zero=True)
    x = {"scale": scale, "title": "score at the last evaluation; ring: at the first"}
    interval = base.mark_rule(strokeWidth=3, opacity=0.35).encode(x=alt.X("low:Q", **x), x2="high:Q")
    dot = base.mark_circle(size=52, opacity=1).encode(x=alt.X("score:Q", **x))
    ring = base.mark_point(size=36, strokeWidth=1.2, opacity=0.8).encode(x=alt.X("before:Q", **x))
    return interval + ring + dot if _has_intervals(rows) else ring + dot


def _height(order: Sequence[str], runs: int) -> int:
    """Pixels of a list of tasks with a line for each run."""
    return len(order) * max(18, 9 * runs)


def last_losses(runs: Sequence[RunRecord]) -> Any | None:
    """Last loss of each task in each run, and the difference to the first run with what noise may do."""
    found = {run.name: {s.task: s.last for s in standings(run)} for run in runs}
    order = [task for task in runs[0].tasks if task in found[runs[0].name]]
    if len(runs) < 2 or not order:
        return None
    losses = [(task, name, loss) for name, by in found.items() for task, loss in by.items() if task in order]
    differences = [
        (task, run.name, *_percent(change))
        for run in runs[1:]
        for task, change in versus(runs[0], run).items()
        if change.verdict
    ]
    names = [run.name for run in runs]
    left = _loss_dots(losses, names, order)
    return alt.hconcat(left, _difference_dots(differences, names, order), spacing=24) if differences else left


def _percent(change: Change) -> tuple[float, float, float, str]:
    better = 100 * change.delta
    return better, better - 100 * change.gate, better + 100 * change.gate, change.verdict


def _loss_dots(rows: Sequence[tuple[Any, ...]], names: Sequence[str], order: Sequence[str]) -> Any:
    source = data(**columns("task run loss", rows))
    return (
        alt.Chart(source, width=330, height=_height(order, len(names) - 1), title="last loss")
        .mark_point(size=48, strokeWidth=1.8, opacity=0.9)
        .encode(
            x=alt.X("loss:Q", title="nats per token", scale=alt.Scale(zero=True)),
            y=alt.Y("task:N", sort=list(order), title=None, axis=task_axis(grid=True)),
            color=run_colour(names),
            tooltip=["task:N", "run:N", alt.Tooltip("loss:Q", format=".4f")],
        )
    )


def _difference_dots(rows: Sequence[tuple[Any, ...]], names: Sequence[str], order: Sequence[str]) -> Any:
    source = data(**columns("task run better low high verdict", rows))
    base = alt.Chart(source, width=330, height=_height(order, len(names) - 1)).encode(
        y=alt.Y("task:N", sort=list(order), title=None, axis=task_axis(labels=False, grid=True)),
        yOffset=alt.YOffset("run:N", sort=list(names[1:])),
        color=run_colour(names),
        opacity=alt.condition("datum.verdict == 'within noise'", alt.value(0.3), alt.value(1)),
        tooltip=["task:N", "run:N", alt.Tooltip("better:Q", format="+.2f", title="% better"), "verdict:N"],
    )
    x = {"title": f"% lower loss than {names[0]}; bar: what noise alone may do"}
    zero = alt.Chart(data(at=[0.0])).mark_rule(color=GREY).encode(x="at:Q")
    bars = base.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q", **x), x2="high:Q")
    dots = base.mark_circle(size=52).encode(x=alt.X("better:Q", **x))
    title = f"difference to {names[0]}: right is better"
    return alt.layer(zero, bars, dots, title=title).properties(width=330)
