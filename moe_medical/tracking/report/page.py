"""The report as HTML: what comes in which order, and every table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from moe_medical.html_page import Bar, Cell, Chart, Mark, table
from moe_medical.tracking.report.charts import losses, maps, mixture, seesaw, speed
from moe_medical.tracking.report.charts.shared import RUN_COLOURS
from moe_medical.tracking.report.findings import Standing, standings, whole_routing
from moe_medical.tracking.report.record import RunRecord
from moe_medical.tracking.report.words import comparison, shared, summary

_DECISIONS = 60
_PAIRS = 12
_NOTES = {
    "task": "the largest share of the run first",
    "share": "of all samples that the run has trained on",
    "repeats": "times that each training row was seen, on average",
    "first": "loss at the first evaluation, nats per target token on the probe rows",
    "best": "lowest loss of all evaluations",
    "last": "loss at the last evaluation; the bar is its part of the first loss",
    "regret": "(last - best) / best: how far the task has left its best",
    "first to last": "whether the change is more than noise: the gate or twice its paired standard error",
    "score": "at the last evaluation; how it is measured stands beside it",
    "95 % interval": "of the score, by bootstrap over the rows",
    "MTL gain": "against the loss of a model of its own; negative: the task would do better alone",
}


@dataclass
class Report:
    """The body of a page and its charts."""

    html: str = ""
    charts: list[Chart] = field(default_factory=list)
    sections: list[tuple[str, str]] = field(default_factory=list)

    def add(self, html: str) -> None:
        self.html += html

    def section(self, title: str, note: str = "") -> None:
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self.sections.append((anchor, title))
        self.add(f'<h2 id="part-{anchor}">{escape(title)}</h2>{_soft(note)}')

    def draw(self, name: str, chart: Any | None, summary: str, note: str = "") -> None:
        """Put a chart in, if there is something to draw."""
        if chart is not None:
            made = Chart(name, chart.to_dict(), summary)
            self.charts.append(made)
            self.add(_soft(note) + made.html)


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>' if text else ""


def make_report(runs: Sequence[RunRecord]) -> Report:
    """All of it; `runs` is not empty."""
    report = Report()
    _together(report, runs)
    prefixes = _prefixes([run.name for run in runs]) if len(runs) > 1 else [""]
    for number, (run, prefix) in enumerate(zip(runs, prefixes, strict=True)):
        _one_run(report, run, prefix, opened=number == 0)
    _health(report, runs)
    _settings(report, runs)
    links = "".join(f'<a href="#part-{anchor}">{escape(title)}</a>' for anchor, title in report.sections)
    report.html = f"{_head(runs)}<nav>{links}</nav>{report.html}"
    return report


def title(runs: Sequence[RunRecord]) -> str:
    return f"Report of {' · '.join(run.name for run in runs)}"


def _prefixes(names: Sequence[str]) -> list[str]:
    """Of the charts of each run: its name as far as it goes into a file's name, and never twice."""
    found: list[str] = []
    for number, name in enumerate(names, start=1):
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"
        found.append(f"{slug}." if f"{slug}." not in found else f"{slug}-{number}.")
    return found


# Head


def _head(runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        return f"<h1>{escape(runs[0].name)}</h1>{_facts(runs[0])}{_cards(runs[0])}"
    names = "".join(
        f'<p class="run"><span class="dot" style="background:{colour}"></span><b>{escape(run.name)}</b> '
        f'<span class="soft">{escape(_told(run))}</span></p>'
        for run, colour in zip(runs, RUN_COLOURS * len(runs), strict=False)
    )
    return f"<h1>{len(runs)} runs side by side</h1>{names}"


def _facts(run: RunRecord) -> str:
    return f'<p class="soft">{escape(_told(run))}</p>'


def _told(run: RunRecord) -> str:
    state = "ended" if run.ended else "not ended"
    steps = f"{run.last_step:,} steps" + (f" of {run.total_steps:,}" if run.total_steps else "")
    tokens = run.curve("tokens").last
    parts = [state, steps, f"{len(run.tasks)} tasks"]
    parts += [f"{compact(tokens)} tokens"] if math.isfinite(tokens) else []
    return " · ".join([*parts, f"{duration(run.seconds)} in training steps"] if run.seconds else parts)


def compact(number: float) -> str:
    """12,345,678 as 12.3 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """As days, hours, minutes or seconds, two of them."""
    for size, name, part, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // part)} {below}"
    return f"{seconds:.3g} s"


def _cards(run: RunRecord) -> str:
    cards = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in _headline(run)
    )
    return f'<div class="numbers">{cards}</div>' if cards else ""


def _headline(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Name and value of a run's most important numbers."""
    found = standings(run)
    for name, series in (("mean loss", "eval/macro_loss"), ("mean score", "eval/macro_score")):
        values = run.curve(series).values
        if len(values):
            yield f"{name}, first to last", f"{values[0]:.3f} → {values[-1]:.3f}"
    judged = [s for s in found if s.verdict]
    if judged:
        better = sum(s.verdict == "better" for s in judged)
        yield "tasks better, beyond noise", f"{better} of {len(judged)}"
        yield "tasks worse, beyond noise", f"{sum(s.verdict == 'worse' for s in judged)}"
        yield "tasks that left their best", f"{sum(s.left_best for s in found)}"
    steps = run.seesaw_steps
    if len(steps) > 1:
        end = steps[-1].window
        yield "seesaw index, last window", f"{end.index:.2f}"
        yield "paid share, last window", f"{end.paid:.0%}"
    if found and math.isfinite(steps[-1].worst_loss):
        yield f"mean loss of the worst {run.seesaw.worst:.0%}", f"{steps[-1].worst_loss:.3f}"


# All runs together


def _together(report: Report, runs: Sequence[RunRecord]) -> None:
    several = len(runs) > 1
    if several:
        _compare(report, runs)
    else:
        report.section("In short")
        report.add(_list(summary(runs[0])))
        _per_task(report, runs[0])
        _seesaw(report, runs[0], "", alone=True)
    report.section("Losses", "Dots: loss on the probe rows at an evaluation. Thin line: training loss.")
    report.draw("macro_loss", losses.macro(runs), "Mean loss and mean score of all tasks over the tokens")
    report.draw("task_losses", losses.task_losses(runs), "Training and evaluation loss of each task")
    if any(s.score == s.score for run in runs for s in standings(run)):
        report.section("Scores")
        report.draw("last_scores", losses.last_scores(runs), "Score of each task with its 95 % interval")
        report.draw("task_scores", losses.task_scores(runs), "Score of each task over the tokens")


def _health(report: Report, runs: Sequence[RunRecord]) -> None:
    chart = speed.series(runs, list(dict.fromkeys(name for run in runs for name in speed.of_speed(run))))
    if chart is not None:
        report.section("Speed, memory and health", "Means over neighbouring steps.")
        report.draw("health", chart, "Throughput, memory and other health series over the steps")


def _compare(report: Report, runs: Sequence[RunRecord]) -> None:
    report.section("Compared", f"Everything is compared with {runs[0].name}, on the same probe rows.")
    columns, rows = _setting_rows(runs)
    report.add("<h3>What differs</h3>" + table(columns, [row for row in rows if len(set(row[1:])) > 1]))
    report.add("<h3>What came of it</h3>" + _list(comparison(runs)))
    lines = [dict(_headline(run)) for run in runs]
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[name, *(line.get(name, "–") for line in lines)] for name in names]
    totals = [("tokens", [compact(run.curve("tokens").last) for run in runs])]
    totals += [("time in training steps", [duration(run.seconds) for run in runs])]
    report.add(table(["", *(run.name for run in runs)], [*rows, *([name, *row] for name, row in totals)]))
    report.draw(
        "last_losses", losses.last_losses(runs), "Last loss of each task in each run, and differences"
    )


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="findings">{items}</ul>' if items else ""


# One run


def _one_run(report: Report, run: RunRecord, prefix: str, opened: bool) -> None:
    alone = not prefix
    if not alone:
        report.section(run.name)
        report.add(f"<details{' open' if opened else ''}><summary>All about {escape(run.name)}</summary>")
        report.add(_cards(run) + _list(summary(run)))
        _per_task(report, run, heading=False)
        _seesaw(report, run, prefix, alone)
    _mixture(report, run, prefix, alone)
    _conflict(report, run, prefix, alone)
    _routing(report, run, prefix, alone)
    if not alone:
        report.add("</details>")


def _heading(report: Report, text: str, alone: bool) -> None:
    if alone:
        report.section(text)
    else:
        report.add(f"<h3>{escape(text)}</h3>")


def _per_task(report: Report, run: RunRecord, heading: bool = True) -> None:
    found = standings(run)
    if not found:
        return
    if heading:
        report.section("Tasks")
    columns, rows = _task_table(found)
    report.add(table(columns, rows, _NOTES))


def _task_table(found: Sequence[Standing]) -> tuple[list[str], list[list[Cell]]]:
    """Columns that no task has a number for are left out."""
    columns = [
        *("task", "rows", "share", "repeats", "first", "best", "last", "regret", "first to last"),
        "metric",
    ]
    columns += ["score", "95 % interval", "MTL gain"]
    most = max((s.share for s in found if math.isfinite(s.share)), default=1.0)
    rows = [_task_row(s, most) for s in found]
    empty = {i for i in range(len(columns)) if all(row[i] == "" for row in rows)}
    kept = [i for i in range(len(columns)) if i not in empty]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _task_row(s: Standing, most: float) -> list[Cell]:
    regret = Bar(f"{s.regret:.1%}", -min(1.0, 2 * s.regret) if s.left_best else 0.0)
    marks = {"better": "good", "worse": "bad"}
    return [
        s.task,
        "" if s.rows is None else s.rows,
        _bar(s.share, s.share / most, ".1%"),
        _bar(s.repeats, 0.0, ".2f"),
        _bar(s.first, 0.0, ".3f"),
        _bar(s.best, 0.0, ".3f"),
        _bar(s.last, s.last / s.first if s.first > 0 else 0.0, ".3f", "nan"),
        regret if math.isfinite(s.regret) else "",
        Mark(s.verdict, marks.get(s.verdict, "plain")) if s.verdict else "",
        s.metric,
        _bar(s.score, s.score, ".3f"),
        f"{s.low:.3f} – {s.high:.3f}" if math.isfinite(s.low) and math.isfinite(s.high) else "",
        _bar(s.mtl_gain, s.mtl_gain, "+.1%"),
    ]


def _bar(value: float, share: float, format: str, missing: str = "") -> Cell:
    if not math.isfinite(value):
        return missing and f"{value}"
    return Bar(f"{value:{format}}", share if math.isfinite(share) else 0.0)


def _seesaw(report: Report, run: RunRecord, prefix: str, alone: bool) -> None:
    chart = seesaw.seesaw(run)
    if chart is None:
        return
    _heading(report, "Seesaw", alone)
    note = (
        "Blue: a task gained in the interval, red: it paid, beyond what noise explains. Columns with both "
        "colours are the seesaw. The tasks that paid most stand above."
    )
    report.draw(
        f"{prefix}seesaw", chart, "Seesaw index, gain and regress, and who paid in which interval", note
    )


def _mixture(report: Report, run: RunRecord, prefix: str, alone: bool) -> None:
    bars = mixture.mixture(run)
    areas = mixture.over_time(run)
    if bars is None and areas is None and not run.decisions:
        return
    _heading(report, "Mixture and decisions", alone)
    report.draw(f"{prefix}mixture_over_time", areas, "Shares in force and repeats so far, with decisions")
    report.draw(f"{prefix}mixture", bars, "Share and repeats of each task")
    if run.decisions:
        rows = [
            (f"{d.step:,}", d.action, d.task or "all tasks", d.cause) for d in run.decisions[-_DECISIONS:]
        ]
        more = len(run.decisions) - len(rows)
        report.add(_soft(f"{more} earlier decisions are left out." if more else ""))
        report.add(table(("step", "decision", "task", "cause"), rows))


def _conflict(report: Report, run: RunRecord, prefix: str, alone: bool) -> None:
    if not run.conflicts:
        return
    step, look = list(run.conflicts.items())[-1]
    _heading(report, "Gradient conflicts", alone)
    note = (
        f"At step {step:,}. Red: two tasks pull the shared weights apart, blue: they pull together, grey: "
        f"no more than noise (|cosine| below {look.noise:.3f}). Tasks that pull together are neighbours."
    )
    report.draw(
        f"{prefix}conflicts", maps.conflict(look), "Cosine between the gradients of each two tasks", note
    )
    names = [f"conflict/{n}" for n in run.names("conflict")]
    report.draw(f"{prefix}conflict_series", speed.series([run], names), "Conflict over the steps")


def _routing(report: Report, run: RunRecord, prefix: str, alone: bool) -> None:
    stats = whole_routing(run)
    if stats is None:
        return
    _heading(report, "Routing", alone)
    note = (
        "The layers whose routers tell tasks apart most, with their task information. Expert numbers of two "
        "layers have nothing to do with each other."
    )
    report.draw(f"{prefix}task_experts", maps.task_experts(stats), "Use of the experts by each task", note)
    note = "Blue: more than an even share, red: less; × is an expert that is hardly used."
    report.draw(f"{prefix}expert_load", maps.expert_load(stats), "Share of each expert in each layer", note)
    pairs = shared(run)
    if pairs:
        report.add("<h3>Where tasks in conflict share experts</h3>")
        note = "The pairs in strongest conflict; the numbers are the experts that both use in that layer."
        chart = maps.sharing(pairs[:_PAIRS], stats)
        report.draw(
            f"{prefix}shared_experts", chart, "Layers in which tasks in conflict share an expert", note
        )
        words = _list([pair.sentence() for pair in pairs[:_PAIRS]])
        report.add(f"<details><summary>In words</summary>{words}</details>")
    names = [f"router/{n}" for n in run.names("router")]
    report.draw(f"{prefix}router_series", speed.series([run], names), "Routing over the steps")


# Settings


def _setting_rows(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    known = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [[key, *(run.settings.get(key, "–") for run in runs)] for key in known]
    return ["setting", *(run.name for run in runs)], rows


def _settings(report: Report, runs: Sequence[RunRecord]) -> None:
    columns, rows = _setting_rows(runs)
    report.section("Settings")
    report.add(f"<details><summary>All settings</summary>{table(columns, rows)}</details>")
