"""Which training rows a mixture's `hygiene` key leaves out.

Decisions: only training rows are ever dropped. Among duplicates the first row stays, and a row is a duplicate
only if its target is the same too: the same question with another answer says something that the first does
not. An overlap is judged by the text alone, as a test question that was trained on has leaked whatever its
answer was; it counts evaluation rows of every task, because tasks share their sources. The answer depends on
nothing but the rows, the templates, the settings and this code, so it may be kept under `hygiene_key`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from moe_medical.data.hygiene.compare import (
    TRAIN,
    Comparison,
    TaskSplits,
    compare,
    find_duplicates,
    leaking_rows,
)
from moe_medical.data.recipe import HygieneSettings, TaskSpec
from moe_medical.data.store import code_key, content_key

Rows = NDArray[np.int64]

_LOG = logging.getLogger(__name__)
CODE = ("hygiene/compare", "hygiene/drop", "hygiene/minhash", "hygiene/own_text", "recipe")
"""Modules that make the answer."""


@dataclass(frozen=True)
class Drop:
    """Training rows of one task that are left out, and why."""

    rows: Rows
    of: int
    """Training rows before."""
    leaking: int
    duplicates: int
    near_duplicates: int

    def __str__(self) -> str:
        counts = f"{self.duplicates} duplicates, {self.near_duplicates} near-duplicates"
        return f"{self.leaking} in an evaluation split, {counts}"


def needs_comparison(settings: HygieneSettings) -> bool:
    """Whether `rows_to_drop` would drop anything; False spares the reading of all splits."""
    return "drop" in (settings.duplicates, settings.near_duplicates, settings.overlap)


def rows_to_drop(splits: TaskSplits, specs: Sequence[TaskSpec], settings: HygieneSettings) -> dict[str, Rows]:
    """For every task the places of the training rows to leave out, ascending. Logs a line per task.

    Args:
        splits: With `overlap: drop`, all splits that the tasks have, whichever of them the run evaluates on.
        specs: One for each task of `splits`.
        settings: Of the mixture.
    """
    if not needs_comparison(settings):
        return {spec.name: np.zeros(0, np.int64) for spec in specs}
    near = "drop" in (settings.near_duplicates, settings.overlap)
    drops = choose_drops(compare(splits, specs, settings.threshold, near), settings)
    for task, drop in drops.items():
        if len(drop.rows):
            _LOG.info("%s: %d of %d training rows dropped: %s", task, len(drop.rows), drop.of, drop)
    return {task: drop.rows for task, drop in drops.items()}


def choose_drops(found: Comparison, settings: HygieneSettings) -> dict[str, Drop]:
    """What `rows_to_drop` decides, from a comparison that is there already."""
    leaking = leaking_rows(found, near=True)
    return {task: _drop(found, task, settings, leaking) for task in found.tasks}


def hygiene_key(
    content_keys: Mapping[str, Mapping[str, str]], specs: Sequence[TaskSpec], settings: HygieneSettings
) -> str:
    """32 hex digits that change whenever `rows_to_drop` may answer differently.

    Args:
        content_keys: Task -> split -> key of the content of its rows.
        specs: As for `rows_to_drop`.
        settings: As for `rows_to_drop`.
    """
    tasks = [(spec.name, spec.prompt, spec.image) for spec in specs]
    keys = {task: dict(of) for task, of in content_keys.items()}
    return content_key([code_key(*CODE), keys, tasks, asdict(settings)])


def _drop(found: Comparison, task: str, settings: HygieneSettings, leaking: NDArray[np.bool_]) -> Drop:
    rows = found.rows_of(task, TRAIN)
    leaks = leaking[rows] & (settings.overlap == "drop")
    # Among what is left, so that a row does not go for the sake of one that has gone.
    duplicates = find_duplicates(found, rows[~leaks])
    exact = duplicates.exact & (settings.duplicates == "drop")
    near = duplicates.near & (settings.near_duplicates == "drop")
    dropped = leaks.copy()
    dropped[~leaks] = exact | near
    return Drop(np.flatnonzero(dropped), len(rows), int(leaks.sum()), int(exact.sum()), int(near.sum()))
