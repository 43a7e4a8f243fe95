"""One HTML file that needs nothing else: tables, and Vega-Lite charts with the scripts that draw them.

Decisions: the scripts are in the page once, whatever the number of charts. The page forbids itself every
connection. Charts are SVG and take their text colours from the page's style, so they suit a dark screen and
paper alike; `html.charts = "drawn"` (a data attribute) tells when all are done. Whatever is put in as text is
escaped; only arguments named `html` are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from moe_medical.files import write_file

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:"
)
_CHART_CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "#5b646d",
        "titleColor": "#5b646d",
        "gridColor": "#80808030",
        "domainColor": "#80808080",
        "tickColor": "#80808080",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
    },
    "legend": {"labelColor": "#5b646d", "titleColor": "#5b646d", "labelFontSize": 11, "titleFontSize": 11},
    "header": {"labelColor": "#1f2429", "titleColor": "#1f2429", "labelFontSize": 11},
    "title": {"color": "#1f2429", "fontSize": 12, "anchor": "start", "fontWeight": "bold"},
}


@dataclass(frozen=True)
class Chart:
    """A picture of a page."""

    name: str
    """Unique in the page: letters, digits, `.`, `_` and `-`."""
    spec: Mapping[str, Any]
    """Vega-Lite, with its data."""
    summary: str
    """What it shows, in a sentence, for those who do not see it."""

    @property
    def html(self) -> str:
        """The place of the chart and its specification."""
        spec = json.dumps(
            dict(self.spec) | {"description": self.summary}, separators=(",", ":"), allow_nan=False
        )
        data = spec.replace("</", "<\\/").replace("<!--", "<\\u0021--")
        return (
            f'<div class="chart" id="chart-{escape(self.name)}"></div>'
            f'<script type="application/json" data-chart="{escape(self.name)}">{data}</script>'
        )

    def write_png(self, folder: Path) -> Path:
        """Write `NAME.png`, on white, at twice the size of the page's.

        Raises:
            StorageError: the file cannot be written.
        """
        import vl_convert

        config = {**_CHART_CONFIG, "background": "white", "padding": 12, "font": "sans-serif"}
        png = vl_convert.vegalite_to_png(dict(self.spec), scale=2, config=config, allowed_base_urls=[])
        path = folder / f"{self.name}.png"
        write_file(path, png)
        return path


@dataclass(frozen=True)
class Bar:
    """A number with a bar behind it."""

    text: str
    share: float
    """Of the cell's width, in [0, 1]; negative bars have the other colour."""
    note: str = ""
    """Shown when the pointer rests on it."""


@dataclass(frozen=True)
class Mark:
    """A word that stands out."""

    text: str
    kind: str
    """`good`, `bad` or `plain`."""


Cell = str | int | float | Bar | Mark


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell]], notes: Mapping[str, str] | None = None
) -> str:
    """A table as HTML; a line instead of one without rows.

    Args:
        columns: Headings.
        rows: Words are put to the left, numbers and bars to the right.
        notes: Heading -> what it means, shown when the pointer rests on it.
    """
    known = notes or {}
    head = "".join(f"<th{_title(known.get(column, ''))}>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    if not body:
        return "<p>none</p>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Cell) -> str:
    if isinstance(value, Bar):
        side = "gain" if value.share >= 0 else "loss"
        width = f"{100 * min(1.0, abs(value.share)):.1f}%"
        style = f' class="number bar {side}" style="--bar:{width}"'
        return f"<td{style}{_title(value.note)}>{escape(value.text)}</td>"
    if isinstance(value, Mark):
        return f'<td><span class="mark {escape(value.kind)}">{escape(value.text)}</span></td>'
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:,.3f}</td>'
    return f"<td>{escape(value)}</td>"


def _title(note: str) -> str:
    return f' title="{escape(note)}"' if note else ""


def write_page(path: Path, title: str, body_html: str) -> None:
    """Write a page with the charts that are in its body.

    Raises:
        StorageError: the file cannot be written.
    """
    scripts = ""
    if 'data-chart="' in body_html:
        config = json.dumps(_CHART_CONFIG)
        scripts = f"<script>{_libraries()}</script><script>{_DRAW.replace('CONFIG', config)}</script>"
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main>{body_html}</main>{scripts}</body></html>\n"
    )
    write_file(path, page)


def _libraries() -> str:
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in bundle, "the library would end its own script"
    return bundle


_DRAW = """
(async () => {
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const options = {renderer: 'svg', config: CONFIG, tooltip: {theme: dark ? 'dark' : 'light'},
    actions: {export: true, source: false, compiled: false, editor: false}};
  for (const spec of document.querySelectorAll('script[data-chart]')) {
    const place = document.getElementById(`chart-${spec.dataset.chart}`);
    try {
      await vegaEmbed(place, JSON.parse(spec.textContent), options);
    } catch (error) {
      place.textContent = 'This chart could not be drawn.';
      console.error(spec.dataset.chart, error);
    }
  }
  document.documentElement.dataset.charts = 'drawn';
})();
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
"""

_STYLE = """
:root { --page: #fbfbfa; --card: #fff; --ink: #1f2429; --soft: #5b646d; --line: #dfe2e5; --head: #f1f3f4;
  --gain: #3b7dd8; --loss: #d9542b; --gain-bar: #3b7dd833; --loss-bar: #d9542b38 }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1b1f23; --ink: #e7e9eb;
  --soft: #a3acb5;
  --line: #343a40; --head: #23282d; --gain: #6ea4ee; --loss: #f08a63; --gain-bar: #3b7dd866;
  --loss-bar: #d9542b70 } }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --head: #f1f3f4;
  --gain: #2a62b0; --loss: #b5411c; --gain-bar: #3b7dd833; --loss-bar: #d9542b38 } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--page); margin: 0; overflow-wrap: anywhere }
main { max-width: 1200px; margin: 0 auto; padding: 2.2rem 1.5rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.8rem 0 .2rem }
p { margin: .35rem 0 .8rem; max-width: 76ch }
p.run { max-width: none; margin: .1rem 0 } p.soft, .soft { color: var(--soft) }
ul.findings { padding-left: 1.2rem; max-width: 86ch } ul.findings li { margin: .3rem 0 }
nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem }
a { color: var(--gain); text-decoration: none } a:hover { text-decoration: underline }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .7rem;
  margin: 1.3rem 0 }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .9rem }
.numbers b { display: block; font-size: 1.2rem; white-space: nowrap; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums } .numbers span { color: var(--soft); font-size: .83rem }
.wide { overflow-x: auto; margin: .6rem 0 1.4rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  background: var(--card);
  border: 1px solid var(--line) }
th { background: var(--head); font-weight: 600; text-align: left; white-space: nowrap; position: sticky;
  top: 0 }
td, th { padding: .26rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th[title] { text-decoration: underline dotted var(--soft); text-underline-offset: 3px; cursor: help }
table { overflow-wrap: normal } td:first-child { overflow-wrap: anywhere; min-width: 7em }
td.number { text-align: right; white-space: nowrap } tbody tr:hover { background: var(--head) }
td.bar.gain { background: linear-gradient(90deg, var(--gain-bar) var(--bar), transparent var(--bar)) }
td.bar.loss { background: linear-gradient(90deg, var(--loss-bar) var(--bar), transparent var(--bar)) }
.mark { white-space: nowrap } .mark.good { color: var(--gain) } .mark.bad { color: var(--loss);
  font-weight: 600 }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .4em }
.chart { overflow-x: auto; margin: .8rem 0 1.6rem; min-height: 2rem }
.chart svg { display: block }
.chart.vega-embed { display: block; position: relative; padding-right: 0 }
.chart .role-axis-label text, .chart .role-axis-title text, .chart .role-legend-label text,
.chart .role-legend-title text { fill: var(--soft) }
.chart .role-title-text text, .chart .role-row-header text, .chart .role-column-header text,
.chart .role-header text { fill: var(--ink) }
.chart .plain-label text { fill: var(--ink) }
main > details, details details { margin: .8rem 0 }
summary { cursor: pointer; font-weight: 600 }
code { font-size: 12px } pre { overflow-x: auto }
@media print { body { font-size: 11pt } main { max-width: none; padding: 0 }
  nav, .vega-embed details { display: none }
  .chart, table, li { break-inside: avoid } h2, h3 { break-after: avoid } .chart { overflow: visible }
  .chart svg { max-width: 100%; height: auto } }
"""
