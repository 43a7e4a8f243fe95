"""The guard in a run: what it is told, and how its decisions reach the loss, the mixture and the loop.

The main rank looks and all ranks hear, so that no rank decides by another rounding. Factors of the loss and
the streaks of the guard are in each checkpoint; a frozen task is part of the plan's weight history.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_medical.config.schema import GuardSection
from moe_medical.distributed.topology import Topology
from moe_medical.tracking.seesaw import SeesawStep
from moe_medical.training.data_module import Feed
from moe_medical.training.guard import Decision, TaskGuard

_LOG = logging.getLogger(__name__)


class Guarding:
    """The guard of a run, if it has one. Collective: every rank must make the same calls.

    Attributes:
        factors_T: What each task's loss is multiplied with.
        stopped: Whether the run is to end here.
    """

    def __init__(self, section: GuardSection, feed: Feed, topology: Topology) -> None:
        self._feed, self._topology = feed, topology
        self._names = [task.name for task in feed.tasks]
        self._guard = TaskGuard(section, self._names) if section.action != "none" else None
        self._sums = np.zeros((2, len(feed.tasks)))
        self._looked = -1
        self.factors_T, self.stopped = np.ones(len(feed.tasks)), False

    def add(self, sums: np.ndarray) -> None:
        """This rank's losses and target tokens of a step, in rows of shape (tasks,)."""
        self._sums += sums[:2]

    def look(self, done: int, seen: SeesawStep | None) -> Sequence[Decision]:
        """Decide after the evaluation at `done` steps, once; the decisions, on the main rank.

        Args:
            done: Optimizer steps done.
            seen: The evaluation; the main rank must give it.
        """
        if self._guard is None or done <= self._looked:
            return []
        decisions = self._decide(self._guard, done, seen)
        stop = any(decision.action == "stop" for decision in decisions)
        frozen = [name in self._guard.frozen for name in self._names]
        agreed = self._agree(np.array([*self._guard.weight_T, *frozen, stop], dtype=np.float64))
        self.factors_T, self.stopped = agreed[: len(self._names)], bool(agreed[-1])
        if agreed[len(self._names) : -1].any():
            self._leave_out(agreed[len(self._names) : -1] > 0, done, decisions)
        self._looked = done
        return decisions

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON values."""
        total = self._topology.sum(self._sums)
        # From here on the main rank has it all, as a resumed run will.
        self._sums = total if self._topology.is_main else np.zeros_like(total)
        guard = self._guard.state() if self._guard else None
        values = {"looked": self._looked, "sums": total.tolist(), "stopped": self.stopped}
        return {"guard": guard, "factors": self.factors_T.tolist(), **values}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        if self._guard is not None and state["guard"] is not None:
            self._guard.load_state(state["guard"])
        self._looked, self.stopped = state["looked"], state["stopped"]
        self.factors_T = np.array(state["factors"])
        if self._topology.is_main:
            self._sums = np.array(state["sums"])

    def _decide(self, guard: TaskGuard, done: int, seen: SeesawStep | None) -> Sequence[Decision]:
        losses, tokens = self._topology.sum(self._sums)
        self._sums[:] = 0
        if not self._topology.is_main:
            return []
        assert seen is not None, "the main rank has seen the evaluation"
        train_loss_T = losses / np.where(tokens > 0, tokens, np.nan)
        return guard.look(done, seen, train_loss_T.tolist(), self._feed.repeats(done).tolist())

    def _leave_out(self, frozen_T: np.ndarray, done: int, decisions: Sequence[Decision]) -> None:
        if not self._feed.leave_out(frozen_T, done) and decisions:
            names = [name for name, frozen in zip(self._names, frozen_T, strict=True) if frozen]
            _LOG.warning(
                "%s stay in the mixture: nothing else can feed the rest of the run", ", ".join(names)
            )

    def _agree(self, values: np.ndarray) -> np.ndarray:
        return self._topology.sum(values if self._topology.is_main else np.zeros_like(values))
