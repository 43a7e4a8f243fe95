"""How fast a run goes: tokens per second and seconds per step. The clock is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class SpeedMeter:
    """Tokens per second and seconds per step, as exponential moving averages.

    The rate is the average of tokens over the average of seconds, so that short steps do not count for more.

    Args:
        clock: Seconds from any fixed point.
        decay: Weight of the past in [0, 1); 0 shows the last step only.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, decay: float = 0.9):
        self._clock = clock
        self._decay = decay
        self._last = clock()
        # An average starts at 0; `weight` is the average of 1, so that a quotient of two has no bias.
        self._averages = dict.fromkeys(("seconds", "tokens", "positions", "waited", "weight"), 0.0)
        self.last_step_seconds = 0.0

    def step(self, tokens: int, positions: int, waited: float) -> None:
        """Ends a step.

        Args:
            tokens: That it saw.
            positions: That it computed, padding included.
            waited: Seconds that it waited for data.
        """
        now = self._clock()
        seconds = now - self._last
        new = {"seconds": seconds, "tokens": tokens, "positions": positions, "waited": waited, "weight": 1.0}
        for name, before in self._averages.items():
            self._averages[name] = self._decay * before + (1 - self._decay) * new[name]
        self.last_step_seconds = seconds
        self._last = now

    def restart(self) -> None:
        """Leaves out the time since the last step: evaluation or a save is no training time."""
        self._last = self._clock()

    def state(self) -> dict[str, float]:
        """JSON values; a meter that loads them goes on as if nothing had happened."""
        return dict(self._averages)

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` gave."""
        self._averages.update(state)

    @property
    def step_seconds(self) -> float:
        """Seconds per step; 0 before the first step."""
        return self._quotient("seconds", "weight")

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this process; 0 before the first step."""
        return self._quotient("tokens", "seconds")

    @property
    def useful_positions(self) -> float:
        """Share of the positions that held a token; 0 before the first step."""
        return self._quotient("tokens", "positions")

    @property
    def data_wait_seconds(self) -> float:
        """Seconds per step spent waiting for data; 0 before the first step."""
        return self._quotient("waited", "weight")

    def _quotient(self, of: str, per: str) -> float:
        return self._averages[of] / self._averages[per] if self._averages[per] else 0.0
