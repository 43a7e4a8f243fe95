"""What a check finds, as values that JSON can hold. None of them is the text of a record.

Labels are shown where the task's kind has a closed set of them; `measure.py` makes sure that it is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LENGTH_EDGES = tuple(round(2 ** (i / 2)) for i in range(2, 37))
"""Edges of the histogram's bins, two per doubling."""


@dataclass(frozen=True)
class Lengths:
    """Of the samples of one split: prompt and target together."""

    median: float
    p95: float
    longest: int
    over: float | None
    """Share above the limit; None without a limit."""
    histogram: list[int]
    """Counts between `LENGTH_EDGES`; what lies outside is in the first or the last."""

    @classmethod
    def of(cls, lengths: list[int], limit: int | None) -> Lengths:
        """Of at least one length."""
        values = np.array(lengths)
        over = None if limit is None else float((values > limit).mean())
        inside = values.clip(LENGTH_EDGES[0], LENGTH_EDGES[-1])
        counts = np.histogram(inside, bins=LENGTH_EDGES)[0]
        p95 = float(np.percentile(values, 95))
        return cls(float(np.median(values)), p95, int(values.max()), over, counts.tolist())


@dataclass(frozen=True)
class Labels:
    """Targets of the training rows of a task with a closed set of them."""

    distinct: int
    counts: dict[str, int]
    """The most frequent ones; empty where they are too many or too long to be a closed set."""
    largest_share: float
    imbalance: float
    """Rows of the most frequent label over rows of the rarest."""


@dataclass(frozen=True)
class Repeats:
    """Rows of one split that repeat an earlier one."""

    exact: int
    conflicting: int
    """The same text with another target."""
    near: int


@dataclass(frozen=True)
class SplitReport:
    rows: int
    bad: int
    lengths: Lengths
    repeats: Repeats
    leaking: int
    """Training rows that an evaluation split of any task has too, exactly or nearly; 0 for other splits."""
    files: dict[str, str]
    """File -> sha256."""


@dataclass(frozen=True)
class TaskReport:
    name: str
    kind: str
    language: str
    licence: str
    phi: bool
    compared: bool
    """False for tasks of images, whose rows differ by more than their text."""
    splits: dict[str, SplitReport]
    labels: Labels | None
    dropped: int
    """Training rows that the mixture's `hygiene` drops."""
    bad_places: list[str]
    """The first bad records, as file:line:reason:digest."""
    places: list[str]
    """The first records of every other finding, likewise."""


@dataclass(frozen=True)
class Overlap:
    """Rows that two tasks share; `first` and `second` may be one task."""

    first: str
    second: str
    exact: int
    """Rows of `second`."""
    near: int
    """Rows of `second`, those in `exact` among them."""
    rows_of_first: int
    """Rows of `first` that they are equal or nearly equal to."""


@dataclass(frozen=True)
class CheckReport:
    mixture: str
    length_unit: str
    length_limit: int | None
    hygiene: Mapping[str, Any]
    """The mixture's settings; the threshold is that of every near-duplicate here."""
    tasks: list[TaskReport]
    leaks: list[Overlap]
    """Training rows of `first` against evaluation rows of `second`, most first."""
    shared: list[Overlap]
    """Training rows of two different tasks, most first."""
    errors: list[str]
    """Files that cannot be used."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"length_edges": LENGTH_EDGES}
