"""A dynamic mixture in a run: what it rests on, and when it decides.

due? -> what the rule needs (an evaluation, the training losses, gradients) -> new shares
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moe_medical.adapters.routing import RoutingContext
from moe_medical.config import RunConfig
from moe_medical.data.dynamic_mixing import DynamicMix, Progress, dynamic_mix
from moe_medical.data.tasks import mix_sizes
from moe_medical.distributed.engine import Engine
from moe_medical.evaluation.evaluate import Evaluation
from moe_medical.tracking.seesaw import SeesawStep, SeesawTracker
from moe_medical.training.callback import Callback
from moe_medical.training.callbacks.task_losses import TaskLosses
from moe_medical.training.data_module import DataModule
from moe_medical.training.run_log import Decision, RunLog
from moe_medical.training.task_gradients import Sketch, probe_batches, probe_gram

_LOG = logging.getLogger(__name__)
READER = "mixture"
"""Its name among the readers of `TaskLosses`."""
_PROBE_ROWS = 8
"""Rows of each task whose gradient counts in a decision."""
_TINY = 1e-9


class Mixing(Callback):
    """The dynamic rule of a run.

    It decides before a step, on what is known then; a decision that rests on losses asks for an evaluation.
    The weights that follow are kept with the plan in each checkpoint, so that a resumed run reads the same
    samples.

    Args:
        config: The run.
        data: Whose plan it changes.
        engine: Collects gradients of the tasks, where the rule needs them.
        context: Of its layers.
        task_losses: Has the training losses since the last decision.
        log: Takes the decisions.
    """

    name = "mixture"

    def __init__(
        self,
        config: RunConfig,
        data: DataModule,
        engine: Engine,
        context: RoutingContext,
        task_losses: TaskLosses,
        log: RunLog,
    ) -> None:
        self._data = data
        self._engine = engine
        self._context = context
        self._task_losses = task_losses
        self._log = log
        mix = config.data.mix
        training = config.training
        sizes = mix_sizes(data.tasks, config.data)
        samples = training.steps * training.global_batch
        # Numbers of all ranks go in, and the main rank's result is everybody's.
        self._rule: DynamicMix | None = dynamic_mix(
            mix, sizes, data.plan, training.global_batch, samples, engine.topology.from_main
        )
        self._rule_name = mix.dynamic.rule
        self._seed = config.run.seed
        self._sketch = Sketch()
        self._micro_batch = training.micro_batch
        self._names = [task.name for task in data.tasks]
        # Not the run's tracker: this one sees the evaluations of decisions only, as gains since the last one.
        self._tracker = SeesawTracker(self._names, replace(config.tracking.seesaw, window=1))
        self._evaluation: Evaluation | None = None

    def wants_evaluation(self, done: int) -> bool:
        return self._rule is not None and self._rule.needs == "evaluation" and self._rule.due(done)

    def after_evaluation(self, evaluation: Evaluation, is_new: bool) -> None:
        self._evaluation = evaluation

    def before_step(self, step: int) -> None:
        """Decide where a decision is due after `step` steps, and was not made yet."""
        rule = self._rule
        if rule is None or not rule.due(step):
            return
        moved = gram_TT = None
        if rule.needs == "evaluation":
            evaluation = self._evaluation
            assert evaluation is not None, "it was asked for"
            assert evaluation.step == step, "it was asked for at this step"
            moved = progress(self._tracker.update(evaluation.tasks))
        if rule.needs == "gradients":
            gram_TT = self._gradients(step)
        before_T = self._data.plan.history[-1][1]
        first, weights = rule.decide(step, moved, self._task_losses.take_mean(READER), gram_TT)
        self._log.decide(self._decision(step, first, before_T, weights / weights.sum(), moved))

    def state(self, done: int) -> dict[str, Any]:
        rule = self._rule.state() if self._rule else None
        return {"plan": self._data.plan_state(done), "rule": rule, "evaluations": self._tracker.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; of changed data, which the user has accepted, only the rule's."""
        restored = True
        try:
            self._data.plan.restore(state["plan"])
        except ValueError as e:
            restored = False
            level = logging.WARNING if self._log.is_main else logging.DEBUG
            _LOG.log(level, "shares start anew: %s", e)
        if self._rule is not None:
            self._rule.load_state(state["rule"], same_plan=restored)
        self._tracker.load_state(state["evaluations"])

    def _decision(
        self, done: int, first: int, before_T: np.ndarray, after_T: np.ndarray, moved: Progress | None
    ) -> Decision:
        """The decision as a sentence: the three shares that change most, and the regret behind them."""
        named = []
        most = np.argsort(-np.abs(np.log((after_T + _TINY) / (before_T + _TINY))), kind="stable")
        for i in most[:3].tolist():
            why = ""
            if moved is not None and np.isfinite([moved.regret_T[i], moved.regret_gate_T[i]]).all():
                regret = 100 * moved.regret_T[i]
                gate = 100 * moved.regret_gate_T[i]
                why = f" (regret {regret:.2f} %, gate {gate:.2f} %)"
            named.append(f"{self._names[i]} {before_T[i]:.4f} -> {after_T[i]:.4f}{why}")
        cause = f"the {self._rule_name} rule, from block {first} on; most changed: {', '.join(named)}"
        shares = {f"mix_next/{n}": float(w) for n, w in zip(self._names, after_T, strict=True)}
        return Decision(done, "mixture", None, cause, shares)

    def _gradients(self, done: int) -> np.ndarray:
        topology = self._engine.topology
        tasks = self._data.tasks
        batches = probe_batches(tasks, self._data.chat, topology, done, _PROBE_ROWS, self._micro_batch)
        seed = self._seed + done * topology.world_size + topology.rank
        return probe_gram(self._engine, self._context, batches, len(tasks), seed, self._sketch)


def progress(seen: SeesawStep) -> Progress:
    """What the tracker saw since the last decision, as a rule is told it."""
    gain_T = seen.before_T - seen.loss_T
    return Progress(gain_T, seen.gain_noise_T, seen.regret_T, seen.regret_gate_T)
