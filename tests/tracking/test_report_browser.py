"""The report in a real browser: charts drawn, nothing to complain about, nothing asked of the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import BINARY, Page, browser
from support.report_runs import LongRun

from moe_medical.tracking.report import write_report

pytestmark = [
    pytest.mark.skipif(BINARY is None, reason="no chromium or google-chrome on this machine"),
    pytest.mark.timeout(300),
]

DRAWN = """
[...document.querySelectorAll('.chart')].map(chart => {
  const svg = chart.querySelector('svg');
  const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
  const marks = chart.querySelectorAll('svg .role-mark path, svg .role-mark text').length;
  return [chart.id, box.width, box.height, marks];
})
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        LongRun(tasks=24).write(folder / "whole"),
        LongRun(tasks=5, looks=False, seed=1).write(folder / "plain"),
    ]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_all_charts_are_drawn_and_nothing_leaves_the_page(
    tab: Page, runs: list[Path], tmp_path: Path
) -> None:
    page = write_report(runs, tmp_path / "page.html", None)
    tab.open(page)
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = tab.evaluate(DRAWN)
    assert len(found) > 15
    for name, width, height, marks in found:
        assert min(width, height) > 40, name
        assert marks > 0, name
    assert tab.complaints == []
    assert tab.requests == [page.resolve().as_uri()]


def test_the_page_refuses_to_ask_the_network(tab: Page, runs: list[Path], tmp_path: Path) -> None:
    """The same checks do notice a request and a complaint."""
    tab.open(write_report(runs[:1], tmp_path / "page.html", None))
    refused = tab.evaluate("fetch('http://localhost:9/x').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    assert any("Content Security Policy" in text for text in tab.complaints)


def test_a_broken_chart_is_told_and_does_not_stop_the_others(
    tab: Page, runs: list[Path], tmp_path: Path
) -> None:
    page = write_report(runs[1:], tmp_path / "page.html", None)
    page.write_text(page.read_text().replace('data-chart="macro_loss">{', 'data-chart="macro_loss">{{', 1))
    tab.open(page)
    sizes = {name: marks for name, _, _, marks in tab.evaluate(DRAWN)}
    assert sizes["chart-macro_loss"] == 0
    assert sizes["chart-task_losses"] > 0
    assert any("macro_loss" in text for text in tab.complaints)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_its_background(dark: bool, tab: Page, runs: list[Path], tmp_path: Path) -> None:
    tab.open(write_report(runs[1:], tmp_path / "page.html", None), dark=dark)
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    colours = tab.evaluate(
        "[...new Set([...document.querySelectorAll("
        "'p, td, th, .role-axis-label text, .role-title-text text, .role-legend-label text')]"
        ".map(e => getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']))]"
    )
    assert colours
    assert all(contrast(colour, background) > 4.5 for colour in colours), (colours, background)


def contrast(one: str, other: str) -> float:
    """Ratio of WCAG 2.1, 4.5 or more for readable text."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_itself_never_scrolls_sideways(
    width: int, tab: Page, runs: list[Path], tmp_path: Path
) -> None:
    tab.open(write_report(runs[:1], tmp_path / "page.html", None), width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
