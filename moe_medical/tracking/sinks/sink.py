"""What takes the numbers of a run, and the fan-out over several of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_medical.errors import StorageError

_LOG = logging.getLogger(__name__)

Cell = tuple[str, str, float | None]
"""Down, across, value; None where there is none."""


class Sink:
    """Takes rows of numbers. What a sink has no place for it leaves out: the run's folder has it all."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the numbers of one step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Shows a table, such as one row per task."""

    def heat_map(self, name: str, cells: Sequence[Cell], step: int) -> None:
        """Shows a matrix of numbers between named rows and named columns."""

    def alert(self, title: str, text: str) -> None:
        """Tells a person, once in a while for each title."""

    def close(self, exit_code: int) -> None:
        """Ends the sink; `exit_code` is the process's."""


class Sinks(list[Sink]):
    """Fan-out: every sink gets everything; then a `StorageError` of one is raised, and nothing else."""

    failures = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes one row to every sink."""
        self._each(lambda sink: sink.log(values, step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Shows a table; a cell is a number, a name of ours or None."""
        self._each(lambda sink: sink.table(name, columns, rows, step))

    def heat_map(self, name: str, cells: Sequence[Cell], step: int) -> None:
        """Shows a matrix."""
        self._each(lambda sink: sink.heat_map(name, cells, step))

    def alert(self, title: str, text: str) -> None:
        """Tells a person; `text` holds no text of a record."""
        self._each(lambda sink: sink.alert(title, text))

    def close(self, exit_code: int) -> None:
        """Closes every sink."""
        self._each(lambda sink: sink.close(exit_code))

    def _each(self, action: Callable[[Sink], None]) -> None:
        storage_error = None
        for sink in self:
            try:
                action(sink)
            except StorageError as error:
                storage_error = error
            except Exception as error:
                self._count(sink, error)
        if storage_error is not None:
            raise storage_error

    def _count(self, sink: Sink, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            _LOG.warning("%s failed (%s); training goes on", type(sink).__name__, type(error).__name__)
