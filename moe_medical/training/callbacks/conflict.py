"""The angles between the tasks' gradients while a run trains, probed without disturbing it.

A few training rows of each task, other ones at each probe; a forward and a backward pass of each task without
dropout; a count-sketch of each gradient; sums over the ranks; cosines. Gradients in the making, random
generators and the modules' modes are left as they were, so that a run is the same with and without probes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_medical.adapters.routing import RoutingContext
from moe_medical.config import RunConfig
from moe_medical.config.rules import task_gradient_obstacles
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TaskData
from moe_medical.distributed.engine import Engine
from moe_medical.files import write_json
from moe_medical.tracking.conflict import Conflict, conflict_overlap, shared_experts
from moe_medical.training.callback import Callback, is_due
from moe_medical.training.callbacks.routing import Routing
from moe_medical.training.run_log import RunLog
from moe_medical.training.step import StepResult
from moe_medical.training.task_gradients import Sketch, probe_batches, probe_gram

_LOG = logging.getLogger(__name__)


class ConflictProbe:
    """Probes one run. Collective: every rank must make the same calls.

    Args:
        config: The run.
        tasks: Whose training rows are used.
        chat: Token format.
        engine: Whose trainable parameters count.
        context: Of its layers.

    Attributes:
        reason: Why this run cannot be probed, None if it can.
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: Sequence[TaskData],
        chat: ChatFormat,
        engine: Engine,
        context: RoutingContext,
    ) -> None:
        self._tasks = tasks
        self._chat = chat
        self._engine = engine
        self._context = context
        self._rows = config.tracking.conflict_rows
        self._micro_batch = config.training.micro_batch
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
    return next((obstacle.reason for obstacle in task_gradient_obstacles(config)), None)


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


class Conflicts(Callback):
    """Probes every `tracking.conflict_every_steps`-th step, and the last, where the run can be probed.

    Args:
        config: The run.
        probe: Of the run.
        routing: Says which experts the tasks in conflict share; before this one in the list of callbacks.
        log: Takes series, a heat map and a file.
    """

    def __init__(self, config: RunConfig, probe: ConflictProbe, routing: Routing, log: RunLog) -> None:
        self._every = config.tracking.conflict_every_steps
        self._last = config.training.steps
        self._probe = probe
        self._routing = routing
        self._log = log
        self._newest: Conflict | None = None

    def start(self, first: int) -> None:
        folder = self._log.folder
        if self._log.is_main:
            for path in folder.of_each_step(folder.conflict(0))[-1:]:
                self._newest = Conflict.from_json(json.loads(path.read_text(encoding="utf-8")))
        if self._every and self._probe.reason:
            _LOG.info("no angles between the tasks' gradients with %s", self._probe.reason)

    def after_step(self, result: StepResult) -> Mapping[str, float]:
        done = result.done
        values = dict[str, float]()
        if self._probe.reason is None and is_due(self._every, done, self._last):
            self._newest = conflict = self._probe.measure(done)
            values |= conflict.values()
            if self._log.is_main:
                write_json(self._log.folder.conflict(done), conflict.to_json(done), indent=None)
                self._log.sinks.heat_map("conflict/cosine", conflict.triples(), done)
                for shared in (
                    shared_experts(conflict, self._routing.newest)[:3] if self._routing.newest else ()
                ):
                    _LOG.info("after %d steps %s", done, shared.sentence())
        if self._newest is not None and self._routing.newest is not None and self._routing.step == done:
            values |= conflict_overlap(self._newest, self._routing.newest)
        return values
