"""Steps made ready in background threads, in order, a bounded number ahead.

Decisions:
- Threads, not processes: tokenising leaves Python's lock, the rest of a step is a few milliseconds, nothing
  is pickled or forked beside a process group, and nothing is left behind by a kill.
- The caller's thread reads the plan and hands out samples; threads only lay them out. So the order cannot
  depend on the number of threads, and the plan needs no lock.
- What fails in a thread is raised where its step is taken.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from moe_medical.data.batches import Batch, TrainingBatches


class Loader:
    """Micro-batches of consecutive steps.

    Args:
        batches: What to make.
        workers: Threads; 0 makes a step when it is taken.
        ahead: Steps made before they are taken, at most.
        pin: Whether to put them into memory that a GPU copies from by itself.
    """

    def __init__(self, batches: TrainingBatches, workers: int, ahead: int, pin: bool = False) -> None:
        self._batches = batches
        self._pin = pin
        self._ahead = ahead if workers else 0
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._queue: deque[tuple[int, Future[list[Batch]]]] = deque()
        self._waited = 0.0

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()

    def take(self, step: int, end: int) -> list[Batch]:
        """The micro-batches of `step`; those of the steps behind it, before `end`, are begun.

        Steps are taken one after the other; another one than the next starts anew there.
        """
        began = time.perf_counter()
        try:
            if self._pool is None:
                return self._make(step)
            if self._queue and self._queue[0][0] != step:
                self._queue.clear()
            first = self._queue[-1][0] + 1 if self._queue else step
            for number in range(first, min(step + self._ahead + 1, end)):
                samples = self._batches.samples(number)
                self._queue.append((number, self._pool.submit(self._lay_out, samples)))
            return self._queue.popleft()[1].result()
        finally:
            self._waited += time.perf_counter() - began

    def waited(self) -> float:
        """Seconds that the caller has waited for steps since it last asked."""
        waited = self._waited
        self._waited = 0.0
        return waited

    def _make(self, step: int) -> list[Batch]:
        return self._lay_out(self._batches.samples(step))

    def _lay_out(self, samples: list) -> list[Batch]:
        batches = self._batches.lay_out(samples)
        return [batch.pin_memory() for batch in batches] if self._pin else batches
