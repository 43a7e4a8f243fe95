"""Shares that follow what the run measures: rules as state machines, and when their decisions take effect.

Decisions:
- A decision falls after the first step that completes `every_blocks` blocks more, uses numbers that all
  ranks share, and takes effect at a named block that starts at least LEAD_STEPS steps later. So the order of
  samples stays a pure function of the plan and its weight history, however far a rank reads ahead.
- A rule stays near the static shares p: low * p <= share <= high * p, and within floor and ceiling where p
  is. What one task is given the others lose in proportion, and no later normalisation breaks a bound.
- Rules move shares of what `data.mix.by` counts. The caps come last: a task that would pass `max_repeats`
  before the end is spread over what is left of the run.
- States are JSON of plain numbers. Nothing here is drawn at random.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from moe_medical.config.schema import MAX_PREFETCH_STEPS, DynamicMixSection, MixSection
from moe_medical.data.mixture import MixPlan
from moe_medical.data.static_mixing import (
    Floats,
    TaskSize,
    bounded_shares,
    row_limits,
    spread_caps,
    task_weights,
    units_per_sample,
)

LEAD_STEPS = MAX_PREFETCH_STEPS
"""Steps between a decision and the first sample that it may change."""
_FULL_RATIO = 4.0  # of gains, at which a lead is whole: the base of its logarithm
_TINY = 1e-12  # keeps ratios finite

Needs = Literal["evaluation", "training_loss", "gradients"]


@dataclass(frozen=True)
class Progress:
    """How evaluation losses moved; (tasks,), NaN where unknown. Who measures owns regret and gates."""

    gain_T: Floats
    """What the loss fell since the last decision, nats per token."""
    gain_noise_T: Floats
    """Gain that noise alone may make, nats per token."""
    regret_T: Floats
    """How far the loss is above its best so far, relative to that."""
    regret_gate_T: Floats
    """Regret that noise alone may make."""

    def of(self, tasks: np.ndarray) -> Progress:
        """The part of some tasks."""
        rows = (self.gain_T, self.gain_noise_T, self.regret_T, self.regret_gate_T)
        return Progress(*(np.asarray(row, dtype=np.float64)[tasks] for row in rows))


@dataclass(frozen=True)
class Observation:
    """What a decision looks at, the same on every rank; the rule's `needs` names what must be there."""

    steps: int
    """Optimizer steps done."""
    samples_T: Floats
    """Samples of each task since the last decision."""
    repeats_T: Floats
    """Epochs of each task so far."""
    progress: Progress | None = None
    """At the first decision there is no earlier loss to compare with."""
    train_loss_T: Floats | None = None
    """Mean training loss since the last decision; NaN for a task without a sample."""
    gram_TT: Floats | None = None
    """Inner products of the tasks' gradients."""

    def of(self, tasks: np.ndarray) -> Observation:
        """The part of some tasks."""
        progress = None if self.progress is None else self.progress.of(tasks)
        train = None if self.train_loss_T is None else np.asarray(self.train_loss_T)[tasks]
        gram = None if self.gram_TT is None else np.asarray(self.gram_TT)[np.ix_(tasks, tasks)]
        return Observation(self.steps, self.samples_T[tasks], self.repeats_T[tasks], progress, train, gram)


class DynamicRule(ABC):
    """Observations -> shares. Tasks without a static share stay without one.

    Args:
        shares: (tasks,) the static shares p.
        section: `data.mix.dynamic`.
        names: of the tasks, to recognise a state.
        floor: least share of a task, where p is above it.
        ceiling: largest share of a task, where p is below it.
    """

    needs: ClassVar[Needs]

    def __init__(
        self,
        shares: Floats,
        section: DynamicMixSection,
        names: Sequence[str],
        floor: float = 0.0,
        ceiling: float = 1.0,
    ) -> None:
        self._section = section
        self._names = list(names)
        self._tasks = np.flatnonzero(shares)
        self._static = np.asarray(shares, dtype=np.float64)[self._tasks] / np.sum(shares)
        # floor and ceiling never tighten a bound so far that p itself lies outside of it.
        self._low = np.maximum(section.low * self._static, np.minimum(floor, self._static))
        self._high = np.minimum(section.high * self._static, np.maximum(ceiling, self._static))
        self._memory: dict[str, Floats] = {}

    def decide(self, observation: Observation) -> Floats:
        """The shares from now on, shape (tasks,), summing to 1."""
        shares = np.zeros(len(self._names))
        shares[self._tasks] = bounded_shares(self._wanted(observation.of(self._tasks)), self._low, self._high)
        return shares

    def state(self) -> dict[str, Any]:
        """JSON-able; all that the next decisions depend on."""
        return {"tasks": self._names, "memory": {k: v.tolist() for k, v in self._memory.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`.

        Raises:
            ValueError: the state is of other tasks.
        """
        if state["tasks"] != self._names:
            raise ValueError("the state of the dynamic mixing rule is of other tasks")
        self._memory = {k: np.array(v, dtype=np.float64) for k, v in state["memory"].items()}

    def _smoothed(self, name: str, value: Floats, weight: float) -> Floats:
        """Running mean of `value`, which starts at 0; the newest counts `weight`."""
        mean = (1 - weight) * self._memory.get(name, np.zeros_like(value)) + weight * value
        self._memory[name] = mean
        return mean

    @abstractmethod
    def _wanted(self, seen: Observation) -> Floats:
        """Weights of the tasks with a static share, before the bounds; any scale."""


class RegretRule(DynamicRule):
    """More for tasks that lost what they had, less for tasks that gain nothing: the answer to a seesaw.

    Per task i, with l the evaluation loss, l' the one before and n the samples since:

        regret   r_i and its gate g_i                                   as measured; see `Progress`
        noise    d_i                                                    gain that noise alone may make
        starved  e_i = clip(r_i / g_i - 1, 0, 1)                        none at the gate, all at twice it
        gain     G_i = mean of l'_i - l_i,  N_i = mean of n_i           over the last decisions
        usual    U_i = N_i max(0, sum_j G_j) / sum_j N_j                at the mixture's gain per sample
        lead     a_i = log_4((max(0, G_i) + d_i) / (U_i + d_i)) clipped to [-1, 1]
        signal   u_i = a_i + (1 - a_i) e_i                              -1 for a task that overfits
        push     m_i = s m_i + (1 - s) rate u_i                         s = smoothing
        share    w_i = p_i high^m_i where m_i > 0, else p_i low^-m_i

    So a task that regressed beyond its gate gets more. Those that improve share in proportion to their gain
    per sample: where all are equal, no shift of samples lowers the mean loss. A plateau gives up share while
    others gain, until it regresses or meets the bound; a task with too few samples to show a gain beyond its
    gate is left alone. Regret after an epoch while the training loss falls is overfitting, not starvation.

    The means G and N run with weight w = min(1, 2 (1 - s)); in a_i the noise counts w d_i, as it does in such
    a mean. The rule is damped by its build: all but overfitting is continuous, m is a running mean of a
    bounded signal, and shares go back to p where nothing is measured.
    """

    needs = "evaluation"

    def _wanted(self, seen: Observation) -> Floats:
        progress = seen.progress
        if progress is None:
            raise ValueError("the regret rule needs how evaluation losses moved")
        overfits = self._overfits(seen)  # also where nothing is measured: it keeps a running mean
        measured = np.isfinite(progress.gain_T)
        if "gain" not in self._memory and not measured.any():
            return self._static
        # e_i: none at the gate, all at twice it.
        excess = progress.regret_T / np.maximum(progress.regret_gate_T, _TINY) - 1
        starved = np.where(measured, np.clip(excess, 0, 1), 0)
        lead = np.where(measured, self._lead(progress, seen.samples_T), 0)
        # u_i = a_i + (1 - a_i) e_i: a starved task is pushed up whatever its gain, never beyond 1.
        signal = np.where(overfits & (starved > 0), -1.0, lead + (1 - lead) * starved)
        push = self._smoothed("push", self._section.rate * signal, 1 - self._section.smoothing).clip(-1, 1)
        # high^m at m = 1 and low^-m at m = -1 are the bounds themselves; at 0 both are p.
        return self._static * np.where(push > 0, self._section.high**push, self._section.low**-push)

    def _lead(self, progress: Progress, samples: Floats) -> Floats:
        """How far the gain of each task is ahead of what the mixture's gain per sample would give it."""
        weight = min(1.0, 2 * (1 - self._section.smoothing))
        gain = np.nan_to_num(progress.gain_T)
        mean = self._smoothed("gain", gain, weight)
        seen = self._smoothed("samples", samples, weight)
        # U_i: its part of what all tasks gained, by samples. A mixture that loses sets no pace.
        usual = max(0.0, mean.sum()) / max(seen.sum(), _TINY) * seen
        noise = np.maximum(weight * progress.gain_noise_T, _TINY)
        # Noise on both sides: where gain and pace are within it the ratio is near 1, the lead near 0.
        ratio = (np.maximum(0, mean) + noise) / (usual + noise)
        return np.clip(np.log(ratio) / math.log(_FULL_RATIO), -1, 1)

    def _overfits(self, seen: Observation) -> np.ndarray:
        """Tasks beyond their first epoch whose training loss is below its running mean."""
        if seen.train_loss_T is None:
            return np.zeros(len(self._static), dtype=bool)
        usual = self._memory.get("train_loss", np.zeros(len(self._static)))
        now = np.where(np.isfinite(seen.train_loss_T), seen.train_loss_T, usual)
        keep = self._section.smoothing
        # The first loss is its own mean; from then on s usual + (1 - s) now.
        self._memory["train_loss"] = np.where(usual > 0, keep * usual + (1 - keep) * now, now)
        return (seen.repeats_T >= 1) & (now < usual)


class OdmRule(DynamicRule):
    """Online data mixing (Albalak 2023): EXP3 on the training loss, K tasks, t optimizer steps.

        reward   R_i = s R_i + (1 - s) (l_i / mean l) / pi_i      pi_i = its share since the last decision
        explore  e = min(1 / K, sqrt(log K / (K t)))
        share    pi = (1 - K e) softmax(rate e R) + e

    The paper's reward is l_i; dividing it by the mean frees it from the unit and the stage of the run. Tasks
    of high loss get more, also where it cannot be reduced.
    """

    needs = "training_loss"

    def _wanted(self, seen: Observation) -> Floats:
        if seen.train_loss_T is None:
            raise ValueError("the odm rule needs training losses")
        loss = seen.train_loss_T
        reward = self._memory.get("reward", np.zeros_like(loss))
        measured = np.isfinite(loss) & (seen.samples_T > 0)
        if measured.any():  # the reward of a task that was not sampled stays what it was
            # EXP3's importance weighting: dividing by pi_i makes up for a task that is seldom drawn.
            drawn = np.maximum(seen.samples_T / seen.samples_T.sum(), _TINY)
            now = np.where(measured, loss, 0) / max(loss[measured].mean(), _TINY) / drawn
            keep = self._section.smoothing
            reward = np.where(measured, keep * reward + (1 - keep) * now, reward)
        self._memory["reward"] = reward
        count = len(reward)
        explore = min(1 / count, math.sqrt(math.log(count) / (count * max(1, seen.steps))))
        exponents = self._section.rate * explore * reward
        # softmax, then e of exploration for every task: (1 - K e) softmax + e sums to 1.
        odds = np.exp(exponents - exponents.max())
        return (1 - count * explore) * odds / odds.sum() + explore


class DogeRule(DynamicRule):
    """Gradient alignment (DoGE, Fan 2023): more for tasks whose gradient serves all of them.

        alignment  A_i = s A_i + (1 - s) <g_i, sum_j g_j> / sum_j |g_j|^2
        share      a_i = a_i exp(rate A_i), normalised and bounded

    Dividing by the sum of squares frees the rate from the gradients' scale: orthogonal gradients of one
    length give A_i = 1 / K, equal ones 1.
    """

    needs = "gradients"

    def _wanted(self, seen: Observation) -> Floats:
        if seen.gram_TT is None:
            raise ValueError("the doge rule needs inner products of gradients")
        shares = self._memory.get("shares", self._static)
        norms = np.trace(seen.gram_TT)  # sum_j |g_j|^2
        if np.isfinite(seen.gram_TT).all() and norms > 0:
            alignment = seen.gram_TT.sum(axis=1) / norms  # row sums: <g_i, sum_j g_j>
            aligned = self._smoothed("alignment", alignment, 1 - self._section.smoothing)
            exponents = self._section.rate * aligned
            # The bounded shares are what the next step starts from, else one task's product would run away.
            shares = bounded_shares(shares * np.exp(exponents - exponents.max()), self._low, self._high)
        self._memory["shares"] = shares
        return shares


RULES: dict[str, type[DynamicRule]] = {"regret": RegretRule, "odm": OdmRule, "doge": DogeRule}


def effective_block(done_samples: int, block: int, lead_steps: int, global_batch: int) -> int:
    """First block that starts at least `lead_steps` steps after `done_samples` samples are done."""
    return -(-(done_samples + lead_steps * global_batch) // block)


class DynamicMix:
    """A run's dynamic rule: when it decides, and how that reaches the plan; the same calls on every rank.

    Args:
        rule: Decides.
        plan: Whose weights are changed.
        mix: `data.mix`.
        sizes: The tasks.
        global_batch: Samples of a step.
        num_samples: Length of the run.
        agree: Makes weights that differ in rounding equal on all ranks, those of the main rank.
    """

    def __init__(
        self,
        rule: DynamicRule,
        plan: MixPlan,
        mix: MixSection,
        sizes: Sequence[TaskSize],
        global_batch: int,
        num_samples: int,
        agree: Callable[[Floats], Floats],
    ) -> None:
        self._rule = rule
        self._plan = plan
        self._mix = mix
        self._agree = agree
        self._global_batch = global_batch
        self._num_samples = num_samples
        self._rows = np.array([size.rows for size in sizes])
        self._limits = row_limits([size.rows for size in sizes], [size.max_repeats for size in sizes])
        self._units = units_per_sample(mix, sizes)
        self._decided = 0
        self._given = np.zeros_like(self._rows)

    @property
    def needs(self) -> Needs:
        """What `decide` must be given: `progress`, `train_loss_T` or `gram_TT`."""
        return self._rule.needs

    def due(self, done_steps: int) -> bool:
        """Whether a decision falls after so many steps; never twice for one of them."""
        span = self._mix.dynamic.every_blocks * self._mix.block
        done = done_steps * self._global_batch
        # A step may end anywhere in a block, so what counts is whether it crossed a border.
        crossed = done // span > (done - self._global_batch) // span
        end_block = -(-self._num_samples // self._mix.block)
        return crossed and done_steps > self._decided and self._first_block(done) < end_block

    def decide(
        self,
        done_steps: int,
        progress: Progress | None = None,
        train_loss_T: Floats | None = None,
        gram_TT: Floats | None = None,
    ) -> tuple[int, Floats]:
        """Decide and change the plan; returns the change: (first block, sample weights of shape (tasks,)).

        Arguments as in `Observation`.
        """
        done = done_steps * self._global_batch
        given = self._plan.counts(done)
        since = (given - self._given).astype(np.float64)
        seen = Observation(done_steps, since, given / self._rows, progress, train_loss_T, gram_TT)
        weights = self._rule.decide(seen) / self._units
        first = self._first_block(done)
        # Caps are about what is left of the run once the decision takes effect, not about now.
        start = first * self._mix.block
        left = self._limits - self._plan.counts(start)
        weights = self._agree(spread_caps(weights, left, self._num_samples - start))
        self._plan.set_weights(weights, from_block=first)
        self._decided = done_steps
        self._given = given
        return first, weights

    def state(self) -> dict[str, Any]:
        """JSON-able; a checkpoint keeps it beside `plan.state(sample)`."""
        return {"decided": self._decided, "given": self._given.tolist(), "rule": self._rule.state()}

    def load_state(self, state: Mapping[str, Any], same_plan: bool = True) -> None:
        """Go on from a `state()`, once the plan has been restored.

        Args:
            state: Of the rule.
            same_plan: False where the plan is another one, which has given other samples until now.
        """
        self._rule.load_state(state["rule"])
        self._decided = state["decided"]
        self._given = np.array(state["given"], dtype=np.int64)
        if not same_plan:  # what the old one gave since is not what this one gave
            self._given = self._plan.counts(self._decided * self._global_batch)

    def _first_block(self, done_samples: int) -> int:
        # Two decisions within the lead would name one block; the plan takes one change of a block.
        lead = effective_block(done_samples, self._mix.block, LEAD_STEPS, self._global_batch)
        return max(lead, self._plan.last_change + 1)


def dynamic_mix(
    mix: MixSection,
    sizes: Sequence[TaskSize],
    plan: MixPlan,
    global_batch: int,
    num_samples: int,
    agree: Callable[[Floats], Floats] = lambda weights: weights,
) -> DynamicMix | None:
    """The dynamic rule of a run; None where it has none. Arguments as of `DynamicMix`."""
    if mix.dynamic.rule == "none":
        return None
    names = [size.name for size in sizes]
    shares = task_weights(mix, sizes, num_samples) * units_per_sample(mix, sizes)
    rule = RULES[mix.dynamic.rule](shares / shares.sum(), mix.dynamic, names, mix.floor, mix.ceiling)
    return DynamicMix(rule, plan, mix, sizes, global_batch, num_samples, agree)
