"""Conflicts between tasks, and which task uses which expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from moe_medical.tracking.conflict import Conflict, SharedExperts
from moe_medical.tracking.report.charts.shared import (
    DIVERGING,
    GAIN,
    LOSS,
    NAME_WIDTH,
    SEQUENTIAL,
    columns,
    data,
    headers,
    short_layers,
    task_axis,
)
from moe_medical.tracking.report.findings import conflict_order
from moe_medical.tracking.routing_stats import RoutingStats

_SQUARE = 620
_LAYERS_SHOWN = 3
_CELL_LETTERS = 5


def conflict(look: Conflict) -> Any | None:
    """Cosines between the tasks' gradients; what noise explains is grey."""
    order = conflict_order(look)
    places = [(a, b) for a in order for b in order if a != b]
    index = {task: i for i, task in enumerate(look.tasks)}
    cosines = np.array([look.cosine_TT[index[a], index[b]] for a, b in places])
    if not np.isfinite(cosines).any():
        return None
    source = data(first=[a for a, _ in places], second=[b for _, b in places], cosine=cosines)
    most = max(4 * look.noise, -float(np.nanmin(cosines)))  # what pulls apart is the point
    scale = alt.Scale(domain=[-most, 0, most], range=DIVERGING, clamp=True)
    legend = alt.Legend(title=["cosine of", "gradients"], gradientLength=140, format=".2f")
    colour = alt.Color("cosine:Q", scale=scale, legend=legend)
    is_noise = f"abs(datum.cosine) < {look.noise:.5f}"
    step = alt.Step(int(min(26, max(13, _SQUARE / len(order)))))
    axis = task_axis(labelAngle=-50, orient="top", labelAlign="left")
    return (
        alt.Chart(source, width=step, height=step)
        .mark_rect(stroke="#80808030", strokeWidth=0.5)
        .encode(
            x=alt.X("second:N", sort=order, title=None, axis=axis),
            y=alt.Y("first:N", sort=order, title=None, axis=task_axis()),
            color=alt.condition(is_noise, alt.value("rgba(128,128,128,0.22)"), colour),
            tooltip=["first:N", "second:N", alt.Tooltip("cosine:Q", format="+.3f")],
        )
    )


def task_experts(stats: RoutingStats) -> Any | None:
    """Use of the experts by each task, in the layers that tell tasks apart most."""
    told = np.nan_to_num(stats.task_information_L)
    layers = sorted(np.argsort(-told, kind="stable")[:_LAYERS_SHOWN].tolist())
    tasks = np.flatnonzero(stats.present).tolist()
    if not len(tasks) or stats.counts_LTE.shape[-1] < 2:
        return None
    names = short_layers(stats.layers)
    experts = range(stats.counts_LTE.shape[-1])
    titles = {layer: f"layer {names[layer]}: {told[layer]:.2f}" for layer in layers}
    places = [(layer, task, expert) for layer in layers for task in tasks for expert in experts]
    source = data(
        layer=[titles[layer] for layer, _, _ in places],
        task=[stats.tasks[task] for _, task, _ in places],
        expert=[expert for _, _, expert in places],
        share=[stats.usage_LTE[place] for place in places],
    )
    width = alt.Step(int(min(30, max(8, 250 / len(experts)))))
    legend = alt.Legend(title=["share of the", "task's tokens"], format=".0%", gradientLength=110)
    cells = (
        alt.Chart(source, width=width, height=alt.Step(15))
        .mark_rect(stroke="#80808020", strokeWidth=0.5)
        .encode(
            x=alt.X(
                "expert:O", title="expert", axis=alt.Axis(labelAngle=0, labelOverlap="parity", domain=False)
            ),
            y=alt.Y("task:N", sort=_by_top_expert(stats, layers), title=None, axis=task_axis()),
            color=alt.Color("share:Q", scale=alt.Scale(range=SEQUENTIAL, domainMin=0), legend=legend),
            tooltip=["layer:N", "task:N", "expert:O", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    column = alt.Facet("layer:N", sort=[titles[layer] for layer in layers], header=headers())
    return cells.facet(column=column, spacing=18)


def _by_top_expert(stats: RoutingStats, layers: Sequence[int]) -> list[str]:
    """Tasks with the same favourite expert in the most telling of the layers stand together."""
    layer = max(layers, key=lambda i: np.nan_to_num(stats.task_information_L)[i])
    usage_TE = np.nan_to_num(stats.usage_LTE[layer])
    order = sorted(range(len(stats.tasks)), key=lambda t: (usage_TE[t].argmax(), -usage_TE[t].max()))
    return [stats.tasks[t] for t in order]


def expert_load(stats: RoutingStats) -> Any | None:
    """Share of each expert in each layer, dead ones crossed out, and what its router knows of tasks."""
    if stats.counts_LTE.shape[-1] < 2 or not stats.counts_LTE.sum():
        return None
    names = short_layers(stats.layers)
    (layers, experts) = stats.load_LE.shape
    source = data(
        layer=[name for name in names for _ in range(experts)],
        expert=list(range(experts)) * layers,
        load=stats.load_LE.ravel(),
        dead=["dead" if dead else "" for dead in stats.dead_LE.ravel()],
    )
    step = int(min(17, max(7, 640 / layers)))
    base = alt.Chart(source, width=alt.Step(30 if experts <= 16 else 14), height=alt.Step(step)).encode(
        x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0, domain=False, labelOverlap="parity")),
        y=_layer_axis(names),
        tooltip=["layer:N", "expert:O", alt.Tooltip("load:Q", format=".1%"), "dead:N"],
    )
    even = 1 / experts
    scale = alt.Scale(domain=[0, even, max(2 * even, float(stats.load_LE.max()))], range=DIVERGING)
    legend = alt.Legend(title=["share of the", "layer's tokens"], format=".0%", gradientLength=110)
    cells = base.mark_rect(stroke="#80808020", strokeWidth=0.5).encode(
        color=alt.Color("load:Q", scale=scale, legend=legend)
    )
    crosses = base.transform_filter("datum.dead == 'dead'").mark_text(
        text="×", fontSize=max(11, step), fontWeight="bold", color="white"
    )
    return alt.hconcat(cells + crosses, _information(stats, names, step), spacing=24)


def _layer_axis(names: Sequence[str], labels: bool = True) -> alt.Y:
    axis = task_axis(labels=labels, labelOverlap="parity", labelLimit=NAME_WIDTH)
    return alt.Y("layer:N", sort=list(names), title=None, axis=axis)


def _information(stats: RoutingStats, names: Sequence[str], step: int) -> Any:
    source = data(layer=names, told=stats.task_information_L, used=stats.effective_experts_L)
    return (
        alt.Chart(source, width=220, height=alt.Step(step), title="task information")
        .mark_bar(color=GAIN, opacity=0.75, height={"band": 0.7})
        .encode(
            x=alt.X("told:Q", title="0: all tasks alike, 1: one expert each", scale=alt.Scale(domain=[0, 1])),
            y=_layer_axis(names, labels=False),
            tooltip=["layer:N", alt.Tooltip("told:Q", format=".3f"), alt.Tooltip("used:Q", format=".2f")],
        )
    )


def sharing(pairs: Sequence[SharedExperts], stats: RoutingStats) -> Any | None:
    """In which layers conflicting tasks meet at which experts."""
    if not pairs:
        return None
    names = dict(zip(stats.layers, short_layers(stats.layers), strict=True))
    rows = [
        (f"{p.first} – {p.second}", names[layer], ", ".join(map(str, experts)), _brief(experts), p.cosine)
        for p in pairs
        for layer, experts in _by_layer(p).items()
    ]
    order = list(dict.fromkeys(row[0] for row in rows))
    width = int(min(28, max(6, 700 / len(names))))
    shown = [names[layer] for layer in stats.layers]
    base = alt.Chart(
        data(**columns("pair layer experts brief cosine", rows)), width=alt.Step(width), height=alt.Step(20)
    ).encode(
        x=alt.X("layer:N", scale=alt.Scale(domain=shown), title="layer", axis=task_axis(labelAngle=-60)),
        y=alt.Y("pair:N", sort=order, title=None, axis=task_axis(labelLimit=330)),
        tooltip=["pair:N", "layer:N", "experts:N", alt.Tooltip("cosine:Q", format=".2f")],
    )
    cells = base.mark_rect(color=LOSS, opacity=0.75, cornerRadius=2)
    if width < 12:
        return cells
    return cells + base.mark_text(fontSize=9, color="white").encode(text="brief:N")


def _by_layer(pair: SharedExperts) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for layer, expert in zip(pair.layers, pair.experts, strict=True):
        found.setdefault(layer, []).append(expert)
    return found


def _brief(experts: Sequence[int]) -> str:
    text = " ".join(map(str, experts))
    return text if len(text) <= _CELL_LETTERS else f"{experts[0]} …"
