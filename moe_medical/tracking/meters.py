"""How fast a run goes: tokens per second and seconds per step. The clock is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable


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
