"""One task between evaluations: what its probe rows lost or gained, and how much of that may be noise.

A change counts only beyond its gate, two standard errors of the paired losses of the probe rows and the run
file's least change. What follows from the tracks of all tasks is in `seesaw.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from moe_medical.tracking.reference import SOLVED, relative_gain


class Probed(Protocol):
    """A task's probe rows at one evaluation."""

    @property
    def row_losses(self) -> tuple[float, ...]: ...
    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class ProbeLosses:
    """A task's probe rows at one evaluation."""

    row_losses: tuple[float, ...]
    """Nats, summed over the target tokens of each row, in file order."""
    tokens: int
    """Target tokens of all rows."""

    @property
    def loss(self) -> float:
        """Nats per target token; NaN without any."""
        known = self.tokens and self.row_losses
        return float(np.sum(self.row_losses) / self.tokens) if known else math.nan


def paired_error(before: Probed, after: Probed) -> float:
    """Standard error of the change of a task's loss between two evaluations of the same rows, nats per token.

    Rows are drawn, so what they contribute to the change is; rows whose loss stays are no noise.
    0 with fewer than two rows.

    Raises:
        ValueError: the evaluations have different numbers of rows.
    """
    if len(before.row_losses) != len(after.row_losses):
        raise ValueError("evaluations are paired by their rows, and must have the same")
    changes = np.subtract(after.row_losses, before.row_losses)
    return float(np.sqrt(len(changes)) * np.std(changes, ddof=1) / after.tokens) if len(changes) > 1 else 0.0


class Change(NamedTuple):
    """Of a task's loss between two evaluations, relative; positive is better."""

    value: float = math.nan
    gate: float = math.nan
    error: float = math.nan
    before: float = math.nan
    """The earlier loss, nats per target token."""


NOTHING = Change()


class Move(NamedTuple):
    """Part of a task in gain and regress over some time, and the errors of the changes that it is made of."""

    gain: float
    regress: float
    errors: float
    """Sum of standard errors."""
    squares: float
    """Sum of their squares."""


@dataclass(frozen=True)
class Seen:
    """What one evaluation tells of a task; None and NaN where it tells nothing."""

    step: Change = NOTHING
    regret: Change = NOTHING
    since_best: float = math.nan
    move: Move | None = None
    window: Move | None = None


class TaskTrack:
    """The finite evaluations of one task."""

    def __init__(self, gate: float, window: int) -> None:
        self._gate = gate
        self._recent: deque[ProbeLosses] = deque(maxlen=window)
        self._moves: deque[Move] = deque(maxlen=window)
        self._best: ProbeLosses | None = None
        self._since_best = 0

    def add(self, now: ProbeLosses | None) -> Seen:
        if now is None:
            return Seen()
        if self._best is not None and _probe_set(self._best) != _probe_set(now):
            self._forget()
        is_best = self._best is None or now.loss < self._best.loss
        self._best = best = now if self._best is None or is_best else self._best
        self._since_best = 0 if is_best else self._since_best + 1
        regret = self._change(best, now)
        if not self._recent:
            self._recent.append(now)
            return Seen(regret=regret, since_best=self._since_best)
        step = self._change(self._recent[-1], now)
        way = self._change(self._recent[0], now)
        self._recent.append(now)
        self._moves.append(_move(step))
        return Seen(step, regret, self._since_best, self._moves[-1], self._in_window(_move(way)))

    def state(self) -> dict[str, Any]:
        return {
            "best": _to_json(self._best) if self._best else None,
            "since_best": self._since_best,
            "recent": [_to_json(probe) for probe in self._recent],
            "moves": [list(move) for move in self._moves],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._forget()
        self._best = _from_json(state["best"]) if state["best"] else None
        self._since_best = state["since_best"]
        self._recent.extend(_from_json(probe) for probe in state["recent"])
        self._moves.extend(Move(*move) for move in state["moves"])

    def _forget(self) -> None:
        self._recent.clear()
        self._moves.clear()
        self._best = None
        self._since_best = 0

    def _change(self, before: ProbeLosses, now: ProbeLosses) -> Change:
        error = paired_error(before, now) / max(before.loss, SOLVED)
        return Change(relative_gain(now.loss, before.loss), max(self._gate, 2 * error), error, before.loss)

    def _in_window(self, way: Move) -> Move:
        """The larger of the sum of the steps and of the whole way."""
        sums = [sum(part) for part in zip(*self._moves, strict=True)]
        return Move(*map(max, sums, way))


def measured(probe: Probed | None) -> ProbeLosses | None:
    """None unless the loss is finite."""
    if probe is None:
        return None
    losses = ProbeLosses(tuple(probe.row_losses), probe.tokens)
    return losses if math.isfinite(losses.loss) else None


def _probe_set(probe: ProbeLosses) -> tuple[int, int]:
    return len(probe.row_losses), probe.tokens


def _move(change: Change) -> Move:
    gain = max(0.0, change.value - change.gate)
    regress = max(0.0, -change.value - change.gate)
    return Move(gain, regress, change.error, change.error**2)


def _to_json(probe: ProbeLosses) -> list[Any]:
    return [list(probe.row_losses), probe.tokens]


def _from_json(data: Sequence[Any]) -> ProbeLosses:
    return ProbeLosses(tuple(data[0]), data[1])
