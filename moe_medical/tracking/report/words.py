"""What the numbers of a run say, in sentences; each is made from numbers alone and left out without them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moe_medical.tracking.conflict import SharedExperts, shared_experts
from moe_medical.tracking.report.findings import (
    Standing,
    standings,
    versus,
    whole_routing,
    worst_tasks,
)
from moe_medical.tracking.report.record import RunRecord

_NAMED = 5


def summary(run: RunRecord) -> list[str]:
    """Sentences about one run, the most important first."""
    found = standings(run)
    told = [*_progress(run), *_tasks(found), *_seesaw(run), *_regret(found), *_worst(run, found)]
    return [*told, *_reference(found), *_conflicts(run), *_routing(run), *_decisions(run), *_unreadable(run)]


def _progress(run: RunRecord) -> Iterator[str]:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    if not run.ended:
        yield f"The run has not ended: it stands at step {run.last_step:,}{of}, and so do all numbers here."
    if not run.evaluations:
        yield "The run was not evaluated yet: there are no losses on the probe rows."
    elif len(run.evaluations) == 1:
        yield f"The run was evaluated once, at step {run.evaluations[0].step:,}: there is no change to tell."


def _tasks(found: Sequence[Standing]) -> Iterator[str]:
    judged = [s for s in found if s.verdict]
    if judged:
        better, worse = ([s for s in judged if s.verdict == v] for v in ("better", "worse"))
        same = len(judged) - len(better) - len(worse)
        middle = f", {same} stayed within it" if same else ""
        yield (
            f"{len(better)} of {len(judged)} tasks improved from the first to the last evaluation by more "
            f"than noise{middle}; {_count(worse, 'got worse')}"
        )
    broken = [s for s in found if not math.isfinite(s.last)]
    if broken:
        yield f"The last loss is not a finite number for {_count(broken, '')}"


def _count(tasks: Sequence[Standing], what: str) -> str:
    text = f"{len(tasks)} {what}".strip()
    return f"{text}: {named([s.task for s in tasks])}." if tasks else f"{text}."


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _seesaw(run: RunRecord) -> Iterator[str]:
    steps = run.seesaw_steps
    if len(steps) < 2:
        return
    end = steps[-1].window
    window = min(run.seesaw.window, len(steps) - 1)
    over = f"Over the last {window} interval{'s' if window > 1 else ''} between evaluations"
    if not (end.gain > end.noise or end.regress > end.noise):
        yield f"{over} nothing moved by more than noise: the seesaw index is 0."
        return
    yield (
        f"{over} the seesaw index is {end.index:.2f} (0: all move one way, 1: every gain is paid in full): "
        f"the tasks gained {end.gain:.1%} of their loss on average and lost {end.regress:.1%}, "
        f"so {end.paid:.0%} of the gain was paid by others."
    )


def _regret(found: Sequence[Standing]) -> Iterator[str]:
    left = sorted((s for s in found if s.left_best), key=lambda s: -s.regret)
    if left:
        worst = left[0]
        yield (
            f"{len(left)} of {len(found)} tasks ended above their own best by more than noise; farthest is "
            f"{worst.task}, {worst.regret:.1%} above its loss at step {worst.best_step:,}"
            + (f"; then {named([s.task for s in left[1:]])}." if left[1:] else ".")
        )
    elif any(s.verdict for s in found):
        yield "Every task ended at its own best, or within noise of it."


def _worst(run: RunRecord, found: Sequence[Standing]) -> Iterator[str]:
    worst = worst_tasks(found, run.seesaw.worst)
    if len(found) > 3 and worst:
        mean = math.fsum(s.last for s in worst) / len(worst)
        yield (
            f"The worst {run.seesaw.worst:.0%} of the tasks have a mean loss of {mean:.3f}: "
            f"{named([s.task for s in worst])}."
        )


def _reference(found: Sequence[Standing]) -> Iterator[str]:
    known = [s for s in found if math.isfinite(s.mtl_gain)]
    if known:
        negative = sorted((s for s in known if s.mtl_gain < 0), key=lambda s: s.mtl_gain)
        mean = math.fsum(s.mtl_gain for s in known) / len(known)
        yield (
            f"Against a model of its own for each task, the mean gain is {mean:+.1%}; of {len(known)} tasks "
            f"with such a reference, {_count(negative, 'would do better alone')}"
        )


def _conflicts(run: RunRecord) -> Iterator[str]:
    if not run.conflicts:
        return
    step, look = list(run.conflicts.items())[-1]
    if look.pairs:
        text = (
            f"At step {step:,} the gradients of {len(look.conflicts)} of {len(look.pairs)} pairs of tasks "
            "pull apart by more than noise"
        )
        pairs = [f"{p.first} and {p.second} ({p.cosine:.2f})" for p in look.strong[:3]]
        yield f"{text}; most of all {', '.join(pairs)}." if pairs else f"{text}, none beyond doubt."
    yield from (f"{pair.sentence()}." for pair in shared(run)[:1])


def shared(run: RunRecord) -> list[SharedExperts]:
    """Where the tasks in conflict meet; empty where the run did not look at both."""
    stats = whole_routing(run)
    if stats is None or not run.conflicts:
        return []
    look = list(run.conflicts.values())[-1]
    return shared_experts(look, stats) if set(look.tasks) == set(stats.tasks) else []


def _routing(run: RunRecord) -> Iterator[str]:
    stats = whole_routing(run)
    if stats is None:
        return
    dead = int(stats.dead_LE.sum())
    collapsed = int(stats.collapsed_L.sum())
    if dead or collapsed:
        yield (
            f"Routing: {dead} of {stats.experts_L.sum()} experts hardly used; "
            f"{collapsed} of {len(stats.layers)} layers without a real choice of experts."
        )


def _decisions(run: RunRecord) -> Iterator[str]:
    of_tasks = [d for d in run.decisions if d.task]
    changed = len(run.decisions) - len(of_tasks)
    if changed:
        yield f"The mixture was changed {changed} time{'s' if changed > 1 else ''} during the run."
    if of_tasks:
        told = [f"{d.action} {d.task} at step {d.step:,}" for d in of_tasks]
        yield f"{len(of_tasks)} decision{'s' if len(told) > 1 else ''} about single tasks: {named(told)}."


def _unreadable(run: RunRecord) -> Iterator[str]:
    if run.unreadable:
        yield f"{len(run.unreadable)} damaged files of the run were left out: {named(run.unreadable)}."


def comparison(runs: Sequence[RunRecord]) -> list[str]:
    """Sentences about each further run against the first."""
    told = []
    for run in runs[1:]:
        verdicts = {task: change.verdict for task, change in versus(runs[0], run).items() if change.verdict}
        better, worse = ([t for t, v in verdicts.items() if v == what] for what in ("better", "worse"))
        if verdicts:
            told.append(
                f"{run.name} against {runs[0].name}: of {len(verdicts)} tasks {len(better)} end better by "
                f"more than noise{_list(better)}, {len(worse)} worse{_list(worse)}."
            )
        else:
            told.append(
                f"{run.name} and {runs[0].name} have no probe rows in common: no task can be compared."
            )
    return told


def _list(names: Sequence[str]) -> str:
    return f" ({named(names)})" if names else ""
