"""Steps whose gradients are not finite: the engine skips them, this tells of them and ends a run at last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_medical.distributed.topology import Topology
from moe_medical.errors import DivergedError
from moe_medical.training.callback import Callback
from moe_medical.training.run_log import RunLog
from moe_medical.training.step import StepResult

MOST_IN_A_ROW = 10
"""Skipped steps one after the other that end a run: another sample does not help any more."""


class Divergence(Callback):
    """Counts skipped steps.

    Args:
        tasks: Names.
        topology: This process among all.
        log: Takes an alert for each skipped step.
    """

    name = "divergence"

    def __init__(self, tasks: Sequence[str], topology: Topology, log: RunLog) -> None:
        self._tasks = list(tasks)
        self._topology = topology
        self._log = log
        self._skipped = 0
        self._in_a_row = 0

    def after_step(self, result: StepResult) -> Mapping[str, float]:
        """Tell of a skipped step.

        Raises:
            DivergedError: it is one too many. Checkpoints are as they were, and hold finite numbers.
        """
        if result.is_applied:
            self._in_a_row = 0
            return {"health/skipped_steps": self._skipped} if self._skipped else {}
        self._skipped += 1
        self._in_a_row += 1
        # Which tasks is known to the ranks that had their samples.
        bad_T = self._topology.sum(~np.isfinite(result.task_sums[0])) > 0
        bad = [task for task, is_bad in zip(self._tasks, bad_T, strict=True) if is_bad]
        cause = (
            f"losses of {', '.join(bad)} are not finite" if bad else "losses are finite, gradients are not"
        )
        self._log.alert("step skipped", f"step {result.done}: {cause}; nothing was updated")
        if self._in_a_row == MOST_IN_A_ROW:
            raise DivergedError(
                f"the run has diverged: {MOST_IN_A_ROW} steps in a row, up to step {result.done}, had "
                f"gradients that are not finite ({cause}). Lower training.learning_rate, or look at the data."
            )
        return {"health/skipped_steps": self._skipped}

    def state(self, done: int) -> dict[str, Any]:
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._skipped = state["skipped"]
        self._in_a_row = state["in_a_row"]
