"""A dynamic mixture in a run: what it is told, and when it decides.

    step done -> due? -> what the rule needs (an evaluation, the training losses, gradients) -> new shares

Decisions use numbers of all ranks, and the main rank's result is everybody's. The weights that follow are
kept with the plan in each checkpoint, so a resumed run reads the same samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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
from moe_medical.training.data_module import Feed
from moe_medical.training.guard import Decision
from moe_medical.training.task_gradients import Sketch, probe_batches, probe_gram

_LOG = logging.getLogger(__name__)
_PROBE_ROWS = 8
"""Rows of each task whose gradient counts in a decision."""
_TINY = 1e-9


class Mixing:
    """The dynamic rule of a run, if it has one. Collective: every rank must make the same calls."""

    def __init__(self, config: RunConfig, feed: Feed, engine: Engine, context: RoutingContext) -> None:
        self._feed, self._engine, self._context, self._seed = feed, engine, context, config.run.seed
        mix, training = config.data.mix, config.training
        sizes, samples = mix_sizes(feed.tasks, config.data), training.steps * training.global_batch
        self._rule: DynamicMix | None = dynamic_mix(
            mix, sizes, feed.plan, training.global_batch, samples, self._agree
        )
        self._sketch, self._micro_batch = Sketch(), training.micro_batch
        self._sums = np.zeros((2, len(feed.tasks)))
        watched = replace(config.tracking.seesaw, window=1)  # the last decision and the best are enough
        self._names, self._name = [task.name for task in feed.tasks], mix.dynamic.rule
        self._tracker = SeesawTracker(self._names, watched)

    def add(self, sums: np.ndarray) -> None:
        """This rank's losses and target tokens of a step, in rows of shape (tasks,)."""
        self._sums += sums[:2]

    def step_done(self, done: int, evaluate: Callable[[], Evaluation]) -> Decision | None:
        """Decide, if a decision is due after `done` steps, and not twice.

        Args:
            done: Steps so far.
            evaluate: The tasks' losses now, where the rule needs them.

        Returns:
            The decision, with the share that each task is going to have as its numbers.
        """
        rule = self._rule
        if rule is None or not rule.due(done):
            return None
        moved = gram_TT = None
        if rule.needs == "evaluation":
            moved = progress(self._tracker.update(evaluate().tasks))
        if rule.needs == "gradients":
            gram_TT = self._gradients(done)
        before_T = self._feed.plan.history[-1][1]
        first, weights = rule.decide(done, moved, self._training_losses(), gram_TT)
        return self._told(done, first, before_T, weights / weights.sum(), moved)

    def _told(
        self, done: int, first: int, before_T: np.ndarray, after_T: np.ndarray, moved: Progress | None
    ) -> Decision:
        """The decision as a sentence: the three shares that change most, and the regret behind them."""
        named, most = [], np.argsort(-np.abs(np.log((after_T + _TINY) / (before_T + _TINY))), kind="stable")
        for i in most[:3].tolist():
            why = ""
            if moved is not None and np.isfinite([moved.regret_T[i], moved.regret_gate_T[i]]).all():
                regret, gate = 100 * moved.regret_T[i], 100 * moved.regret_gate_T[i]
                why = f" (regret {regret:.2f} %, gate {gate:.2f} %)"
            named.append(f"{self._names[i]} {before_T[i]:.4f} -> {after_T[i]:.4f}{why}")
        cause = f"the {self._name} rule, from block {first} on; most changed: {', '.join(named)}"
        shares = {f"mix_next/{n}": float(w) for n, w in zip(self._names, after_T, strict=True)}
        return Decision(done, "mixture", None, cause, shares)

    def state(self, done: int) -> dict[str, Any]:
        """For the checkpoint after `done` steps."""
        total = self._engine.topology.sum(self._sums)
        # From here on the main rank has it all, as a resumed run will.
        self._sums = total if self._engine.topology.is_main else np.zeros_like(total)
        rule = self._rule.state() if self._rule else None
        plan, seen = self._feed.plan_state(done), self._tracker.state()
        return {"plan": plan, "rule": rule, "sums": total.tolist(), "evaluations": seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; of changed data, which the user has accepted, only the rule's."""
        is_main, restored = self._engine.topology.is_main, True
        try:
            self._feed.plan.restore(state["plan"])
        except ValueError as e:
            restored = False
            _LOG.log(logging.WARNING if is_main else logging.DEBUG, "shares start anew: %s", e)
        if self._rule is not None:
            self._rule.load_state(state["rule"], same_plan=restored)
        self._tracker.load_state(state["evaluations"])
        if is_main:
            self._sums = np.array(state["sums"])

    def _training_losses(self) -> np.ndarray:
        """Mean loss per target token of each task since the last decision; NaN where there was no sample."""
        losses, tokens = self._engine.topology.sum(self._sums)
        self._sums[:] = 0
        return np.asarray(losses / np.where(tokens > 0, tokens, np.nan))

    def _agree(self, weights: np.ndarray) -> np.ndarray:
        topology = self._engine.topology
        return topology.sum(weights if topology.is_main else np.zeros_like(weights))

    def _gradients(self, done: int) -> np.ndarray:
        topology, tasks = self._engine.topology, self._feed.tasks
        batches = probe_batches(tasks, self._feed.chat, topology, done, _PROBE_ROWS, self._micro_batch)
        seed = self._seed + done * topology.world_size + topology.rank
        return probe_gram(self._engine, self._context, batches, len(tasks), seed, self._sketch)


def progress(seen: SeesawStep) -> Progress:
    """What the tracker saw since the last decision, as a rule is told it."""
    gain_T = seen.before_T - seen.loss_T
    return Progress(gain_T, seen.gain_noise_T, seen.regret_T, seen.regret_gate_T)
