"""The guard on hand-made curves: only what overfits is acted on, once per patience, and with its cause."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from moe_medical.config.schema import GuardSection, SeesawSection
from moe_medical.tracking.seesaw import SeesawTracker
from moe_medical.tracking.task_track import ProbeLosses
from moe_medical.training.callbacks.guard import LEAST_WEIGHT, TaskGuard
from moe_medical.training.run_log import Decision

TASKS = ["small", "large"]
NAN = math.nan


class Run:
    """A tracker and a guard beside it, told an evaluation at a time; `large` improves all the time."""

    def __init__(self, action: str = "reweight", **section: Any) -> None:
        self.section = GuardSection(action=action, **section)  # type: ignore[arg-type]
        self.guard = TaskGuard(self.section, TASKS)
        self.tracker = SeesawTracker(TASKS, SeesawSection(gate=0.008))
        self.step = 0

    def look(
        self, loss: float, train: float, repeats: float = 2.0, large: Sequence[float] | None = None
    ) -> list[Decision]:
        """Evaluation and training loss of `small`; (both, and epochs) of `large`."""
        self.step += 10
        of_large = large or (1 - self.step / 1000, 1 - self.step / 1000, 2.0)
        losses = {"small": loss, "large": of_large[0]}
        seen = self.tracker.update({k: ProbeLosses((10 * v,), 10) for k, v in losses.items()})
        return self.guard.look(self.step, seen, [train, of_large[1]], [repeats, of_large[2]])


OVERFITS = [(1.0, 0.5), (1.05, 0.4), (1.041, 0.3), (1.1, 0.2), (1.2, 0.1)]
"""Evaluation loss and training loss of `small`."""


def decided(run: Run, curve: Sequence[tuple[float, ...]] = OVERFITS) -> list[Decision]:
    return [decision for point in curve for decision in run.look(*point)]


def test_a_task_that_overfits_is_reweighted_with_its_cause() -> None:
    run = Run()
    first = decided(run, OVERFITS[:3])
    assert [d.to_json() for d in first] == [
        {
            "step": 30,
            "action": "reweight",
            "task": "small",
            "cause": "evaluation loss 4.1 % above its best (gate 0.8 %) in 2 evaluations in a row, "
            "training loss 40.0 % lower than around that best, after 2.0 epochs",
            "regret": pytest.approx(0.041),
            "regret_gate": 0.008,
            "evaluations": 2.0,
            "train_loss": 0.3,
            "train_loss_at_best": 0.5,
            "repeats": 2.0,
            "weight": 0.5,
        }
    ]
    json.dumps(first[0].to_json(), allow_nan=False)
    assert run.guard.weight_T.tolist() == [0.5, 1]
    assert run.guard.frozen == ()


CURVES: dict[str, list[tuple[float, ...]]] = {
    "in its first epoch": [(loss, train, 0.99) for loss, train in OVERFITS],
    "training loss rises too": [(1.0, 0.5), (1.05, 0.6), (1.1, 0.7), (1.2, 0.8)],
    "within the gate": [(1.0, 0.5), (1.007, 0.4), (1.005, 0.3), (1.007, 0.2)],
    "back at its best in between": [(1.0, 0.5), (1.1, 0.4), (0.99, 0.3), (1.1, 0.2), (0.98, 0.1)],
    "not trained": [(1.0, NAN), (1.1, NAN), (1.2, NAN)],
    "no loss to look at": [(1.0, 0.5), (NAN, 0.4), (NAN, 0.3)],
}


@pytest.mark.parametrize("case", CURVES)
def test_what_does_not_overfit_is_left_alone(case: str) -> None:
    assert decided(Run(), CURVES[case]) == []


def test_patience_is_counted_in_a_row() -> None:
    curve = [(1.0, 0.5), (1.1, 0.4), (1.1, 0.4), (1.001, 0.4), (1.1, 0.4), (1.1, 0.4), (1.1, 0.4)]
    assert [d.step for d in decided(Run(patience=3), curve)] == [70]
    assert [d.step for d in decided(Run(patience=1), curve)] == [20, 30, 50, 60, 70]


def test_training_loss_may_go_up_and_down_on_its_way() -> None:
    """It is the gap since the best that counts, not each look against the one before."""
    assert len(decided(Run(), [(1.0, 0.5), (1.1, 0.3), (1.1, 0.35)])) == 1


def test_an_evaluation_without_training_in_between_neither_counts_nor_starts_anew() -> None:
    curve = [(1.0, 0.5), (1.1, 0.4), (1.1, NAN), (1.1, 0.3)]
    assert [d.step for d in decided(Run(), curve)] == [40]
    curve = [(1.0, NAN), (1.1, 0.4), (1.2, 0.3), (1.3, 0.2)]  # before the first step nothing is known
    assert [d.step for d in decided(Run(), curve)] == [40]


def test_reweighting_comes_again_with_new_patience_and_ends_at_the_floor() -> None:
    run = Run(factor=0.3)
    curve = [(1.0, 0.5), *[(1.1 + i / 100, 0.4) for i in range(20)]]
    made = decided(run, curve)
    assert [d.step for d in made] == [30, 50, 70]
    assert [d.numbers["weight"] for d in made] == pytest.approx([0.3, 0.09, LEAST_WEIGHT])
    assert run.guard.weight_T.tolist() == [LEAST_WEIGHT, 1]


def test_a_task_is_frozen_once() -> None:
    run = Run("freeze")
    made = decided(run, [(1.0, 0.5), *[(1.1 + i / 100, 0.4) for i in range(8)]])
    assert [(d.action, d.task, d.step) for d in made] == [("freeze", "small", 30)]
    assert run.guard.frozen == ("small",)
    assert run.guard.weight_T.tolist() == [1, 1]


def test_the_last_task_is_not_frozen_but_the_run_stopped() -> None:
    run, made = Run("freeze"), []
    for i, (loss, train) in enumerate(OVERFITS):
        made += run.look(loss, train, large=(1.0 + 0.1 * i, 0.5 - 0.1 * i, 3.0))
    assert [(d.action, d.task, d.step) for d in made] == [
        *(("freeze", "small", 30), ("stop", "large", 30), ("stop", "large", 50))
    ]
    assert run.guard.frozen == ("small",)


def test_a_task_that_takes_no_part_does_not_keep_the_run_going() -> None:
    run, made = Run("freeze"), []
    for loss, train in OVERFITS[:3]:
        made += run.look(loss, train, large=(1.0, NAN, 0.0))
    assert [d.action for d in made] == ["stop"]


def test_stop_and_none() -> None:
    assert [(d.action, d.task) for d in decided(Run("stop"), OVERFITS[:3])] == [("stop", "small")]
    assert decided(Run("none")) == []


@pytest.mark.parametrize("action", ["reweight", "freeze", "stop"])
@pytest.mark.parametrize("cut", range(6))
def test_a_state_goes_on_as_if_nothing_had_happened(action: str, cut: int) -> None:
    curve = [(1.0, NAN), *OVERFITS]
    whole, part = Run(action), Run(action)
    expected = decided(whole, curve)
    made = decided(part, curve[:cut])
    state = json.loads(json.dumps(part.guard.state(), allow_nan=False))
    part.guard = TaskGuard(part.section, TASKS)
    part.guard.load_state(state)
    assert made + decided(part, curve[cut:]) == expected
    assert part.guard.state() == whole.guard.state()
    assert len(expected) > 0


def test_a_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="other tasks"):
        TaskGuard(GuardSection(), ["small"]).load_state(Run().guard.state())
