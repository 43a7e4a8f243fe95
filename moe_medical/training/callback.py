"""What looks at a run between its steps, and may act on it.

    start -> (evaluation due: after_evaluation) -> before_step -> [after_forward ...] -> after_step -> ...

`Trainer` has one ordered list of them, made in `setup.build_callbacks`. An order matters only where one reads
what another keeps, which it is then given by its constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_medical.evaluation.evaluate import Evaluation
    from moe_medical.training.step import StepResult


class Callback:
    """Does nothing. All ranks call the same ones in the same order: any method may be collective.

    Attributes:
        name: Of its state in the checkpoint; empty where it keeps none.
        ends_run: Whether the run is to end before its next step. The same on all ranks.
    """

    name: str = ""
    ends_run: bool = False

    def start(self, first: int) -> None:
        """The run begins, or goes on, with step `first`; files of an earlier part are those until there."""

    def wants_evaluation(self, done: int) -> bool:
        """Whether an evaluation's losses are needed after `done` steps, beside `evaluation.every_steps`."""
        return False

    def after_evaluation(self, evaluation: Evaluation, is_new: bool) -> None:
        """After an evaluation, which every rank has.

        Args:
            evaluation: Loss and, where they are made, score of each task.
            is_new: False where it was read back from the run's folder, which a resumed run does, so that it
                is logged already.
        """

    def before_step(self, step: int) -> None:
        """Before step `step`, counted from 0: that many are done."""

    def after_forward(self) -> None:
        """Between forward and backward of each micro-batch of a step, while it is bound to the context."""

    def after_step(self, result: StepResult) -> Mapping[str, float]:
        """After the update of a step; the series to log for it, by name. The main rank's count."""
        return {}

    def state(self, done: int) -> Any:
        """What a checkpoint after `done` steps keeps: JSON values. The main rank's are written."""
        return None

    def load_state(self, state: Any) -> None:
        """Go on from what `state` gave; every rank is given it."""


def is_due(every: int, done: int, last: int) -> bool:
    """Whether something that is done every so many steps, and at the last one, is due after `done` steps."""
    return every > 0 and (done % every == 0 or done == last)
