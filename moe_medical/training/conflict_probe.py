"""Looks at the angles between the tasks' gradients while a run trains, without disturbing it.

A few training rows of each task, other ones at each look; a forward and a backward pass of each task without
dropout; a count-sketch of each gradient; sums over the ranks; cosines. Gradients in the making, random
generators and the modules' modes are left as they were, so that a run is the same with and without looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_medical.adapters.routing import RoutingContext
from moe_medical.config import RunConfig
from moe_medical.config.validate_loss import task_gradient_problems
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TaskData
from moe_medical.distributed.engine import Engine
from moe_medical.tracking.conflict import Conflict
from moe_medical.training.task_gradients import Sketch, probe_batches, probe_gram


class ConflictProbe:
    """Looks at one run. Collective: every rank must make the same calls.

    Args:
        config: The run.
        tasks: Whose training rows are looked at.
        chat: Token format.
        engine: Whose trainable parameters count.
        context: Of its layers.

    Attributes:
        reason: Why this run cannot be looked at, None if it can.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: Sequence[TaskData],
        chat: ChatFormat,
        engine: Engine,
        context: RoutingContext,
    ) -> None:
        self._tasks, self._chat, self._engine, self._context = tasks, chat, engine, context
        self._rows, self._micro_batch = config.tracking.conflict_rows, config.training.micro_batch
        self._seed = config.run.seed
        self._sketch = Sketch()
        self.reason = _reason(config, len(tasks))

    def measure(self, done: int) -> Conflict:
        """The angles after `done` steps.

        Raises:
            RuntimeError: there is a `reason` why not.
        """
        if self.reason is not None:
            raise RuntimeError(f"gradients of single tasks cannot be told apart with {self.reason}")
        topology = self._engine.topology
        batches = probe_batches(self._tasks, self._chat, topology, done, self._rows, self._micro_batch)
        with _without_dropout(self._engine.module):
            gram_TT = probe_gram(
                self._engine, self._context, batches, len(self._tasks), self._seed, self._sketch
            )
        return Conflict.of(gram_TT, [task.name for task in self._tasks], self._sketch.size)


def _reason(config: RunConfig, num_tasks: int) -> str | None:
    if num_tasks < 2:
        return "one task alone"
    problem = next(task_gradient_problems(config, "tracking.conflict_every_steps", ""), None)
    return problem.rule.removeprefix("must not be used with ") if problem else None


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all but the blocks themselves, which checkpoint activations in training only."""
    modes = [(module, module.training) for module in model.modules()]
    for module, training in modes:
        module.training = training and isinstance(module, GradientCheckpointingLayer)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
