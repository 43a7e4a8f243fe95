"""Weights of the tasks in the loss that follow the tasks' losses: DWA, uncertainty, FAMO.

Pure state machines on the all-reduced losses of a global step, so that every rank has the same weights and a
checkpoint of JSON numbers brings them back bit for bit:

    weights() -> u_T, mean 1, for the next step;   the step;   observe(losses of the step)

A task's loss is its mean per target token. A task absent from a step has none: NaN, and it keeps its numbers.
Weights multiply the mixture's shares, they do not replace them. Weights must be known before a step's first
backward pass, so that they rest on earlier steps, never on the step itself.

None of them is on by default: tuned fixed weights are hard to beat (Kurin et al. 2022, Xin et al. 2022).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from moe_medical.config.schema import LossSection
from moe_medical.tracking.reference import SOLVED


class TaskWeighting(Protocol):
    """What the trainer needs of a rule.

    Attributes:
        needs_second_look: whether `observe` wants the losses of the same batches after the step too, which
            costs one more forward pass.
    """

    needs_second_look: bool

    def weights(self) -> np.ndarray:
        """u_T of the next step: positive, mean 1, shape (num_tasks,)."""

    def observe(self, losses_T: np.ndarray, after_T: np.ndarray | None = None) -> None:
        """Learn from a step.

        Args:
            losses_T: Loss of each task over all ranks before the update; NaN where the task was absent.
            after_T: The same after the update, on the same batches.
        """

    def state(self) -> dict[str, Any]:
        """JSON values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


def task_weighting(section: LossSection, num_tasks: int) -> TaskWeighting:
    """The rule that the run file names."""
    if section.task_weights == "dwa":
        return DynamicWeightAverage(num_tasks, section.temperature, section.window)
    if section.task_weights == "uncertainty":
        return Uncertainty(num_tasks, section.rate)
    if section.task_weights == "famo":
        return Famo(num_tasks, section.rate)
    return _Rule(num_tasks)


class _Rule:
    """Equal weights; the others keep their numbers in arrays that `state` names."""

    needs_second_look = False
    _kept: tuple[str, ...] = ()

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks

    def weights(self) -> np.ndarray:
        return np.ones(self.num_tasks)

    def observe(self, losses_T: np.ndarray, after_T: np.ndarray | None = None) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in self._kept}

    def restore(self, state: dict[str, Any]) -> None:
        for name in self._kept:
            setattr(self, name, np.array(state[name], dtype=np.float64))


class DynamicWeightAverage(_Rule):
    """DWA, Liu et al. 2019 (arXiv 1803.10704), eq. 7: a task whose loss falls slowly counts more.

        u_i = T softmax_i(r_i / temperature),   r_i = newer_i / older_i

    of the task's mean losses in the last two windows that had it; r_i = 1 until there are two. The paper's
    window is an epoch; here it is a number of steps, since tasks have epochs of their own.

    Args:
        num_tasks: T.
        temperature: Larger is more even; 2 in the paper.
        window: Steps.
    """

    _kept = ("_sum", "_seen", "_steps", "_older", "_newer")

    def __init__(self, num_tasks: int, temperature: float, window: int) -> None:
        super().__init__(num_tasks)
        self._temperature = temperature
        self._window = window
        self._sum = np.zeros(num_tasks)
        self._seen = np.zeros(num_tasks)
        self._steps = np.zeros(())
        # 0: no such window yet
        self._older = np.zeros(num_tasks)
        self._newer = np.zeros(num_tasks)

    def weights(self) -> np.ndarray:
        ratios = np.ones(self.num_tasks)
        np.divide(self._newer, self._older, out=ratios, where=self._older > 0)
        return self.num_tasks * _softmax(ratios / self._temperature)

    def observe(self, losses_T: np.ndarray, after_T: np.ndarray | None = None) -> None:
        present = np.isfinite(losses_T)
        self._sum[present] += losses_T[present]
        self._seen += present
        self._steps = self._steps + 1
        if self._steps < self._window:
            return
        # A task that no step of the window had keeps the two windows that it has.
        seen = self._seen > 0
        self._older[seen] = self._newer[seen]
        self._newer[seen] = np.maximum(self._sum[seen] / self._seen[seen], SOLVED)
        self._sum = np.zeros(self.num_tasks)
        self._seen = np.zeros(self.num_tasks)
        self._steps = np.zeros(())


class Uncertainty(_Rule):
    """Homoscedastic uncertainty, Kendall et al. 2018 (arXiv 1705.07115), with s_i = log sigma_i^2:

        minimise  sum_i  l_i exp(-s_i) / 2 + s_i / 2,   u_i proportional to exp(-s_i)

    Each s_i is a plain number with its own gradient step, d/ds = (1 - l_i exp(-s_i)) / 2, taken when its
    task is present. It settles where exp(s_i) is the task's mean loss, so that u_i tends to 1 / l_i. The
    paper's form for classification, l_i / sigma_i^2 + log sigma_i, only shifts every s_i by log 2, which the
    mean of 1 undoes; that mean also keeps the step from growing as all losses fall.

    Args:
        num_tasks: T.
        rate: Step size of s.
    """

    _kept = ("_log_variance",)

    def __init__(self, num_tasks: int, rate: float) -> None:
        super().__init__(num_tasks)
        self._rate = rate
        self._log_variance = np.zeros(num_tasks)

    def weights(self) -> np.ndarray:
        return self.num_tasks * _softmax(-self._log_variance)

    def observe(self, losses_T: np.ndarray, after_T: np.ndarray | None = None) -> None:
        present = np.isfinite(losses_T)
        # A solved task would draw its s to minus infinity, and all the weight to itself.
        losses = np.maximum(losses_T[present], SOLVED)
        s = self._log_variance[present]
        self._log_variance[present] = s - self._rate * (1 - losses * np.exp(-s)) / 2


class Famo(_Rule):
    """FAMO, Liu et al. 2023 (arXiv 2306.03792): all tasks' log-losses shall fall at one rate.

    With z = softmax(xi) the update follows the gradient of sum_i z_i log l_i, hence

        u_i proportional to z_i / l_i

    and xi descends on sum_i z_i (log l_i before the step - log l_i after it, same batch):

        d/d xi_j = z_j (D_j - sum_i z_i D_i) + decay xi_j,   D_i = log l_i(before) - log l_i(after)

    so that a task which fell less than the others comes to count more. The step on xi is Adam's, as in the
    authors' code: D is of the order of the learning rate, and a plain step would never arrive.

    In a step without some tasks z is the softmax over those present. Unlike the paper's, the l_i of u_i is a
    running mean of earlier steps: this step's is not known yet, and that of one small batch is mostly noise.

    Args:
        num_tasks: T.
        rate: Step size of xi.
    """

    needs_second_look = True
    _kept = ("_xi", "_mean", "_variance", "_steps", "_losses")

    def __init__(self, num_tasks: int, rate: float) -> None:
        super().__init__(num_tasks)
        self._rate = rate
        # loss 0: not seen yet
        self._xi = np.zeros(num_tasks)
        self._losses = np.zeros(num_tasks)
        self._mean, self._variance, self._steps = (np.zeros(num_tasks) for _ in range(3))

    def weights(self) -> np.ndarray:
        seen = self._losses > 0
        if not seen.any():
            return np.ones(self.num_tasks)
        # A task that was not seen yet counts as if its loss were the others' mean.
        losses = np.where(seen, self._losses, self._losses[seen].mean())
        return self.num_tasks * _softmax(self._xi - np.log(losses))

    def observe(self, losses_T: np.ndarray, after_T: np.ndarray | None = None) -> None:
        if after_T is None:
            raise ValueError("FAMO needs the losses after the step too")
        present = np.isfinite(losses_T) & np.isfinite(after_T)
        before, after = (np.maximum(losses[present], SOLVED) for losses in (losses_T, after_T))
        if present.sum() > 1:  # one task alone says nothing about the balance
            z = _softmax(self._xi[present])
            fell = np.log(before) - np.log(after)
            self._descend(present, z * (fell - z @ fell) + _DECAY * self._xi[present])
        known = self._losses[present]
        self._losses[present] = np.where(known > 0, _KEPT * known + (1 - _KEPT) * after, after)

    def _descend(self, present: np.ndarray, gradient: np.ndarray) -> None:
        """Adam on the entries of the tasks present."""
        # Each task has moments and a number of steps of its own, for it is not in every step.
        mean = _BETAS[0] * self._mean[present] + (1 - _BETAS[0]) * gradient
        variance = _BETAS[1] * self._variance[present] + (1 - _BETAS[1]) * gradient**2
        steps = self._steps[present] + 1
        root = np.sqrt(variance / (1 - _BETAS[1] ** steps))
        self._xi[present] -= self._rate * mean / (1 - _BETAS[0] ** steps) / (root + _EPSILON)
        self._mean[present] = mean
        self._variance[present] = variance
        self._steps[present] = steps


_DECAY = 1e-3  # gamma of the paper's algorithm 2
# Adam's usual ones
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_KEPT = 0.9


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())  # the largest is 1: no overflow
    return np.asarray(powers / powers.sum())
