"""Reads every split of a mixture and measures it.

Decisions: a file that cannot be used is one line of the report and the rest is measured all the same; a split
with too many bad records is read without the limit, so that the report can say which they are. Lengths are
tokens in the chat format of a base model, or characters where none is given. Labels count as closed, and
are shown, only where the kind says so and each stands for several rows: a mistake in a recipe must not spill
text. What is found are values that JSON can hold, and none of them is the text of a record.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_medical.config.schema import DataSection
from moe_medical.console import ProgressLine, progress_line
from moe_medical.data.chat import ChatFormat
from moe_medical.data.hygiene import (
    Comparison,
    Duplicates,
    choose_drops,
    compare,
    find_duplicates,
    find_overlaps,
    leaking_rows,
)
from moe_medical.data.recipe import TaskSpec, load_mixture
from moe_medical.data.sources import Example, Split, load_split, splits_of
from moe_medical.errors import DataError

CLOSED_KINDS = ("classification", "yes_no", "nli", "multiple_choice")
_SHOWN_LABELS = 20
_MOST_LABELS = 200
_ROWS_PER_LABEL = 5
_LABEL_CHARACTERS = 120
_SHOWN_PLACES = 10
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


def check_recipe(recipe: Path, chat: ChatFormat | None, length_limit: int | None) -> CheckReport:
    """Check the data of a mixture.

    Args:
        recipe: Its YAML.
        chat: Counts tokens; it must not cut samples off. None counts characters.
        length_limit: Tokens of a sample at most, for the share above it.

    Raises:
        ConfigError: the recipe has problems. Problems of the data are in the report.
    """
    mixture = load_mixture(recipe)
    loaded, errors = _load(mixture.tasks)
    specs = [spec for spec in mixture.tasks if loaded[spec.name]]
    rows = {spec.name: {s: part.examples for s, part in loaded[spec.name].items()} for spec in specs}
    total = sum(len(part) for of in rows.values() for part in of.values())
    with progress_line("compare rows", total, visible=True) as line:
        found = compare(rows, specs, mixture.hygiene.threshold, progress=line.advance)
    with progress_line("measure rows", total, visible=True) as line:
        measure = _Measure(found, _length_of(chat), length_limit, line)
        drops = {task: len(drop.rows) for task, drop in choose_drops(found, mixture.hygiene).items()}
        tasks = [measure.task(spec, loaded[spec.name], drops[spec.name]) for spec in specs]
    leaks, shared = _overlaps(found)
    unit = "characters" if chat is None else "tokens"
    hygiene = asdict(mixture.hygiene)
    return CheckReport(mixture.name, unit, length_limit, hygiene, tasks, leaks, shared, errors)


def _load(specs: Sequence[TaskSpec]) -> tuple[dict[str, dict[str, Split]], list[str]]:
    loaded: dict[str, dict[str, Split]] = {}
    errors: list[str] = []
    with progress_line("read tasks", len(specs), visible=True) as line:
        for spec in specs:
            loaded[spec.name] = {s: part for s in splits_of(spec) if (part := _try_load(spec, s, errors))}
            line.advance(note=spec.name)
    return loaded, errors


def _try_load(spec: TaskSpec, split: str, errors: list[str]) -> Split | None:
    try:
        return load_split(spec, split, DataSection.max_bad_fraction)
    except DataError as e:
        errors.append(str(e))
    try:  # it may have been the limit that stopped it
        return load_split(spec, split, 1.0)
    except DataError:
        return None


def _length_of(chat: ChatFormat | None) -> Callable[[Example], int]:
    if chat is None:
        return lambda example: len(example.prompt) + len(example.target)
    return lambda example: len(chat.encode(example.prompt, example.target).input_ids)


@dataclass(frozen=True)
class _Measure:
    """Turns the splits of tasks into their reports."""

    found: Comparison
    length_of: Callable[[Example], int]
    limit: int | None
    line: ProgressLine

    def task(self, spec: TaskSpec, splits: dict[str, Split], dropped: int) -> TaskReport:
        places: list[str] = []
        reports = {name: self._split(spec, name, part, places) for name, part in splits.items()}
        return TaskReport(
            name=spec.name,
            kind=spec.kind,
            language=spec.language,
            licence=spec.licence,
            phi=spec.phi,
            compared=not spec.image,
            splits=reports,
            labels=_labels(spec, splits["train"].examples) if "train" in splits else None,
            dropped=dropped,
            bad_places=[str(record) for part in splits.values() for record in part.rejected[:_SHOWN_PLACES]],
            places=places,
        )

    def _split(self, spec: TaskSpec, name: str, part: Split, places: list[str]) -> SplitReport:
        rows = self.found.rows_of(spec.name, name)
        repeats = find_duplicates(self.found, rows)
        leaking = leaking_rows(self.found, near=True)[rows]
        places.extend(_places(part, repeats, leaking))
        return SplitReport(
            rows=len(part.examples),
            bad=len(part.rejected),
            lengths=Lengths.of(list(self._lengths(part.examples)), self.limit),
            repeats=Repeats(
                *(int(mask.sum()) for mask in (repeats.exact, repeats.conflicting, repeats.near))
            ),
            leaking=int(leaking.sum()),
            files={file: fingerprint.sha256 for file, fingerprint in part.fingerprints.items()},
        )

    def _lengths(self, rows: Sequence[Example]) -> Iterator[int]:
        for example in rows:
            yield self.length_of(example)
            self.line.advance()


def _places(part: Split, repeats: Duplicates, leaking: np.ndarray) -> list[str]:
    """The first records of every finding of a split, bad ones apart."""
    masks = {
        "equals an earlier row": repeats.exact,
        "equals an earlier row but for the target": repeats.conflicting,
        "nearly equals an earlier row": repeats.near,
        "is in an evaluation split too": leaking,
    }
    return [
        str(record)
        for reason, mask in masks.items()
        for record in part.examples.records(np.flatnonzero(mask)[:_SHOWN_PLACES].tolist(), reason)
    ]


def _labels(spec: TaskSpec, rows: Sequence[Example]) -> Labels | None:
    if spec.kind not in CLOSED_KINDS:
        return None
    counts = Counter(_label(spec.kind, example.target) for example in rows)
    top = counts.most_common()
    largest = top[0][1]
    rarest = top[-1][1]
    return Labels(len(counts), _shown(counts), largest / len(rows), largest / rarest)


def _label(kind: str, target: str) -> str:
    if kind != "multiple_choice":
        return " ".join(target.split())
    # "B", "B. Aspirin", "ACD": only the letters are no text of the record.
    letters = re.match(r"\(?([A-J]{1,10})(?:[).:、]|$)", target.strip())
    return letters[1] if letters else "other"


def _shown(counts: Counter[str]) -> dict[str, int]:
    closed = (
        len(counts) <= _MOST_LABELS
        and counts.total() >= _ROWS_PER_LABEL * len(counts)
        and max(map(len, counts)) <= _LABEL_CHARACTERS
    )
    return {label: n for label, n in counts.most_common(_SHOWN_LABELS) if n > 1} if closed else {}


def _overlaps(found: Comparison) -> tuple[list[Overlap], list[Overlap]]:
    exact = find_overlaps(found, near=False)
    near = find_overlaps(found, near=True)
    leaks = []
    shared = []
    for a, first in enumerate(found.tasks):
        for b, second in enumerate(found.tasks):
            if near.evaluation[a, b]:
                counts = (exact.evaluation[a, b], near.evaluation[a, b], near.leaking[a, b])
                leaks.append(Overlap(first, second, *map(int, counts)))
            if a < b and near.train[a, b]:
                counts = (exact.train[b, a], near.train[b, a], near.train[a, b])
                shared.append(Overlap(first, second, *map(int, counts)))
    return sorted(leaks, key=lambda o: -o.near), sorted(shared, key=lambda o: -o.near)
