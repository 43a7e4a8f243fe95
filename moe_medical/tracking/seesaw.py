"""The seesaw, live: what each task won and lost between evaluations, and who paid for whom.

With l_i the evaluation loss of task i on a fixed probe set, per evaluation and with equal task weights w:

    delta_i   = (l_i' - l_i) / l_i'                     l_i' the evaluation before; positive is better
    gate_i    = max(section.gate, 2 SE_i / l_i')        SE_i from the paired losses of the probe rows
    gain    G = sum_i w max(0, delta_i - gate_i)        regress R = sum_i w max(0, -delta_i - gate_i)
    index   S = 2 min(G, R) / (G + R)                   0: all move one way; 1: every gain is paid in full
    paid      = min(1, R / G)

Decisions (simulated: 24 tasks of 64 probe rows, 10 evaluations):
- Two standard errors let one task in 44 through in each direction, so noise alone reads as a seesaw of tiny
  gains, paid in full: S = .10 per evaluation and .71 over the window. In S and paid, G and R therefore count
  only above what noise alone gives them, mean + 3 standard deviations of such a sum for normal noise; then
  both are .00. G and R are told as they are: show R beside S.
- Window: gated steps that are summed do not show slow drift, as every step stays below its gate. A task's
  part is the larger of the sum of its steps, which shows what swings to and fro, and of its whole way since
  the evaluation `window` before, gated by the paired error of those two. Half of the tasks 0.1 % better and
  half worse per evaluation, paired noise 0.3 %: the sums are .0004 each, noise alone .0003; the ways are
  .0020, noise alone .00003, and S over the window .89.
- Regret is against the best evaluation so far, gated by the paired error between that one and now. The best
  is a minimum of noisy values: on a plateau noise alone lifts one task in five above its gate, one in 1000
  above twice its gate, none above three times it.
- A task whose loss is not finite is left out of that evaluation; the next is compared with its last finite
  one. Probe rows that differ in number or tokens are another probe set: the task starts anew.
- Everything follows from the evaluations in order. A resumed run feeds those on disk again, so a checkpoint
  needs nothing; `state` is for those whose evaluations are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_medical.config.schema import SeesawSection
from moe_medical.tracking.reference import SOLVED, Reference
from moe_medical.tracking.task_track import Move, Probed, TaskTrack, measured

Floats = NDArray[np.float64]

_NOISE_MEAN = 0.00849
_NOISE_DEVIATION = 0.0760
"""Of max(0, z - 2) for a standard normal z: what passes a gate of two standard errors by chance."""


@dataclass(frozen=True)
class Balance:
    """Gain and regress of the tasks over some time."""

    gain: float = 0.0
    """Mean over the tasks of what their losses fell beyond their gates, relative."""
    regress: float = 0.0
    """The same of what they rose."""
    noise: float = 0.0
    """What either may be by noise alone."""

    @property
    def index(self) -> float:
        """Seesaw index in [0, 1]: 0 = all move one way, 1 = every gain is paid in full."""
        gain, regress = self._beyond_noise
        return 2 * min(gain, regress) / (gain + regress) if gain + regress > 0 else 0.0

    @property
    def paid(self) -> float:
        """Share of the gain that others paid for, in [0, 1]; 0 without a gain."""
        gain, regress = self._beyond_noise
        return min(1.0, regress / gain) if gain > 0 else 0.0

    @property
    def _beyond_noise(self) -> tuple[float, float]:
        return self.gain * (self.gain > self.noise), self.regress * (self.regress > self.noise)


@dataclass(frozen=True)
class SeesawStep:
    """One evaluation against those before. Arrays are of shape (tasks,), with NaN for what is not known."""

    tasks: tuple[str, ...]
    loss_T: Floats
    """Nats per target token."""
    before_T: Floats
    """Loss at the previous evaluation."""
    delta_T: Floats
    """Relative improvement since the previous evaluation; positive is better."""
    gate_T: Floats
    """Change of that which noise alone may make."""
    regret_T: Floats
    """(loss - best) / best, of the best evaluation so far: 0 or above."""
    regret_gate_T: Floats
    """Regret that noise alone may make."""
    since_best_T: Floats
    """Evaluations since the best one."""
    mtl_gain_T: Floats
    """Relative improvement over the single-task reference."""
    step: Balance
    """Since the previous evaluation."""
    window: Balance
    """Over the last evaluations."""
    broken: tuple[str, ...]
    """Tasks whose loss is not finite."""
    gate: float = 0.0
    """Least relative change that counts."""
    worst: float = 0.25
    """Share of the tasks behind `worst_loss`."""

    @cached_property
    def is_first(self) -> bool:
        """Whether no task could be compared with an earlier evaluation."""
        return not np.isfinite(self.delta_T).any()

    @property
    def gain_noise_T(self) -> Floats:
        """The gate in nats per target token: what noise alone may take from `before_T`."""
        return self.gate_T * np.fmax(self.before_T, SOLVED)

    @property
    def worst_loss(self) -> float:
        """Mean loss of the worst share of the tasks, at least one; NaN if none is finite."""
        losses = np.sort(self.loss_T[np.isfinite(self.loss_T)])
        return float(losses[-math.ceil(len(losses) * self.worst) :].mean()) if len(losses) else math.nan

    @property
    def regressed(self) -> tuple[str, ...]:
        """Tasks worse than at the previous evaluation by more than their gate; by noise alone one in 44."""
        return self._named(-self.delta_T > self.gate_T)

    @property
    def alarms(self) -> tuple[str, ...]:
        """Tasks whose regret is beyond three times its gate, which noise does not reach: fit for an alert."""
        return self._named(self.regret_T > 3 * self.regret_gate_T)

    def values(self) -> dict[str, float]:
        """The series by name, all finite; of a first evaluation the worst loss and what a reference gives."""
        values = {"seesaw/worst_loss": self.worst_loss, **self._against_reference()}
        if not self.is_first:
            values |= self._movement() | self._regrets()
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def table(self) -> tuple[list[str], list[list[str | float | None]]]:
        """(columns, a row per task); None where there is nothing to tell."""
        names = ["loss", "before", "delta", "gate", "regret", "regret_gate", "since_best", "mtl_gain"]
        columns = np.stack([getattr(self, f"{name}_T") for name in names], axis=1)
        rows = [
            [task, *(value if math.isfinite(value) else None for value in row)]
            for task, row in zip(self.tasks, columns.tolist(), strict=True)
        ]
        return ["task", *names], rows

    def _movement(self) -> dict[str, float]:
        values = {"regressed_tasks": float(len(self.regressed))}
        for prefix, balance in (("", self.step), ("window_", self.window)):
            for name in ("index", "paid", "gain", "regress"):
                values[prefix + name] = getattr(balance, name)
        return {f"seesaw/{name}": value for name, value in values.items()}

    def _regrets(self) -> dict[str, float]:
        regret = self.regret_T[np.isfinite(self.regret_T)]
        values = {f"regret/{t}": float(v) for t, v in zip(self.tasks, self.regret_T, strict=True)}
        if len(regret):
            values["seesaw/regret_mean"] = float(regret.mean())
            values["seesaw/regret_max"] = float(regret.max())
            values["seesaw/regret_tasks"] = float((self.regret_T > self.regret_gate_T).sum())
        return values

    def _against_reference(self) -> dict[str, float]:
        values = {f"mtl_gain/{t}": float(v) for t, v in zip(self.tasks, self.mtl_gain_T, strict=True)}
        gain = self.mtl_gain_T[np.isfinite(self.mtl_gain_T)]
        if len(gain):
            mean = float(gain.mean())
            values["seesaw/delta_m"] = mean
            values["seesaw/negative_transfer"] = float((gain < -self.gate).mean())
            values["seesaw/mtl_gain_variation"] = float(gain.std()) / abs(mean) if mean else math.nan
        return values

    def _named(self, chosen: NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(task for task, is_one in zip(self.tasks, chosen, strict=True) if is_one)


class SeesawTracker:
    """Watches the evaluations of a run.

    Args:
        tasks: Their names, in the order of every array.
        section: `tracking.seesaw`.
        reference: Single-task losses, if there are any.
    """

    def __init__(
        self, tasks: Sequence[str], section: SeesawSection, reference: Reference | None = None
    ) -> None:
        self._tasks = tuple(tasks)
        self._section = section
        self._reference = reference
        self._tracks = {task: TaskTrack(section.gate, section.window) for task in tasks}

    def update(self, probes: Mapping[str, Probed]) -> SeesawStep:
        """Take in the next evaluation: the probe rows of each task. A task that is not there has none."""
        now = [measured(probes.get(task)) for task in self._tasks]
        seen = [track.add(probe) for track, probe in zip(self._tracks.values(), now, strict=True)]
        loss_T = _row(math.nan if probe is None else probe.loss for probe in now)
        return SeesawStep(
            tasks=self._tasks,
            loss_T=loss_T,
            before_T=_row(s.step.before for s in seen),
            delta_T=_row(s.step.value for s in seen),
            gate_T=_row(s.step.gate for s in seen),
            regret_T=_row(abs(s.regret.value) for s in seen),
            regret_gate_T=_row(s.regret.gate for s in seen),
            since_best_T=_row(s.since_best for s in seen),
            mtl_gain_T=self._mtl_gains(loss_T),
            step=_balance([s.move for s in seen if s.move]),
            window=_balance([s.window for s in seen if s.window]),
            broken=tuple(t for t, probe in zip(self._tasks, now, strict=True) if t in probes and not probe),
            gate=self._section.gate,
            worst=self._section.worst,
        )

    def state(self) -> dict[str, Any]:
        """JSON-able; all that the next steps depend on."""
        return {task: track.state() for task, track in self._tracks.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`; a task that it does not know starts anew."""
        for task, track in self._tracks.items():
            if task in state:
                track.load_state(state[task])

    def _mtl_gains(self, loss_T: Floats) -> Floats:
        if self._reference is None:
            return np.full(len(loss_T), math.nan)
        pairs = zip(self._tasks, loss_T.tolist(), strict=True)
        return _row(self._reference.loss_gain(task, loss) for task, loss in pairs)


def _balance(moves: list[Move]) -> Balance:
    if not moves:
        return Balance()
    gain, regress, errors, squares = np.array(moves).T
    noise = _NOISE_MEAN * errors.mean() + 3 * _NOISE_DEVIATION * math.sqrt(squares.sum()) / len(moves)
    return Balance(float(gain.mean()), float(regress.mean()), float(noise))


def _row(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)
