"""Who gained and who paid: each evaluation against those before it."""

from __future__ import annotations

from moe_medical.config import RunConfig
from moe_medical.data.tasks import TaskData
from moe_medical.evaluation.evaluate import Evaluation
from moe_medical.tracking.reference import load_reference
from moe_medical.tracking.seesaw import SeesawStep, SeesawTracker
from moe_medical.training.callback import Callback
from moe_medical.training.run_log import RunLog


class Seesaw(Callback):
    """Follows the evaluations on the main rank, and logs them.

    It needs no state in a checkpoint: a resumed run reads the evaluations of the earlier part again.

    Args:
        config: The run.
        tasks: Its tasks.
        log: Takes series, a table and alerts.

    Attributes:
        newest: The newest evaluation against those before it; None on other ranks.
    """

    def __init__(self, config: RunConfig, tasks: list[TaskData], log: RunLog) -> None:
        names = [task.name for task in tasks]
        section = config.tracking.seesaw
        reference = load_reference(section.reference, names) if section.reference else None
        self._tracker = SeesawTracker(names, section, reference)
        self._log = log
        self._step = -1
        self._alarmed = frozenset[str]()
        self.newest: SeesawStep | None = None

    def start(self, first: int) -> None:
        if self._log.is_main:
            for evaluation in self._log.folder.evaluations_until(first):
                self._alarmed = frozenset(self._compare(evaluation).alarms)

    def after_evaluation(self, evaluation: Evaluation, is_new: bool) -> None:
        if not self._log.is_main:
            return
        seen = self._compare(evaluation)
        step = evaluation.step
        if not is_new:
            return
        self._log.row(evaluation.values() | seen.values(), step)
        self._log.sinks.table("seesaw/tasks", *seen.table(), step)
        alarmed = frozenset(seen.alarms)
        if new := sorted(alarmed - self._alarmed):  # one alert for each fall, not one at every evaluation
            self._log.alert("task regressed", f"after {step} steps, below their best: {', '.join(new)}")
        self._alarmed = alarmed

    def _compare(self, evaluation: Evaluation) -> SeesawStep:
        """The evaluation against earlier ones; one that was followed already counts once."""
        if evaluation.step > self._step or self.newest is None:
            self._step = evaluation.step
            self.newest = self._tracker.update(evaluation.tasks)
        return self.newest
