"""Which task used which expert in one step: gate mass by layer, task and expert, over all ranks.

    begin -> each micro-batch: forward -> add (inside its `bind`, before backward) -> total

Each token adds its gates, which sum to 1, whatever the number of its experts: where it has one, that counts
choices; where it has several, a choice that the gate makes little of counts little; and a dense gate, which
chooses every expert every time, can be told from another one.

`add` reads what the layers have recorded of this rank's own tokens. Backward may run the forward again, and
the balance loss one in advance; neither is counted. Nothing waits for the device before `total`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_medical.adapters.model import deciding_layers
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.distributed.engine import Engine
from moe_medical.files import write_json
from moe_medical.tracking.routing_stats import RoutingStats, RoutingWatch
from moe_medical.training.callback import Callback, is_due
from moe_medical.training.run_log import RunLog
from moe_medical.training.step import StepResult


class RoutingCounts:
    """Counts of one step after the other.

    Args:
        engine: Whose layers are counted.
        context: Of its layers.
        num_tasks: T.

    Attributes:
        layers: Names of the routed layers; none where all adapters are plain, and then there is nothing to
            count.
        experts: Of each of them.
    """

    def __init__(self, engine: Engine, context: RoutingContext, num_tasks: int) -> None:
        routed = deciding_layers(engine.module)
        self.layers: Sequence[str] = list(routed)
        self._engine = engine
        self._context = context
        self.experts = [layer.num_experts for layer in routed.values()]
        self._shape = (len(self.layers), num_tasks, max(self.experts, default=0))
        self._mass: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether a step is being counted."""
        return self._mass is not None

    def begin(self) -> None:
        """Start a step at zero."""
        device = self._engine.topology.device
        self._mass = torch.zeros(self._shape, dtype=torch.float64, device=device).flatten()

    @torch.no_grad()
    def add(self) -> None:
        """Count the micro-batch that is bound; call it after its forward and before its backward.

        Raises:
            RuntimeError: no batch with task ids is bound, or `begin` was not called.
        """
        task_ids_BS = self._context.inputs.task_ids_BS
        if task_ids_BS is None or self._mass is None:
            raise RuntimeError("routings are counted between `begin` and `total`, while a batch is bound")
        _, tasks, experts = self._shape
        real_N1 = self._context.inputs.token_mask_T.unsqueeze(1)
        task_N1 = task_ids_BS.reshape(-1, 1)
        for number, name in enumerate(self.layers):
            routing = self._context.record.routings.get(name)
            if routing is not None:
                places_NK = (number * tasks + task_N1) * experts + routing.expert_ids_TK
                self._mass.index_add_(
                    0, places_NK.flatten(), (routing.weights_TK * real_N1).double().flatten()
                )

    def total(self) -> np.ndarray:
        """Sums since `begin` over all ranks; float64, (L, T, E). Collective: every rank must call.

        Raises:
            RuntimeError: `begin` was not called.
        """
        if self._mass is None:
            raise RuntimeError("`total` ends what `begin` has started")
        summed = self._engine.sum(self._mass)
        self._mass = None
        return np.asarray(summed.cpu().numpy().reshape(self._shape))


class Routing(Callback):
    """Counts every `tracking.routing_every_steps`-th step, and the last; one is enough to see who goes where.

    Args:
        config: The run.
        adapters: Its adapter settings.
        tasks: Names.
        engine: Whose layers are counted.
        context: Of its layers.
        log: Takes series, a heat map, alerts and a file.

    Attributes:
        newest: Of the newest step that was counted, on all ranks.
        step: Which that was, as a number of steps done.
    """

    def __init__(
        self,
        config: RunConfig,
        adapters: MoloraConfig,
        tasks: Sequence[str],
        engine: Engine,
        context: RoutingContext,
        log: RunLog,
    ) -> None:
        self._every = config.tracking.routing_every_steps
        self._last = config.training.steps
        self._adapters = adapters
        self._tasks = tasks
        self._log = log
        self._counts = RoutingCounts(engine, context, len(tasks))
        self._watch = RoutingWatch()
        self.newest: RoutingStats | None = None
        self.step = -1

    def start(self, first: int) -> None:
        """Watch again what an earlier part of the run saw: alerts come once."""
        if self._log.is_main:
            folder = self._log.folder
            for path in folder.of_each_step(folder.routing(0)):
                self.newest = RoutingStats.from_json(json.loads(path.read_text(encoding="utf-8")))
                self._watch.look(self.newest)

    def before_step(self, step: int) -> None:
        if self._is_due(step + 1):
            self._counts.begin()

    def after_forward(self) -> None:
        if self._counts.is_open:
            self._counts.add()

    def after_step(self, result: StepResult) -> Mapping[str, float]:
        done = result.done
        if not self._is_due(done):
            return {}
        self.newest = stats = RoutingStats(
            self._counts.total(),
            self._tasks,
            self._counts.layers,
            top_k=self._adapters.active(),
            per_task=self._adapters.router_kind.decides_per == "task",
            experts=self._counts.experts,
        )
        self.step = done
        if self._log.is_main:
            write_json(self._log.folder.routing(done), stats.to_json(done), indent=None)
            self._log.sinks.heat_map("router/task_expert", stats.task_expert(), done)
            for title, text in self._watch.look(stats):
                self._log.alert(title, f"after {done} steps: {text}")
        return stats.values()

    def _is_due(self, done: int) -> bool:
        return bool(self._counts.layers) and is_due(self._every, done, self._last)
