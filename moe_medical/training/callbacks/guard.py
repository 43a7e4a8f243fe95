"""Acts on a task that overfits: reweights it, takes it out of the mixture, or ends the run.

A task overfits at an evaluation when it is beyond its first epoch, its evaluation loss is above its best by
more than noise (the tracker's regret and gate), and its training loss is below what it was around that best.
`patience` such evaluations in a row make a decision, one that is not makes the count start anew; after a
decision it starts anew too.

Decisions:
- Training loss since the last look is compared with the one around the best evaluation, not with the look
  before: means over few samples go up and down, and it is the gap since the best that is overfitting. Without
  a sample since the last look the count stays as it is.
- `reweight` may come again, each time by `factor`, down to LEAST_WEIGHT; a task that is there is left alone.
- `freeze` comes once per task. Where it would leave no task in training, the run is stopped instead.
- The main rank decides and all ranks are told, so that no rank decides by another rounding. Factors of the
  loss and the streaks are in each checkpoint; a frozen task is part of the plan's weight history.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_medical.config import RunConfig
from moe_medical.config.schema import GuardSection
from moe_medical.distributed.topology import Topology
from moe_medical.evaluation.evaluate import Evaluation
from moe_medical.tracking.seesaw import SeesawStep
from moe_medical.training.callback import Callback
from moe_medical.training.callbacks.seesaw import Seesaw
from moe_medical.training.callbacks.task_losses import TaskLosses
from moe_medical.training.data_module import DataModule
from moe_medical.training.run_log import Decision, RunLog
from moe_medical.training.step import TaskFactors

Floats = NDArray[np.float64]
Action = Literal["freeze", "reweight", "stop"]

READER = "guard"
"""Its name among the readers of `TaskLosses`."""

_LOG = logging.getLogger(__name__)

LEAST_WEIGHT = 0.05
"""Loss weight below which no reweighting goes: less would be a freeze that still costs its samples."""


class TaskGuard:
    """Watches for tasks that overfit.

    Args:
        section: `training.guard`.
        tasks: Their names, in the order of every array.
    """

    def __init__(self, section: GuardSection, tasks: Sequence[str]) -> None:
        self._section = section
        self._tasks = list(tasks)
        self._weight_T = np.ones(len(tasks))
        self._frozen_T = np.zeros(len(tasks), dtype=bool)
        self._streak_T = np.zeros(len(tasks), dtype=np.int64)
        self._train_at_best_T = np.full(len(tasks), math.nan)

    @property
    def weight_T(self) -> Floats:
        """Factor of each task's loss: 1, or less once it was reweighted."""
        return self._weight_T.copy()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Tasks that were taken out of the mixture."""
        return tuple(task for task, is_out in zip(self._tasks, self._frozen_T, strict=True) if is_out)

    def look(
        self,
        step: int,
        seen: SeesawStep,
        train_loss_T: Sequence[float] | Floats,
        repeats_T: Sequence[float] | Floats,
    ) -> list[Decision]:
        """Decide after an evaluation. Call it at every one.

        Args:
            step: Optimizer steps done.
            seen: The evaluation.
            train_loss_T: Mean loss per target token since the last look; NaN for a task without a sample.
            repeats_T: Epochs of each task so far.
        """
        if self._section.action == "none":
            return []
        train = np.asarray(train_loss_T, dtype=np.float64)
        repeats = np.asarray(repeats_T, dtype=np.float64)
        self._count(seen, train, repeats)
        decisions = []
        for i in np.flatnonzero((self._streak_T >= self._section.patience) & self._may_act).tolist():
            action = self._act(i, repeats)
            decisions.append(self._decision(step, action, i, seen, train, repeats))
            self._streak_T[i] = 0
        return decisions

    def state(self) -> dict[str, Any]:
        """JSON-able; all that the next decisions depend on."""
        return {
            "tasks": self._tasks,
            "weight": self._weight_T.tolist(),
            "frozen": self._frozen_T.tolist(),
            "streak": self._streak_T.tolist(),
            "train_at_best": [None if math.isnan(v) else v for v in self._train_at_best_T.tolist()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`.

        Raises:
            ValueError: the state is of other tasks.
        """
        if state["tasks"] != self._tasks:
            raise ValueError("the state of the guard is of other tasks")
        self._weight_T = np.array(state["weight"], dtype=np.float64)
        self._frozen_T = np.array(state["frozen"], dtype=bool)
        self._streak_T = np.array(state["streak"], dtype=np.int64)
        self._train_at_best_T = np.array(state["train_at_best"], dtype=np.float64)

    @property
    def _may_act(self) -> NDArray[np.bool_]:
        """Tasks about which there is something left to do."""
        is_light = (self._weight_T <= LEAST_WEIGHT) & (self._section.action == "reweight")
        return ~self._frozen_T & ~is_light

    def _count(self, seen: SeesawStep, train_T: Floats, repeats_T: Floats) -> None:
        """How often in a row each task has overfitted."""
        has_trained = np.isfinite(train_T)
        at_best = seen.since_best_T == 0
        renewed = has_trained & (at_best | np.isnan(self._train_at_best_T))
        self._train_at_best_T = np.where(renewed, train_T, self._train_at_best_T)
        regrets = seen.regret_T > seen.regret_gate_T
        overfits = regrets & (repeats_T >= 1) & (train_T < self._train_at_best_T)
        unknown = ~has_trained | np.isnan(seen.regret_T)
        self._streak_T = np.where(unknown, self._streak_T, np.where(overfits, self._streak_T + 1, 0))

    def _act(self, task: int, repeats_T: Floats) -> Action:
        """What is done about a task, noted."""
        action = self._section.action
        others = (repeats_T > 0) & ~self._frozen_T
        others[task] = False
        if action == "freeze" and others.any():
            self._frozen_T[task] = True
            return "freeze"
        if action == "reweight":
            self._weight_T[task] = max(LEAST_WEIGHT, self._weight_T[task] * self._section.factor)
            return "reweight"
        return "stop"

    def _decision(
        self, step: int, action: Action, task: int, seen: SeesawStep, train_T: Floats, repeats_T: Floats
    ) -> Decision:
        best = self._train_at_best_T[task]
        numbers = {
            "regret": seen.regret_T[task],
            "regret_gate": seen.regret_gate_T[task],
            "evaluations": self._streak_T[task],
            "train_loss": train_T[task],
            "train_loss_at_best": best,
            "repeats": repeats_T[task],
            "weight": self._weight_T[task],
        }
        lower = 100 * (best - train_T[task]) / best
        cause = (
            f"evaluation loss {100 * seen.regret_T[task]:.1f} % above its best "
            f"(gate {100 * seen.regret_gate_T[task]:.1f} %) in {self._streak_T[task]} evaluations in a row, "
            f"training loss {lower:.1f} % lower than around that best, after {repeats_T[task]:.1f} epochs"
        )
        return Decision(step, action, self._tasks[task], cause, {k: float(v) for k, v in numbers.items()})


class Guard(Callback):
    """The guard of a run: carries what `TaskGuard` decides to the loss, the mixture and the loop.

    Args:
        config: The run.
        data: Its mixture, out of which frozen tasks are taken.
        factors: Of the tasks' losses; reweighted tasks have theirs here.
        seesaw: Has the evaluation against those before it.
        task_losses: Has the training losses since the last evaluation.
        topology: This process among all.
        log: Takes the decisions.
    """

    name = "guard"

    def __init__(
        self,
        config: RunConfig,
        data: DataModule,
        factors: TaskFactors,
        seesaw: Seesaw,
        task_losses: TaskLosses,
        topology: Topology,
        log: RunLog,
    ) -> None:
        self._data = data
        self._factors = factors
        self._seesaw = seesaw
        self._task_losses = task_losses
        self._topology = topology
        self._log = log
        self._names = [task.name for task in data.tasks]
        self._last_step = config.training.steps
        self._guard = TaskGuard(config.training.guard, self._names)
        self._probed = -1
        """Step of the newest evaluation that was decided on."""

    def after_evaluation(self, evaluation: Evaluation, is_new: bool) -> None:
        done = evaluation.step
        if done <= self._probed or done == self._last_step:  # what was decided; nothing is left to act on
            return
        self._probed = done
        train_loss_T = self._task_losses.take_mean(READER)
        decisions: list[Decision] = []
        if self._topology.is_main:
            assert self._seesaw.newest is not None, "the seesaw comes before the guard"
            repeats_T = self._data.repeats(done)
            decisions = self._guard.look(done, self._seesaw.newest, train_loss_T, repeats_T)
        frozen_T = self._agree(any(decision.action == "stop" for decision in decisions))
        if frozen_T.any() and not self._data.leave_out(frozen_T, done) and decisions:
            names = [name for name, frozen in zip(self._names, frozen_T, strict=True) if frozen]
            _LOG.warning(
                "%s stay in the mixture: nothing else can feed the rest of the run", ", ".join(names)
            )
        for decision in decisions:
            self._log.decide(decision)

    def state(self, done: int) -> dict[str, Any]:
        return {
            "guard": self._guard.state(),
            "factors": self._factors.guard_T.tolist(),
            "probed": self._probed,
            "stopped": self.ends_run,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._guard.load_state(state["guard"])
        self._factors.guard_T = np.array(state["factors"])
        self._probed = state["probed"]
        self.ends_run = state["stopped"]

    def _agree(self, stop: bool) -> NDArray[np.bool_]:
        """What the main rank has decided, on all ranks; tasks to be left out, (T,). Collective."""
        num_tasks = len(self._names)
        frozen_T = [name in self._guard.frozen for name in self._names]
        agreed = self._topology.from_main(
            np.array([*self._guard.weight_T, *frozen_T, stop], dtype=np.float64)
        )
        self._factors.guard_T = agreed[:num_tasks]
        self.ends_run = bool(agreed[-1])
        return np.asarray(agreed[num_tasks:-1] > 0)
