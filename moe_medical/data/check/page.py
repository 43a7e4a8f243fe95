"""A check's report as one HTML file that needs nothing else: charts (Vega-Lite, embedded) and tables.

The charts hold names and counts only. Whatever else comes from a file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe_medical.data.check.measure import LENGTH_EDGES, CheckReport, Overlap, TaskReport
from moe_medical.files import write_file

_STYLE = """<style>
body { font: 14px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1200px }
body { padding: 0 1em }
table { border-collapse: collapse; margin: 0.5em 0 2em } td, th { padding: 0.15em 0.8em; text-align: right }
th { border-bottom: 1px solid #888; font-weight: 600 } td:first-child, th:first-child { text-align: left }
td.text { text-align: left } code { font-size: 12px } #vis.vega-embed { width: auto }
</style>"""
_CELL = 22
"""Pixels of a square of the heat map."""


def write_page(report: CheckReport, path: Path) -> None:
    """Write the page.

    Raises:
        StorageError: the file cannot be written.
    """
    page: str = chart(report).to_html(inline=True)
    # The last of each: the scripts in between have some in their own text.
    page = _insert(page, "</head>", f"<title>{escape(report.mixture)}: data check</title>{_STYLE}")
    page = _insert(page, "<body>", f"<body>{_intro(report)}", instead=True)
    page = _insert(page, "</body>", _tables(report))
    write_file(path, page)


def _insert(page: str, mark: str, text: str, instead: bool = False) -> str:
    before, found, after = page.rpartition(mark)
    assert found, f"altair's page has no {mark}"
    return before + text + ("" if instead else mark) + after


def chart(report: CheckReport) -> Any:
    """Histograms of lengths, and the map of overlaps where there is any; an altair chart."""
    import altair as alt

    parts = [_lengths(report)]
    order = [task.name for task in report.tasks]
    if report.leaks:
        title = "Evaluation rows (columns) that are in the training rows of a task (rows)"
        parts.append(_heat_map(report.leaks, "training rows of", "evaluation rows of", title, order))
    if report.shared:
        both = report.shared + [Overlap(o.second, o.first, 0, o.rows_of_first, o.near) for o in report.shared]
        title = "Training rows of a task (columns) that are in the training rows of another (rows)"
        parts.append(_heat_map(both, "and of", "training rows of", title, order))
    return alt.vconcat(*parts, spacing=40).resolve_scale(
        color="independent", x="independent", y="independent"
    )


def _lengths(report: CheckReport) -> Any:
    import altair as alt

    values = [
        {"task": task.name, "from": low, "to": high, "share": n / part.rows, "none": 0}
        for task in report.tasks
        if (part := task.splits.get("train"))
        for low, high, n in zip(LENGTH_EDGES[:-1], LENGTH_EDGES[1:], part.lengths.histogram, strict=True)
        if n
    ]
    scale = alt.Scale(type="log", base=2, nice=False)
    axis = alt.Axis(format=",", values=list(LENGTH_EDGES[::4]), grid=False)
    bars = (
        alt.Chart(alt.Data(values=values), width=170, height=60)
        .mark_bar(color="#4c78a8", stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("from:Q", scale=scale, axis=axis, title=None),
            x2="to:Q",
            y=alt.Y("share:Q", axis=alt.Axis(format="%", tickCount=3, grid=False), title=None),
            y2="none:Q",
            tooltip=["task:N", "from:Q", "to:Q", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    header = alt.Header(labelFontWeight="bold", labelFontSize=11, title=None)
    facet = alt.Facet("task:N", header=header, sort=[task.name for task in report.tasks])
    title = f"Length of training samples in {report.length_unit}, prompt and target together"
    return bars.facet(facet, columns=5, spacing=16, title=title).resolve_scale(y="independent")


def _heat_map(overlaps: Sequence[Overlap], down: str, across: str, title: str, order: list[str]) -> Any:
    import altair as alt

    values = [{"first": o.first, "second": o.second, "rows": o.near} for o in overlaps]
    largest = max(o.near for o in overlaps)
    axis = alt.Axis(labelLimit=220, labelAngle=-45, orient="top")
    base = alt.Chart(alt.Data(values=values), title=title).encode(
        x=alt.X("second:N", title=across, axis=axis, sort=order),
        y=alt.Y("first:N", title=down, axis=alt.Axis(labelLimit=220), sort=order),
    )
    colour = alt.Color("rows:Q", scale=alt.Scale(type="symlog", scheme="blues"), title="rows")
    squares = base.mark_rect().encode(color=colour, tooltip=["first:N", "second:N", "rows:Q"])
    is_dark = f"datum.rows > {largest**0.7:.1f}"
    numbers = base.mark_text(fontSize=10).encode(
        text="rows:Q", color=alt.condition(is_dark, alt.value("white"), alt.value("black"))
    )
    return (squares + numbers).properties(width=alt.Step(2 * _CELL), height=alt.Step(_CELL))


def _intro(report: CheckReport) -> str:
    rows = sum(part.rows for task in report.tasks for part in task.splits.values())
    errors = "".join(f"<li>{escape(error)}</li>" for error in report.errors)
    problems = f"<h2>Files that cannot be used</h2><ul>{errors}</ul>" if errors else ""
    told = f"{len(report.tasks)} tasks, {rows:,} rows in all splits"
    return f"<h1>Data check of {escape(report.mixture)}</h1><p>{told}</p>{problems}"


def _tables(report: CheckReport) -> str:
    settings = ", ".join(f"{key}: {value}" for key, value in report.hygiene.items())
    return "".join(
        (
            "<h2>Tasks and splits</h2>",
            _table(_SPLIT_COLUMNS, (cells for task in report.tasks for cells in _split_rows(task))),
            f"<p>Hygiene of the mixture: {escape(settings)}</p><h2>Labels of the training rows</h2>",
            _table(("task", "labels", "largest / rarest", "rows"), map(_label_row, report.tasks)),
            "<h2>Evaluation rows in training rows</h2>",
            _table(_OVERLAP_COLUMNS, map(_overlap_row, report.leaks)),
            "<h2>Training rows in two tasks</h2>",
            _table(_OVERLAP_COLUMNS, map(_overlap_row, report.shared)),
            "<h2>Licences</h2>",
            _table(("task", "phi", "licence"), ((t.name, t.phi, t.licence) for t in report.tasks)),
            "<h2>Records</h2><p>The first of each finding, as file:line:reason:digest</p>",
            _lines(place for task in report.tasks for place in (*task.bad_places, *task.places)),
            "<h2>Files</h2>",
            _lines(
                f"{digest}  {file}"
                for task in report.tasks
                for part in task.splits.values()
                for file, digest in part.files.items()
            ),
        )
    )


_SPLIT_COLUMNS = (
    *("task", "split", "rows", "bad", "median", "p95", "max", "over the limit"),
    *("equal", "equal but target", "nearly equal", "in evaluation"),
)
_OVERLAP_COLUMNS = ("first", "second", "equal", "equal or nearly", "rows of the first")


def _split_rows(task: TaskReport) -> Iterable[Sequence[object]]:
    for name, part in task.splits.items():
        lengths = part.lengths
        repeats = part.repeats
        over = "" if lengths.over is None else f"{100 * lengths.over:.1f} %"
        sizes = (part.rows, part.bad, f"{lengths.median:,.0f}", f"{lengths.p95:,.0f}", lengths.longest, over)
        yield (task.name, name, *sizes, repeats.exact, repeats.conflicting, repeats.near, part.leaking)


def _label_row(task: TaskReport) -> Sequence[object]:
    if task.labels is None:
        return (task.name, "", "", "open answers")
    counts = ", ".join(f"{label}: {n:,}" for label, n in task.labels.counts.items())
    return (task.name, task.labels.distinct, f"{task.labels.imbalance:,.1f}", counts or "not a closed set")


def _overlap_row(overlap: Overlap) -> Sequence[object]:
    return (overlap.first, overlap.second, overlap.exact, overlap.near, overlap.rows_of_first)


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>" if body else "<p>none</p>"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int):
        return f"<td>{value:,}</td>"
    return f'<td class="text">{escape(str(value))}</td>'


def _lines(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    return f"<pre><code>{escape(text)}</code></pre>" if text else "<p>none</p>"
