"""Sums between two log lines: loss per task, and speed.

Decisions: sums are float64 in one array, so one all-reduce carries every task; a mean is taken when a row is
read, hence it does not depend on the number of ranks or the micro-batch size. The all-reduce and the clock
are given by the caller: nothing here knows about torch or about the time of day.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class TaskRow(NamedTuple):
    """What one task did since the last reset."""

    loss: float
    """Nats per supervised token: the sum of token losses over `tokens`."""
    tokens: int
    """Supervised tokens."""
    samples: int


class TaskMeter:
    """Loss sum, supervised tokens and samples of every task.

    Args:
        tasks: Task names; the task id of a sample is a position in this list.
    """

    def __init__(self, tasks: Sequence[str]):
        self.tasks = list(tasks)
        self.sums: NDArray[np.float64] = np.zeros((len(self.tasks), 3))
        """(tasks, 3): loss sum, tokens, samples."""

    def add(self, task_ids: ArrayLike, loss_sums: ArrayLike, token_counts: ArrayLike) -> None:
        """Adds samples, given as three equally long lists or CPU arrays.

        Args:
            task_ids: (B,) task of each sample.
            loss_sums: (B,) sum of the sample's token losses, in nats.
            token_counts: (B,) supervised tokens of the sample.

        Raises:
            ValueError: The lengths differ, or an id names no task.
        """
        ids = np.asarray(task_ids, dtype=np.int64)
        losses, tokens = np.asarray(loss_sums, np.float64), np.asarray(token_counts, np.float64)
        if not ids.shape == losses.shape == tokens.shape:
            raise ValueError(f"needs one value per sample, got {ids.shape}, {losses.shape}, {tokens.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self.tasks):
            raise ValueError(f"task ids must be in [0, {len(self.tasks)}), got {ids.min()} to {ids.max()}")
        np.add.at(self.sums, ids, np.stack([losses, tokens, np.ones_like(losses)], axis=-1))

    def reduce(self, all_reduce: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> TaskMeter:
        """Collective: replaces the sums by those of all ranks, once between two resets. Returns itself."""
        self.sums = np.asarray(all_reduce(self.sums), dtype=np.float64)
        return self

    @property
    def rows(self) -> dict[str, TaskRow]:
        """The tasks that had a supervised token, in the order of `tasks`."""
        return {task: _row(sums) for task, sums in zip(self.tasks, self.sums, strict=True) if sums[1] > 0}

    @property
    def total(self) -> TaskRow:
        """All tasks together; the loss is NaN before the first token."""
        return _row(self.sums.sum(axis=0))

    def reset(self) -> None:
        """Forgets everything."""
        self.sums = np.zeros_like(self.sums)


def _row(sums: NDArray[np.float64]) -> TaskRow:
    loss, tokens, samples = sums.tolist()
    return TaskRow(loss / tokens if tokens else float("nan"), round(tokens), round(samples))


class SpeedMeter:
    """Tokens per second and seconds per step, as exponential moving averages.

    The rate is the average of tokens over the average of seconds, so that short steps do not count for more.

    Args:
        clock: Seconds from any fixed point.
        decay: Weight of the past in [0, 1); 0 shows the last step only.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, decay: float = 0.9):
        self._clock, self._decay = clock, decay
        self._seconds = self._tokens = self._positions = self._waited = self._weight = 0.0
        self._last = clock()
        self.last_step_seconds = 0.0

    def step(self, tokens: int, positions: int, waited: float) -> None:
        """Ends a step.

        Args:
            tokens: That it saw.
            positions: That it computed, padding included.
            waited: Seconds that it waited for data.
        """
        now = self._clock()
        self.last_step_seconds = now - self._last
        self._seconds = self._average(self._seconds, self.last_step_seconds)
        self._tokens = self._average(self._tokens, tokens)
        self._positions = self._average(self._positions, positions)
        self._waited = self._average(self._waited, waited)
        self._weight = self._average(self._weight, 1.0)
        self._last = now

    def _average(self, before: float, value: float) -> float:
        return self._decay * before + (1 - self._decay) * value

    def restart(self) -> None:
        """Leaves out the time since the last step: evaluation or a save is no training time."""
        self._last = self._clock()

    @property
    def step_seconds(self) -> float:
        """Seconds per step; 0 before the first step."""
        return self._seconds / self._weight if self._weight else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this process; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def useful_positions(self) -> float:
        """Share of the positions that held a token; 0 before the first step."""
        return self._tokens / self._positions if self._positions else 0.0

    @property
    def data_wait_seconds(self) -> float:
        """Seconds per step spent waiting for data; 0 before the first step."""
        return self._waited / self._weight if self._weight else 0.0
