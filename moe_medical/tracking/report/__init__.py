"""What a run, or several, has done: one HTML file that needs nothing else.

    run folders -> record (numbers and names) -> findings, words, charts -> page

Nothing of a record, and nothing of the machine, gets into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_medical.errors import ConfigError, Problem
from moe_medical.html_page import write_page
from moe_medical.tracking.report.page import make_report, title
from moe_medical.tracking.report.record import read_runs

MOST_RUNS = 8

__all__ = ["MOST_RUNS", "write_report"]


def write_report(runs: Sequence[Path], out: Path | None = None, png: Path | None = None) -> Path:
    """Write the page, and its charts as PNGs where a folder is given.

    Args:
        runs: Run folders, at most eight; of several, the others are compared with the first.
        out: The page; `report.html` in the first run's folder where not given.
        png: Takes one `NAME.png` per chart; of several runs, a single run's charts are `RUN.NAME.png`.

    Returns:
        The page.

    Raises:
        ConfigError: there is no run, or more than can be told apart.
        DataError: a folder is no run's.
        StorageError: something cannot be written.
    """
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ConfigError(
            "moe-medical report", [Problem("RUN_DIR", f"must be 1 to {MOST_RUNS} folders", len(runs))]
        )
    records = read_runs(runs)
    report = make_report(records)
    page = out or Path(runs[0]) / "report.html"
    write_page(page, title(records), report.html)
    if png is not None:
        for chart in report.charts:
            chart.write_png(png)
    return page
