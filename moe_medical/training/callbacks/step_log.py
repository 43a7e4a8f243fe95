"""The line of a step in the log: losses, rates, speed and the health of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_medical.config import RunConfig
from moe_medical.data.batches import Loader
from moe_medical.distributed.topology import Topology, peak_memory_gib
from moe_medical.tracking.meters import SpeedMeter
from moe_medical.training.callback import Callback, is_due
from moe_medical.training.callbacks.task_losses import TaskLosses
from moe_medical.training.data_module import DataModule
from moe_medical.training.router_losses import RouterLosses
from moe_medical.training.step import StepResult

READER = "log"
"""Its name among the readers of `TaskLosses`."""


class StepLog(Callback):
    """Tells of every `tracking.log_every_steps`-th step, and of the last one.

    Args:
        config: The run.
        data: Its tasks and their shares.
        loader: Knows how long it was waited for.
        topology: This process among all.
        task_losses: Has the losses since the last line.
        router_losses: Of the newest step.
    """

    name = "step_log"

    def __init__(
        self,
        config: RunConfig,
        data: DataModule,
        loader: Loader,
        topology: Topology,
        task_losses: TaskLosses,
        router_losses: RouterLosses,
    ) -> None:
        self._every = config.tracking.log_every_steps
        self._last = config.training.steps
        self._data = data
        self._loader = loader
        self._topology = topology
        self._names = [task.name for task in data.tasks]
        self._task_losses = task_losses
        self._router_losses = router_losses
        self._speed = SpeedMeter()
        self._truncated = 0

    def before_step(self, step: int) -> None:
        self._speed.restart()  # evaluations and checkpoints since the last step are no training time

    def after_step(self, result: StepResult) -> Mapping[str, float]:
        counts = result.counts
        self._truncated += counts.truncated
        self._speed.step(counts.all_tokens, counts.positions, self._loader.waited())
        if not is_due(self._every, result.done, self._last):
            return {}
        return {
            **loss_series(self._names, self._task_losses.take(READER)),
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "step_seconds": self._speed.last_step_seconds,
            "tokens_per_second": self._speed.tokens_per_second,
            "health/useful_positions": self._speed.useful_positions,
            "health/data_wait_seconds": self._speed.data_wait_seconds,
            "health/truncated_prompts": self._truncated,
            "health/memory_gib": peak_memory_gib(self._topology.device),
            **{f"router_loss/{name}": value for name, value in self._router_losses.values().items()},
            **self._data.shares(result.done),
            **self._loss_weights(result.factors_T),
        }

    def state(self, done: int) -> dict[str, Any]:
        return {"truncated": self._truncated, "speed": self._speed.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._truncated = int(state["truncated"])
        self._speed.load_state(state["speed"])

    def _loss_weights(self, factors_T: np.ndarray) -> dict[str, float]:
        """Factors of the tasks' losses, where any is not 1."""
        if (factors_T == 1).all():
            return {}
        named = zip(self._names, factors_T.tolist(), strict=True)
        return {f"loss_weight/{name}": factor for name, factor in named}


def loss_series(names: Sequence[str], sums_3T: np.ndarray) -> dict[str, float]:
    """`train_loss/<task>` per target token, and `loss`, their mean with each task counting by its samples.

    Args:
        names: T tasks.
        sums_3T: Of each: loss (nats), target tokens, samples. A task without a token is left out.
    """
    means = {}
    weighed = 0.0
    samples = 0
    for name, (loss, tokens, rows) in zip(names, sums_3T.T.tolist(), strict=True):
        if tokens > 0:
            means[f"train_loss/{name}"] = loss / tokens
            weighed += loss / tokens * round(rows)
            samples += round(rows)
    return means | ({"loss": weighed / samples} if samples else {})
