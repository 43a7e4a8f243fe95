"""A check's report as tables on the console."""

from __future__ import annotations

from collections.abc import Sequence

from moe_medical.console import show, show_table
from moe_medical.data.check.measure import CheckReport, Labels, Overlap, TaskReport
from moe_medical.data.recipe import SPLITS

_SHOWN_PAIRS = 20
_SHOWN_PLACES = 10
_SHOWN_LABELS = 4
_LICENCE_CHARACTERS = 30
_LABEL_CHARACTERS = 22


def show_report(report: CheckReport) -> None:
    """Print a report. What goes beyond a screen is in the JSON."""
    show(f"mixture {report.mixture}; lengths in {report.length_unit}, prompt and target together\n")
    _show_rows(report)
    _show_labels(report.tasks)
    _show_repeats(report)
    _show_overlaps("training rows of", "evaluation rows of", report.leaks)
    _show_overlaps("training rows of", "training rows of", report.shared)
    _show_bad(report.tasks)


def _show_rows(report: CheckReport) -> None:
    columns = ["task", "kind", *SPLITS, "bad", "median", "p95", "max"]
    columns += [f"> {report.length_limit:,}"] if report.length_limit else []
    rows = [_row_cells(task, report.length_limit is not None) for task in report.tasks]
    totals = [
        f"{sum(task.splits[split].rows for task in report.tasks if split in task.splits):,}"
        for split in SPLITS
    ]
    bad = sum(part.bad for task in report.tasks for part in task.splits.values())
    footer = [f"{len(report.tasks)} tasks", "", *totals, str(bad), *[""] * (len(columns) + 2 - 6)]
    show_table([*columns, "phi", "licence"], rows, footer)


def _row_cells(task: TaskReport, limited: bool) -> list[str]:
    counts = [f"{task.splits[s].rows:,}" if s in task.splits else "-" for s in SPLITS]
    bad = str(sum(part.bad for part in task.splits.values()))
    lengths = next(iter(task.splits.values())).lengths
    cells = [f"{lengths.median:,.0f}", f"{lengths.p95:,.0f}", f"{lengths.longest:,}"]
    if limited:
        cells.append(_percent(lengths.over or 0))
    licence = _clip(task.licence or "not given", _LICENCE_CHARACTERS)
    return [task.name, task.kind, *counts, bad, *cells, "yes" if task.phi else "no", licence]


def _show_labels(tasks: Sequence[TaskReport]) -> None:
    rows = [
        (task.name, f"{of.distinct:,}", _percent(of.largest_share), f"{of.imbalance:,.1f}", _top(of, task))
        for task in tasks
        if (of := task.labels)
    ]
    if rows:
        show_table(("task", "labels", "largest", "largest / rarest", "most frequent"), rows)


def _top(labels: Labels, task: TaskReport) -> str:
    if not labels.counts:
        return "not shown: no closed set"
    rows = task.splits["train"].rows
    first = list(labels.counts.items())[:_SHOWN_LABELS]
    shown = [f"{_clip(label, _LABEL_CHARACTERS)} {_percent(n / rows)}" for label, n in first]
    rest = labels.distinct - len(shown)
    return ", ".join(shown) + (f", {rest} more" if rest else "")


def _show_repeats(report: CheckReport) -> None:
    rows = []
    for task in report.tasks:
        if part := task.splits.get("train"):
            counts = (part.repeats.exact, part.repeats.conflicting, part.repeats.near, part.leaking)
            if any(counts):
                rows.append([task.name, *(f"{n:,}" for n in (*counts, task.dropped))])
    settings = ", ".join(f"{key} {value}" for key, value in report.hygiene.items())
    show(f"repeated training rows of {len(rows)} tasks (the mixture's hygiene: {settings})\n")
    if rows:
        columns = ("task", "equal", "equal but target", "nearly equal", "in evaluation", "dropped")
        show_table(columns, rows)


def _show_overlaps(first: str, second: str, overlaps: Sequence[Overlap]) -> None:
    rows = [
        (o.first, o.second, f"{o.exact:,}", f"{o.near:,}", f"{o.rows_of_first:,}")
        for o in overlaps[:_SHOWN_PAIRS]
    ]
    if rows:
        columns = (first, second, "equal", "equal or nearly", "rows of the first")
        show_table(columns, rows)
    if len(overlaps) > len(rows):
        show(f"and {len(overlaps) - len(rows)} more pairs of tasks\n")


def _show_bad(tasks: Sequence[TaskReport]) -> None:
    bad = [place for task in tasks for place in task.bad_places]
    if bad:
        total = sum(part.bad for task in tasks for part in task.splits.values())
        show(f"{total:,} bad records; the first:")
        show("\n".join(f"  {place}" for place in bad[:_SHOWN_PLACES]) + "\n")


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
