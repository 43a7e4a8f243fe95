"""The tasks of a run: recipe + files + token format, ready to be mixed. Torch-free, so a plan is quick."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_medical.config.schema import DataSection, TaskOverride
from moe_medical.data.formats import ChatFormat
from moe_medical.data.mixture import MixPlan
from moe_medical.data.recipe import TaskSpec, load_recipe
from moe_medical.data.rules import MIX_RULES, row_limits, spread_caps
from moe_medical.data.sources import BadRecord, Example, load_split
from moe_medical.errors import ConfigError, DataError, Problem

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """One task with its rows in memory."""

    spec: TaskSpec
    train: list[Example]
    evaluation: list[Example]
    bad: list[BadRecord]
    fingerprints: dict[str, str]
    """File -> sha256 of every file that was read."""
    weight: float
    max_repeats: float | None

    @property
    def name(self) -> str:
        return self.spec.name


def load_tasks(section: DataSection, evaluation_split: str, chat: ChatFormat) -> list[TaskData]:
    """Read the training rows and the evaluation rows of every task of the recipe, in recipe order.

    Raises:
        ConfigError: problems of the recipe or of the run's overrides.
        DataError: unreadable, empty or mostly unusable files.
    """
    specs = load_recipe(Path(section.recipe))
    _check_overrides(section, specs)
    return [_load_task(spec, section, evaluation_split, chat) for spec in specs]


def build_plan(tasks: Sequence[TaskData], section: DataSection, seed: int, num_samples: int) -> MixPlan:
    """The run's order of samples: the mixing rule's shares, the users' weights, the repeat caps.

    A task that its cap would stop before the end gets a smaller share all along, so it is seen to the end.
    """
    sizes = np.array([len(t.train) for t in tasks], dtype=np.int64)
    caps = [t.max_repeats for t in tasks]
    shares = MIX_RULES[section.mix.rule](sizes, section.mix.temperature)
    weights = spread_caps(shares * np.array([t.weight for t in tasks]), row_limits(sizes, caps), num_samples)
    return MixPlan(sizes, weights, section.mix.block, seed, caps)


def _check_overrides(section: DataSection, specs: Sequence[TaskSpec]) -> None:
    known = {s.name for s in specs}
    fix = f"Tasks there: {', '.join(sorted(known))}."
    problems = [
        Problem(f"data.tasks.{name}", f"is not a task of {section.recipe}", fix=fix)
        for name in section.tasks
        if name not in known
    ]
    if all(s.name in section.tasks and section.tasks[s.name].weight == 0 for s in specs):
        problems.append(Problem("data.tasks", "give every task weight 0", fix="Leave one above 0."))
    if problems:
        raise ConfigError("the run file", problems)


def _load_task(spec: TaskSpec, section: DataSection, evaluation_split: str, chat: ChatFormat) -> TaskData:
    train = load_split(spec, "train", section.max_bad_fraction)
    evaluation = load_split(spec, evaluation_split, section.max_bad_fraction)
    override = section.tasks.get(spec.name, TaskOverride())
    caps = (override.max_repeats, spec.max_repeats, section.mix.max_repeats)
    task = TaskData(
        spec=spec,
        train=[e for e in train.examples if chat.fits(e.target)],
        evaluation=[e for e in evaluation.examples if chat.fits(e.target)],
        bad=[*train.bad, *evaluation.bad],
        fingerprints={**train.fingerprints, **evaluation.fingerprints},
        weight=spec.weight * override.weight,
        max_repeats=next((c for c in caps if c is not None), None),
    )
    _report_dropped(task, len(train.examples), len(evaluation.examples), section.max_length)
    return task


def _report_dropped(task: TaskData, train_rows: int, evaluation_rows: int, max_length: int) -> None:
    dropped = train_rows - len(task.train) + evaluation_rows - len(task.evaluation)
    if dropped:
        _LOG.warning(
            "%s: %d rows left out, their target exceeds max_length %d", task.name, dropped, max_length
        )
    if not task.train or not task.evaluation:
        raise DataError(f"{task.spec.path}: no row is left whose target fits data.max_length ({max_length})")
