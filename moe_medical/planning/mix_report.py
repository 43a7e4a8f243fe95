"""What every mixing rule would make of a run's tasks, side by side: tables, and a chart in one HTML file.

All rules run under the run's own settings: weights, floor, ceiling, caps, samples or tokens. The figures are
the rules' shares, which the run's order meets to the sample; a warm-up or a dynamic rule is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_medical.config.schema import MixSection, StaticRule
from moe_medical.console import show, show_table
from moe_medical.data.static_mixing import (
    MIX_RULES,
    Floats,
    TaskSize,
    task_weights,
    unit_shares,
    units_per_sample,
)

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True)
class RuleShares:
    """One rule's shares of a run; arrays over the tasks."""

    rule: StaticRule
    settings: str
    shares: Floats
    """Of the samples; they sum to 1."""
    repeats: Floats
    """Epochs of each task."""
    free_repeats: Floats
    """What they would be without caps."""
    chosen: bool

    @property
    def title(self) -> str:
        """The rule with its settings."""
        return f"{self.rule} {self.settings}".strip()

    @property
    def effective_tasks(self) -> float:
        """exp of the entropy of the shares: as many equal tasks would be as even."""
        p = self.shares[self.shares > 0]
        return float(np.exp(-(p * np.log(p)).sum()))


@dataclass(frozen=True)
class MixReport:
    """All rules for one run, the tasks from the largest to the smallest."""

    tasks: list[TaskSize]
    rules: list[RuleShares]
    num_samples: int
    global_batch: int
    max_repeats: float | None
    """The mixture's; a task may have its own."""

    @property
    def chosen(self) -> RuleShares:
        return next(rule for rule in self.rules if rule.chosen)

    @property
    def ends(self) -> tuple[int, int]:
        """The largest and the smallest task that take part, as indices."""
        part = [i for i, task in enumerate(self.tasks) if task.weight > 0]
        return part[0], part[-1]


def compare_rules(
    mix: MixSection, sizes: Sequence[TaskSize], num_samples: int, global_batch: int
) -> MixReport:
    """Every rule that the settings allow: `explicit` only where the run file has shares."""
    tasks = sorted(sizes, key=lambda size: -size.rows)
    rules = [rule for rule in MIX_RULES if rule != "explicit" or mix.shares]
    found = [_rule_shares(replace(mix, rule=rule), tasks, num_samples, rule == mix.rule) for rule in rules]
    return MixReport(tasks, found, num_samples, global_batch, mix.max_repeats)


def _rule_shares(mix: MixSection, tasks: Sequence[TaskSize], num_samples: int, chosen: bool) -> RuleShares:
    shares = task_weights(mix, tasks, num_samples)
    free = unit_shares(mix, tasks, num_samples) / units_per_sample(mix, tasks)
    epochs = num_samples / np.array([task.rows for task in tasks])
    return RuleShares(mix.rule, _settings(mix), shares, shares * epochs, free / free.sum() * epochs, chosen)


def _settings(mix: MixSection) -> str:
    known: Mapping[str, str] = {
        "temperature": f"T={mix.temperature:g}",
        "cap": f"K={mix.cap}, T={mix.temperature:g}",
        "effective_number": f"beta={mix.beta:g}",
        "unimax": f"N={mix.epochs:g}",
    }
    return known.get(mix.rule, "")


# Tables


def show_comparison(report: MixReport) -> None:
    """Print share and repeats of each task, and a summary, per rule."""
    columns = [f"{r.rule}*" if r.chosen else r.rule for r in report.rules]
    show("all rules, * is the run's; % of the samples")
    _show_by_task(report, columns, [[f"{100 * s:.2f}" for s in r.shares] for r in report.rules])
    show("epochs of each task")
    _show_by_task(report, columns, [[f"{e:.2f}" for e in r.repeats] for r in report.rules])
    _show_summary(report)


def _show_by_task(report: MixReport, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    rows = [
        (task.name, f"{task.rows:,}", *(f" {of[i]}" for of in cells)) for i, task in enumerate(report.tasks)
    ]
    show_table(("task", "rows", *(f" {c}" for c in columns)), rows)


def _show_summary(report: MixReport) -> None:
    head, tail = report.ends
    rows = [
        (
            f"{r.title}{' *' if r.chosen else ''}",
            f" {r.shares[head]:.3f}",
            f" {r.shares[tail]:.4f}",
            f" {r.repeats[tail]:.1f}",
            f" {r.free_repeats[tail]:.1f}",
            f" {r.effective_tasks:.1f}",
            f" {(1 - r.shares[tail]) ** report.global_batch:.2f}",
        )
        for r in report.rules
    ]
    names = report.tasks[head].name, report.tasks[tail].name
    show(f"head is {names[0]}, tail is {names[1]}, a batch has {report.global_batch} samples")
    columns = ("head share", "tail share", "tail epochs", "uncapped", "effective tasks", "tail not in batch")
    show_table(("rule", *(f" {c}" for c in columns)), rows)


# Chart

_PANEL_WIDTH = 118
_BAR_HEIGHT = 13
_LINEAR_RATIO = 30
"""Longest bar / shortest bar up to which a linear axis shows both."""
_CHOSEN = "#d1495b"
_OTHER = "#4f7cac"


def write_chart(report: MixReport, path: Path) -> None:
    """Bars of share and repeats per task and rule, as one HTML file that loads nothing from elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mix_chart(report).save(str(path), format="html", inline=True)


def mix_chart(report: MixReport) -> alt.VConcatChart:
    """The chart that `write_chart` writes."""
    import altair as alt  # takes a second

    title = f"{len(report.tasks)} tasks, {report.num_samples:,} samples: {report.chosen.title}"
    shares = _panels(report, "share", "share of the samples in %")
    capped = "" if report.max_repeats is None else "; dashed: the mixture's max_repeats"
    repeats = _panels(report, "repeats", f"epochs of each task{capped}")
    subtitle = "Every rule under the run's own weights, floor, ceiling and caps. The run's rule is red."
    heading = alt.TitleParams(title, subtitle=subtitle, anchor="start", fontSize=16, offset=14)
    return alt.vconcat(shares, repeats, spacing=24, title=heading)


def _panels(report: MixReport, field: str, title: str) -> alt.HConcatChart:
    import altair as alt

    values = [100 * r.shares if field == "share" else r.repeats for r in report.rules]
    scale = _scale(np.concatenate([v[v > 0] for v in values]))
    panels = [_panel(report, i, v, field, scale) for i, v in enumerate(values)]
    title += ", log axis" if scale.kind == "log" else ""
    return alt.hconcat(*panels, spacing=6, title=alt.TitleParams(title, anchor="start", fontSize=13))


@dataclass(frozen=True)
class _Scale:
    """The horizontal axis of a row of panels."""

    kind: str
    low: float
    high: float
    ticks: list[float] | None
    """None leaves them to the library."""


def _scale(values: Floats) -> _Scale:
    """Linear from 0, or from a power of ten below all bars where lengths would differ too much to be seen."""
    least = float(values.min())
    high = float(values.max() * 1.1)
    if values.max() / least <= _LINEAR_RATIO:
        return _Scale("linear", 0.0, high, None)
    low = 10.0 ** math.floor(math.log10(least) - 0.1)
    powers = [10.0**e for e in range(-12, 12)]
    return _Scale("log", low, high, [p for p in powers if low <= p <= high])


def _panel(report: MixReport, number: int, values: Floats, field: str, scale: _Scale) -> alt.LayerChart:
    import altair as alt

    rule = report.rules[number]
    color = _CHOSEN if rule.chosen else _OTHER
    layers = [_bars(report, rule, values, field, scale, color, named=number == 0)]
    cap = report.max_repeats
    if field == "repeats" and cap is not None and scale.low <= cap <= scale.high:
        line = alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[4, 3], color="#444")
        layers.append(line.encode(x=alt.datum(cap)))
    heading = alt.TitleParams([rule.rule, rule.settings or " "], fontSize=11, color=color)
    size = {"width": _PANEL_WIDTH, "height": _BAR_HEIGHT * len(report.tasks)}
    return alt.layer(*layers, title=heading).properties(**size)


def _bars(
    report: MixReport, rule: RuleShares, values: Floats, field: str, scale: _Scale, color: str, named: bool
) -> alt.Chart:
    import altair as alt

    ticks = {} if scale.ticks is None else {"values": scale.ticks}
    below = alt.Axis(format="~g", labelFontSize=10, tickCount=4, **ticks)
    beside = alt.Axis(labels=named, ticks=False, labelLimit=200, labelFontSize=11)
    x_scale = alt.Scale(type=scale.kind, domain=[scale.low, scale.high], nice=False)
    x = alt.X(f"{field}:Q", title=None, scale=x_scale, axis=below)
    y = alt.Y("task:N", sort=[task.name for task in report.tasks], title=None, axis=beside)
    rows = [_bar(task, rule, value, field) for task, value in zip(report.tasks, values, strict=True)]
    tips = ["task:N", "rule:N", "rows:Q", f"{field}:Q"]
    bars = alt.Chart(alt.Data(values=rows)).mark_bar(color=color, clip=True)
    return bars.encode(y=y, x=x, x2=alt.datum(scale.low), tooltip=tips)


def _bar(task: TaskSize, rule: RuleShares, value: float, field: str) -> dict[str, Any]:
    shown = float(f"{value:.4g}") if value > 0 else None  # a log axis has no 0
    return {"task": task.name, "rule": rule.title, "rows": task.rows, field: shown}
