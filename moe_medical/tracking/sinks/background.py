"""A bounded queue and a thread before a sink that may hang or fail."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_medical.tracking.sinks.sink import Cell, Sink

_LOG = logging.getLogger(__name__)

CAPACITY = 2000
"""Calls that wait at most: at 200 series about 40 MB."""
LAST_WAIT_SECONDS = {True: 60.0, False: 10.0}
"""For what still waits at the end of a run: after success, and after a failure or a stop, when machines
are about to go."""

_Call = Callable[[Sink], object]


class Background(Sink):
    """A sink behind a queue: no call but `close` waits, and none fails.

    When the queue is full the oldest call is dropped. What was lost is told once, in `close`.

    Args:
        name: For the user, as in "W&B".
        open: Makes the sink, in the thread: it may take long, hang or fail.
        capacity: Calls that wait at most.
        last_wait_seconds: How long `close` waits at most; None is `LAST_WAIT_SECONDS`.
    """

    def __init__(
        self,
        name: str,
        open: Callable[[], Sink],
        capacity: int = CAPACITY,
        last_wait_seconds: float | None = None,
    ):
        self.name = name
        self.dropped = 0
        """Calls that found no place, so far."""
        self.failures = 0
        """Exceptions swallowed, so far."""
        self._open = open
        self._last_wait = last_wait_seconds
        self._waiting: deque[_Call] = deque(maxlen=capacity)
        self._changed = threading.Condition()
        self._exit_code: int | None = None
        self._thread = threading.Thread(target=self._work, name=f"{name} sink", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Queues one row."""
        row = dict(values)
        self._put(lambda sink: sink.log(row, step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Queues a table."""
        kept = [list(row) for row in rows]
        self._put(lambda sink: sink.table(name, list(columns), kept, step))

    def heat_map(self, name: str, cells: Sequence[Cell], step: int) -> None:
        """Queues a matrix."""
        kept = list(cells)
        self._put(lambda sink: sink.heat_map(name, kept, step))

    def alert(self, title: str, text: str) -> None:
        """Queues an alert."""
        self._put(lambda sink: sink.alert(title, text))

    def close(self, exit_code: int) -> None:
        """Waits a while for the queue to empty and the sink to end; tells what was lost."""
        with self._changed:
            if self._exit_code is not None:
                return
            self._exit_code = exit_code
            self._changed.notify()
        wait = LAST_WAIT_SECONDS[exit_code == 0] if self._last_wait is None else self._last_wait
        self._thread.join(wait)
        self._tell_losses()

    def _put(self, call: _Call) -> None:
        with self._changed:
            if self._exit_code is None:
                self.dropped += len(self._waiting) == self._waiting.maxlen
                self._waiting.append(call)
                self._changed.notify()

    def _work(self) -> None:
        sink: Sink | None = None
        try:
            sink = self._open()
        except Exception as error:
            self._count(error)
        while (call := self._next()) is not None:
            if sink is None:
                self.dropped += 1
            else:
                self._do(call, sink)
        if sink is not None:
            self._do(lambda sink: sink.close(self._exit_code or 0), sink)

    def _next(self) -> _Call | None:
        """The oldest call, or None when the run has ended and none is left."""
        with self._changed:
            while not self._waiting and self._exit_code is None:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _do(self, call: _Call, sink: Sink) -> None:
        try:
            call(sink)
        except Exception as error:
            self._count(error)

    def _count(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            _LOG.warning("%s failed (%s); training goes on", self.name, type(error).__name__)

    def _tell_losses(self) -> None:
        if self._thread.is_alive():
            _LOG.warning("%s does not answer and is left behind", self.name)
        lost = self.dropped + len(self._waiting)
        if lost:
            _LOG.warning("%s: %d rows lost. metrics.jsonl is complete.", self.name, lost)
