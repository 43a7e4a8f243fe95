"""How the losses of a step's tokens become one number: normalisation, task weights, surgery.

    token_weights -> forward and backward of all micro-batches -> engine's step -> observe

With the defaults neither costs anything: `token_weights` is arithmetic on counts, `observe` does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.schema import LossSection
from moe_medical.data.batches import Batch
from moe_medical.distributed.engine import Engine
from moe_medical.evaluation.loss import TokenWeights, task_sums, token_losses
from moe_medical.training.binding import bind_batch
from moe_medical.training.step import StepCounts, seed_step
from moe_medical.training.surgery import surgery_weights
from moe_medical.training.task_weights import task_weighting


class StepLoss:
    """The loss of one step after the other. Collective: every rank must make the same calls.

    Args:
        section: `training.loss`.
        engine: That does the steps.
        context: Of its layers.
        num_tasks: T.
        seed: Of the run; what is drawn is a function of it, the step and the rank.

    Attributes:
        factors_T: What each task's loss was multiplied with in the last step, beside the normalisation.
    """

    def __init__(
        self, section: LossSection, engine: Engine, context: RoutingContext, num_tasks: int, seed: int
    ) -> None:
        self._section, self._engine, self._context = section, engine, context
        self._num_tasks, self._seed = num_tasks, seed
        self._weighting = task_weighting(section, num_tasks)
        self.factors_T = np.ones(num_tasks)

    def token_weights(
        self, step: int, batches: Sequence[Batch], counts: StepCounts, guard_T: np.ndarray | float = 1.0
    ) -> TokenWeights:
        """Weights of the target tokens in the loss of a step.

        Args:
            step: Counted from 0.
            batches: This rank's micro-batches of the step.
            counts: Of all ranks.
            guard_T: More factors of the tasks' losses.
        """
        device = self._engine.topology.device
        plain = TokenWeights.of(self._section.normalise, counts.tokens_T, counts.rows_T, device)
        if self._section.surgery == "none":
            self.factors_T = self._weighting.weights()
        else:
            on_device = [batch.to(device) for batch in batches]
            where = (self._engine, self._context, on_device, plain)
            self.factors_T = surgery_weights(
                self._section.surgery, *where, self._num_tasks, self._seed + step
            )
        self.factors_T = self.factors_T * guard_T
        return plain.times(self.factors_T)

    def observe(self, step: int, batches: Sequence[Batch], counts: StepCounts, losses_T: np.ndarray) -> None:
        """Let the task weights learn from a step that is done.

        Args:
            step: As `token_weights` was given.
            batches: As well.
            counts: As well.
            losses_T: This rank's summed token losses of each task, of the step's own forward passes.
        """
        if self._section.task_weights == "none":
            return
        before_T = self._mean(losses_T, counts)
        looks = self._weighting.needs_second_look
        after_T = self._mean(self._second_look(step, batches), counts) if looks else None
        self._weighting.observe(before_T, after_T)

    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps."""
        return self._weighting.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._weighting.restore(state)

    def _mean(self, losses_T: np.ndarray, counts: StepCounts) -> np.ndarray:
        """Loss per target token of each task over all ranks; NaN for absent ones."""
        tokens_T = np.where(counts.tokens_T > 0, counts.tokens_T, np.nan)
        return np.asarray(self._engine.topology.sum(losses_T.copy()) / tokens_T)

    def _second_look(self, step: int, batches: Sequence[Batch]) -> np.ndarray:
        """This rank's summed token losses of each task now, with the dropout that the step had."""
        topology, sums_T = self._engine.topology, np.zeros(self._num_tasks)
        seed_step(self._seed, step, topology.rank)
        with torch.no_grad():
            for batch in (batch.to(topology.device) for batch in batches):
                with bind_batch(self._context, batch, "count"):
                    tokens = token_losses(self._engine.module, batch)
                    sums_T += task_sums(tokens, batch, self._num_tasks).numpy()[0]
        return sums_T
