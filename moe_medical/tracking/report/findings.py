"""What the numbers of a run say: where each task stands, who paid when, and how two runs differ.

Every change of a loss is relative, positive for the better, and counts beyond the gate of `SeesawTracker`,
which is the only one that knows what noise may do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from moe_medical.config.schema import SeesawSection
from moe_medical.tracking.conflict import Conflict
from moe_medical.tracking.report.record import EvaluationPoint, Floats, RunRecord
from moe_medical.tracking.routing_stats import RoutingStats
from moe_medical.tracking.seesaw import SeesawTracker

Verdict = Literal["better", "worse", "within noise", ""]
_ROUTING_LOOKS = 10
"""Looks that are added up: one step alone need not have every task."""
NAN = float("nan")


class Change(NamedTuple):
    """Of a task's loss, relative to what it was."""

    delta: float
    """Positive is better; NaN where the two cannot be compared."""
    gate: float
    """What noise alone may do."""

    @property
    def beyond(self) -> float:
        """What is left of the change outside the gate."""
        return math.copysign(max(0.0, abs(self.delta) - self.gate), self.delta)

    @property
    def verdict(self) -> Verdict:
        if not math.isfinite(self.delta):
            return ""
        return "within noise" if not self.beyond else "better" if self.delta > 0 else "worse"


def changes(before: EvaluationPoint, after: EvaluationPoint, section: SeesawSection) -> dict[str, Change]:
    """Task -> its change from one evaluation to another, of one run or of two."""
    tasks = [task for task in before.tasks if task in after.tasks]
    tracker = SeesawTracker(tasks, section)
    tracker.update({task: before.tasks[task] for task in tasks})
    step = tracker.update({task: after.tasks[task] for task in tasks})
    return dict(zip(tasks, map(Change, step.delta_T.tolist(), step.gate_T.tolist()), strict=True))


def versus(first: RunRecord, other: RunRecord) -> dict[str, Change]:
    """Task -> what `other` ends with compared with `first`; tasks that both have."""
    if not (first.evaluations and other.evaluations):
        return {}
    return changes(first.evaluations[-1], other.evaluations[-1], first.seesaw)


@dataclass(frozen=True)
class Standing:
    """Where a task stands at the end of a run. Numbers that the run does not have are NaN."""

    task: str
    rows: int | None
    share: float
    repeats: float
    first: float
    best: float
    best_step: int
    last: float
    regret: float
    """(last - best) / best."""
    verdict: Verdict
    """Of the last evaluation against the first."""
    left_best: bool
    """Whether the regret is more than noise."""
    metric: str
    score_before: float
    score: float
    low: float
    high: float
    mtl_gain: float


def standings(run: RunRecord) -> list[Standing]:
    """One per task that was evaluated, the largest share first."""
    if not run.evaluations:
        return []
    last = run.evaluations[-1]
    first = run.evaluations[0]
    whole = changes(first, last, run.seesaw) if len(run.evaluations) > 1 else {}
    end = run.seesaw_steps[-1]
    left = {t for t, r, g in zip(end.tasks, end.regret_T, end.regret_gate_T, strict=True) if r > g}
    named = [task for task in run.tasks if task in last.tasks]
    return [_standing(run, t, whole.get(t, Change(NAN, NAN)).verdict, t in left) for t in named]


def _standing(run: RunRecord, task: str, verdict: Verdict, left_best: bool) -> Standing:
    seen = [(e.step, e.tasks[task]) for e in run.evaluations if task in e.tasks]
    finite = [(step, point) for step, point in seen if math.isfinite(point.loss)] or seen
    best_step, best = min(finite, key=lambda at: at[1].loss)
    scored = [point for _, point in seen if point.score is not None] or [replace(seen[-1][1], score=NAN)]
    last = seen[-1][1].loss
    return Standing(
        task=task,
        rows=run.rows.get(task),
        share=run.curve(f"mix/{task}").last,
        repeats=run.curve(f"repeats/{task}").last,
        first=seen[0][1].loss,
        best=best.loss,
        best_step=best_step,
        last=last,
        regret=(last - best.loss) / best.loss if best.loss > 0 else NAN,
        verdict=verdict,
        left_best=left_best,
        metric=seen[-1][1].metric,
        score_before=_number(scored[0].score),
        score=_number(scored[-1].score),
        low=_number(scored[-1].low),
        high=_number(scored[-1].high),
        mtl_gain=run.curve(f"mtl_gain/{task}").last,
    )


def _number(value: float | None) -> float:
    return NAN if value is None else value


@dataclass(frozen=True)
class Swings:
    """What each task gained or paid from evaluation to evaluation."""

    tasks: list[str]
    """Those that paid most first."""
    steps: list[int]
    """Ends of the intervals."""
    delta_TE: Floats
    """Relative change of the loss; NaN where a task cannot be compared."""
    gate_TE: Floats

    @property
    def beyond_TE(self) -> Floats:
        """What is left of the changes outside the gate."""
        return np.asarray(np.sign(self.delta_TE) * np.maximum(0, np.abs(self.delta_TE) - self.gate_TE))


def swings(run: RunRecord) -> Swings:
    """Over all intervals between two evaluations."""
    steps = run.seesaw_steps[1:]
    shape = (len(run.tasks), len(steps))
    delta_TE = np.array([s.delta_T for s in steps]).T.reshape(shape)
    gate_TE = np.array([s.gate_T for s in steps]).T.reshape(shape)
    found = Swings(run.tasks, [e.step for e in run.evaluations[1:]], delta_TE, gate_TE)
    order = np.argsort(np.nansum(np.minimum(found.beyond_TE, 0), axis=1), kind="stable")
    return Swings([run.tasks[i] for i in order], found.steps, delta_TE[order], gate_TE[order])


def whole_routing(run: RunRecord) -> RoutingStats | None:
    """The last looks added up; None where the run has none."""
    looks = list(run.routings.values())[-_ROUTING_LOOKS:]
    if not looks or not len(looks[-1].layers):
        return None
    last = looks[-1]
    alike = [r.counts_LTE for r in looks if (r.tasks, r.layers) == (last.tasks, last.layers)]
    return replace(last, counts_LTE=np.sum(alike, axis=0))


def conflict_order(look: Conflict) -> list[str]:
    """Tasks such that those that pull together are neighbours; tasks without a gradient are left out."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering

    known = np.flatnonzero(np.isfinite(np.diag(look.cosine_TT))).tolist()
    names = [look.tasks[i] for i in known]
    if len(names) < 3:
        return names
    distances = np.clip(1 - np.nan_to_num(look.cosine_TT[np.ix_(known, known)]), 0, 2)
    condensed = distances[np.triu_indices(len(names), k=1)]
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    return [names[i] for i in leaves_list(tree).tolist()]


def worst_tasks(found: Sequence[Standing], share: float) -> list[Standing]:
    """The tasks with the highest losses, `share` of all but at least one."""
    known = sorted((s for s in found if math.isfinite(s.last)), key=lambda s: -s.last)
    return known[: max(1, math.ceil(share * len(known)))]
