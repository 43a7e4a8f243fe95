"""What a person sees: log lines, tables and progress.

Only the main rank shows anything. Logs and progress go to stderr; what a pipe may want (tables,
generated text) goes to stdout.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_LOG = logging.getLogger(__name__)
_STDERR = Console(stderr=True)


def setup_logging(is_main: bool) -> None:
    """Log lines of the main rank at INFO, of the others from WARNING on."""
    handler: logging.Handler = logging.StreamHandler()
    line = "%(asctime)s %(message)s"
    if sys.stderr.isatty():
        handler = RichHandler(console=_STDERR, show_path=False, show_level=False, omit_repeated_times=False)
        line = "%(message)s"
    level = logging.WARNING
    logging.basicConfig(level=level, format=line, datefmt="%H:%M:%S", handlers=[handler], force=True)
    logging.getLogger("moe_medical").setLevel(logging.INFO if is_main else logging.WARNING)
    # torchao's kernels for GPUs that are not here are nothing that a user could mend either.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed's calls into torch.distributed are nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def show(text: str) -> None:
    """Write a result to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_part(text: str) -> None:
    """Write a piece of a longer result to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(text: str) -> None:
    """Write what went wrong to stderr, as it is."""
    _STDERR.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], footer: Sequence[str] = ()) -> None:
    """A table on stdout, as narrow as its cells; the first column is left-aligned, the others right."""
    table = Table(box=SIMPLE_HEAD, show_footer=bool(footer), show_edge=False, pad_edge=False, padding=(0, 0))
    for i, column in enumerate(columns):
        end = footer[i] if footer else ""
        table.add_column(column, footer=end, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(table)
    console.print()


class ProgressLine:
    """One progress bar with a free text beside it; log lines at every tenth where there is no terminal."""

    def __init__(self, label: str, total: int, progress: Progress | None) -> None:
        self._label = label
        self._total = max(total, 1)
        self._done = 0
        self._note = ""
        self._progress = progress
        self._task = progress.add_task(label, total=total, note="") if progress else None

    def advance(self, by: int = 1, note: str = "") -> None:
        before = self._done
        self._done = self._done + by
        self._note = note or self._note
        if self._progress and self._task is not None:
            self._progress.update(self._task, advance=by, note=self._note)
        elif before * 10 // self._total != self._done * 10 // self._total:
            _LOG.info("%s %d/%d %s", self._label, self._done, self._total, self._note)


@contextmanager
def progress_line(label: str, total: int, visible: bool) -> Iterator[ProgressLine]:
    """Progress of `total` pieces of work: elapsed time, time left and a note such as the loss."""
    if not (visible and _STDERR.is_terminal):
        yield ProgressLine(label, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_STDERR, speed_estimate_period=3600) as progress:
        yield ProgressLine(label, total, progress)
