"""The data side of a run: tasks, their mixture, and the micro-batches of every step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.base_model import BaseModel
from moe_medical.config import RunConfig
from moe_medical.config.schema import Batching
from moe_medical.data.batches import BatchShape, Loader, TrainingBatches
from moe_medical.data.chat import ChatFormat
from moe_medical.data.dynamic_mixing import LEAD_STEPS, effective_block
from moe_medical.data.static_mixing import row_limits, spread_caps
from moe_medical.data.tasks import build_plan, cache_tokens, load_tasks, mix_sizes
from moe_medical.distributed.engine import Engine
from moe_medical.distributed.topology import Topology
from moe_medical.evaluation.loss import sequences_of
from moe_medical.evaluation.packing_check import why_not_packed
from moe_medical.planning.sample_sizes import SampleSizes, mixture_sizes, task_sizes

_LOG = logging.getLogger(__name__)


class DataModule:
    """What a run trains on.

    Attributes:
        chat: The base model's token format.
        tasks: In the recipe's order; a task id is a position in it.
        plan: Which sample is which row of which task.

    Raises:
        MoeMedicalError: the recipe, its files or their caps cannot feed the run.
    """

    def __init__(self, config: RunConfig, base: BaseModel) -> None:
        data = config.data
        training = config.training
        self.chat = ChatFormat.from_folder(base.folder, data.system_prompt, data.max_length)
        tasks = load_tasks(data, config.evaluation.split, self.chat)
        self._data = data
        self._training = training
        self.plan = build_plan(tasks, data, config.run.seed, training.steps * training.global_batch)
        samples = self.samples(training.steps)  # fails now, not after hours, if the caps cannot feed the run
        ranks = config.parallel.ranks
        self.tasks = cache_tokens(tasks, samples.tolist(), data.cache, ranks)

    def samples(self, steps: int) -> np.ndarray:
        """Samples of each task in the first `steps` steps, shape (tasks,)."""
        return self.plan.counts(steps * self._training.global_batch)

    def plan_state(self, steps: int) -> dict[str, Any]:
        """What a checkpoint after `steps` steps keeps of the plan: reading on looks at nothing before it."""
        return self.plan.state(steps * self._training.global_batch)

    def batches(self, topology: Topology, batching: Batching) -> TrainingBatches:
        """The micro-batches of this rank."""
        training = self._training
        data = self._data
        shape = BatchShape(
            global_batch=training.global_batch,
            micro_batch=training.micro_batch,
            rank=topology.rank,
            world_size=topology.world_size,
            batching=batching,
            pack_length=data.pack_length or data.max_length,
        )
        return TrainingBatches(self.plan, self.tasks, self.chat, shape)

    def loader(self, batches: TrainingBatches, pin: bool) -> Loader:
        """The same, made ready in the background."""
        return Loader(batches, self._data.workers, self._data.prefetch_steps, pin)

    def sample_sizes(self) -> SampleSizes:
        """How many tokens the samples of the whole run have, estimated."""
        sizes = [task_sizes(task, self.chat) for task in self.tasks]
        return mixture_sizes(sizes, self.samples(self._training.steps).tolist())

    def repeats(self, done: int) -> np.ndarray:
        """Epochs of each task in the first `done` steps, shape (tasks,)."""
        return self.samples(done) / np.array([len(task.train) for task in self.tasks])

    def leave_out(self, frozen_T: np.ndarray, done: int) -> bool:
        """Take tasks out of the mixture from the first block on that nobody can have read ahead.

        Returns:
            False, and all is as it was, where the other tasks are too small to feed the rest of the run.
        """
        size = self._training.global_batch
        block = self._data.mix.block
        first = max(effective_block(done * size, block, LEAD_STEPS, size), self.plan.last_change + 1)
        start = first * block
        weights = self.plan.history[-1][1].copy()
        rest = self._training.steps * size - start
        sizes = mix_sizes(self.tasks, self._data)
        limits = row_limits([s.rows for s in sizes], [s.max_repeats for s in sizes])
        if rest <= 0 or not weights[frozen_T].any():
            return True
        left = np.where(frozen_T, 0, limits - self.plan.counts(start))
        weights[frozen_T] = 0
        if left[weights > 0].astype(float).sum() < rest:
            return False
        self.plan.set_weights(spread_caps(weights, left, rest), from_block=first)
        return True

    def shares(self, done: int) -> dict[str, float]:
        """Share and repeats of each task in the first `done` steps, as series."""
        samples = self.samples(done).tolist()
        named = list(zip(self.tasks, samples, strict=True))
        shares = {f"mix/{task.name}": n / sum(samples) for task, n in named}
        return shares | {f"repeats/{task.name}": n / len(task.train) for task, n in named}


def agreed_batching(wanted: Batching, engine: Engine, context: RoutingContext) -> Batching:
    """`wanted`, or `grouped` where the base model cannot keep packed samples apart.

    Collective: every rank must call. One that cannot is enough: ranks that laid out a step in different
    ways would train on some of its samples twice and on others never.
    """
    if wanted != "packed":
        return wanted
    reason = why_not_packed(
        engine.module,
        engine.topology.device,
        lambda batch: context.bind(BatchInputs(sequences=sequences_of(batch))),
    )
    if not engine.topology.sum(np.array([reason is not None]))[0]:
        return wanted
    if reason is not None or engine.topology.is_main:
        reason = reason or "another rank cannot keep samples apart"
        _LOG.warning("data.batching: grouped instead of packed, for %s", reason)
    return "grouped"
