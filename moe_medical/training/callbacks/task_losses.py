"""What each task's training loss was since a reader last asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_medical.distributed.topology import Topology
from moe_medical.training.callback import Callback
from moe_medical.training.step import StepResult


class TaskLosses(Callback):
    """Sums of each task, once for each reader, as each asks at steps of its own.

    It must come before its readers in the list of callbacks, so that they find the step that has just been
    done.

    Args:
        num_tasks: T.
        readers: Names of those who will `take`.
        topology: This process among all.
    """

    name = "task_losses"

    def __init__(self, num_tasks: int, readers: Sequence[str], topology: Topology) -> None:
        self._topology = topology
        self._sums = {reader: np.zeros((3, num_tasks)) for reader in readers}

    def after_step(self, result: StepResult) -> Mapping[str, float]:
        if result.is_applied:  # a loss that is not finite would hide all others of its task
            for sums in self._sums.values():
                sums += result.task_sums
        return {}

    def take(self, reader: str) -> np.ndarray:
        """Of all ranks since the reader last took it: loss (nats), target tokens, samples; float64, (3, T).

        Collective: every rank must call.
        """
        total = self._topology.sum(self._sums[reader])
        self._sums[reader][:] = 0
        return total

    def take_mean(self, reader: str) -> np.ndarray:
        """The same as the mean loss per target token, (T,); NaN where a task had no sample. Collective."""
        losses, tokens, _ = self.take(reader)
        return np.asarray(losses / np.where(tokens > 0, tokens, np.nan))

    def state(self, done: int) -> dict[str, Any]:
        totals = {reader: self._topology.sum(sums) for reader, sums in self._sums.items()}
        self._keep(totals)
        return {reader: total.tolist() for reader, total in totals.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._keep({reader: np.array(sums) for reader, sums in state.items() if reader in self._sums})

    def _keep(self, totals: Mapping[str, np.ndarray]) -> None:
        # The main rank has all of it from a checkpoint on, whether the run goes on or is resumed: sums of
        # floating-point numbers depend on who adds them, and a resumed run must get the same bits.
        for reader, total in totals.items():
            self._sums[reader] = total if self._topology.is_main else np.zeros_like(total)
