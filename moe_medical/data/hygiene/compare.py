"""Which rows of a mixture equal or nearly equal which, over all its tasks and splits.

Decisions: rows are streamed once; what stays of a row is a digest of its own text, a digest of its target and
its band keys (a few hundred bytes). Rows of equal own text form a group; only one row of a group is compared
for near-equality. Candidates of the banding are verified by the exact Jaccard similarity of their shingles,
read again, so no pair below the threshold is reported; a pair above it is missed with a chance below 1 %.
Evaluation rows come first, so that a bucket of many copies still pairs its training rows with them.
Tasks of images are there without a match: their rows differ by the image, which is not looked at.
All counts come from sparse incidence matrices (group by task) of one `Comparison`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array, eye_array
from scipy.sparse.csgraph import connected_components

from moe_medical.data.hygiene.minhash import Bands, candidate_pairs
from moe_medical.data.hygiene.own_text import MIN_SHINGLES, SAMPLED_ROWS, OwnText, Words, normalise
from moe_medical.data.recipe import TaskSpec
from moe_medical.data.sources import Example

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
TaskSplits = Mapping[str, Mapping[str, Sequence[Example]]]
"""Task -> split -> its rows."""

TRAIN = "train"
_ORDER = ("test", "validation", TRAIN)
_CHUNK_SHINGLES = 2**17
_KEPT_ROWS = 4096


@dataclass(frozen=True)
class Comparison:
    """What is known of all rows; arrays have one entry per row unless said otherwise."""

    tasks: tuple[str, ...]
    task: Ints
    """Index into `tasks`."""
    split: NDArray[np.str_]
    index: Ints
    """Place of the row in its split."""
    group: Ints
    """Rows of equal own text have the same number, counted from 0."""
    target: Ints
    """Rows of equal normalised target have the same number."""
    near: Ints
    """Pairs of groups that are nearly equal, shape (pairs, 2), first < second."""
    similarity: NDArray[np.float64]
    """Jaccard similarity of each pair."""

    def rows_of(self, task: str, split: str) -> Ints:
        """Numbers of the rows of one split, in its order."""
        return np.flatnonzero((self.task == self.tasks.index(task)) & (self.split == split))


@dataclass(frozen=True)
class Duplicates:
    """Among some rows, for each kind a mask over them. The first row of a group is in none."""

    exact: Mask
    """The own text and the target of an earlier row."""
    conflicting: Mask
    """The own text of an earlier row, and a target that none of those has."""
    near: Mask
    """Nearly the own text, and the target, of an earlier row; not `exact`."""


@dataclass(frozen=True)
class Overlaps:
    """Rows of one task that another task has too; each array is of shape (tasks, tasks)."""

    train: Ints
    """[a, b]: training rows of a that are in the training rows of b; 0 for a = b."""
    evaluation: Ints
    """[a, b]: evaluation rows of b that are in the training rows of a."""
    leaking: Ints
    """[a, b]: training rows of a that are in the evaluation rows of b."""


def compare(
    splits: TaskSplits,
    specs: Sequence[TaskSpec],
    threshold: float,
    near: bool = True,
    progress: Callable[[int], None] = lambda rows: None,
) -> Comparison:
    """Compare every row of every task and split with every other.

    Args:
        splits: Read row by row, and again where rows look alike.
        specs: One for each task of `splits`.
        threshold: Least Jaccard similarity of a near pair, in (0, 1].
        near: Whether to look for near pairs at all.
        progress: Called with the number of rows that were read since.
    """
    rows = _AllRows(splits, specs)
    reading = _Reading(Bands(threshold) if near else None)
    for own, example in rows:
        reading.add(own, example)
        progress(1)
    reading.flush()
    group, first = _number(reading.texts)
    pairs, similarity = _near_pairs(reading, first, threshold, rows.shingles)
    return Comparison(
        tasks=tuple(spec.name for spec in specs),
        task=rows.spread([specs.index(part.spec) for part in rows.parts]).astype(np.int64),
        split=rows.spread([part.split for part in rows.parts]),
        index=np.arange(len(group)) - rows.spread(rows.starts[:-1]),
        group=group,
        target=_number(reading.targets)[0],
        near=np.sort(group[pairs], axis=1),
        similarity=similarity,
    )


def find_duplicates(found: Comparison, rows: Ints) -> Duplicates:
    """Repetition among some rows of one task, mostly `Comparison.rows_of` a split."""
    group = found.group[rows]
    target = found.target[rows]
    both = np.stack([group, target], axis=1)
    _, first, node = np.unique(both, axis=0, return_index=True, return_inverse=True)
    exact = first[node] != np.arange(len(rows))
    _, first_of_group, place = np.unique(group, return_index=True, return_inverse=True)
    conflicting = ~exact & (first_of_group[place] != np.arange(len(rows)))
    joined = _join_near(found.near, both[first])
    # Of joined texts with one target, the first row stays.
    oldest = np.full(joined.max(initial=-1) + 1, len(rows))
    np.minimum.at(oldest, joined, first)
    moved = oldest[joined] != first
    return Duplicates(exact, conflicting, ~exact & moved[node])


def find_overlaps(found: Comparison, near: bool) -> Overlaps:
    """Shared rows between tasks, and between training and evaluation.

    Args:
        near: Whether nearly equal rows count too.
    """
    same = _neighbours(found, near)
    train = _incidence(found, found.split == TRAIN)
    evaluation = _incidence(found, found.split != TRAIN)
    in_train, in_evaluation = ((same @ part > 0).astype(np.int64) for part in (train, evaluation))
    shared = (train.T @ in_train).toarray()
    np.fill_diagonal(shared, 0)
    return Overlaps(
        train=shared,
        evaluation=(in_train.T @ evaluation).toarray(),
        leaking=(train.T @ in_evaluation).toarray(),
    )


def leaking_rows(found: Comparison, near: bool) -> Mask:
    """Mask over all rows: training rows that are in some evaluation split of any task."""
    held_out = np.zeros(_num_groups(found), np.int64)
    held_out[found.group[found.split != TRAIN]] = 1
    reached = (_neighbours(found, near) @ held_out) > 0
    return np.asarray(reached[found.group] & (found.split == TRAIN))


def _neighbours(found: Comparison, near: bool) -> csr_array:
    """Group by group: 1 on the diagonal and, with `near`, for near pairs."""
    groups = _num_groups(found)
    same = eye_array(groups, dtype=np.int64, format="csr")
    if not near or not len(found.near):
        return same
    ones = np.ones(len(found.near), np.int64)
    upper = coo_array((ones, (found.near[:, 0], found.near[:, 1])), shape=(groups, groups)).tocsr()
    return same + upper + upper.T


def _incidence(found: Comparison, rows: Mask) -> csr_array:
    """Group by task: how many of the rows."""
    places = (found.group[rows], found.task[rows])
    ones = np.ones(len(places[0]), np.int64)
    return coo_array((ones, places), shape=(_num_groups(found), len(found.tasks))).tocsr()


def _num_groups(found: Comparison) -> int:
    return int(found.group.max(initial=-1)) + 1


def _join_near(near: Ints, nodes: Ints) -> Ints:
    """Number of the component of each (group, target); near pairs join nodes of one target."""
    places: dict[int, list[int]] = {}
    for node, group in enumerate(nodes[:, 0].tolist()):
        places.setdefault(group, []).append(node)
    edges = [
        (a, b)
        for one, other in near.tolist()
        for a in places.get(one, ())
        for b in places.get(other, ())
        if nodes[a, 1] == nodes[b, 1]
    ]
    ends = np.array(edges, np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


class _Part(NamedTuple):
    spec: TaskSpec
    split: str
    rows: Sequence[Example]
    own: OwnText | None
    """None where rows are not to be compared."""


class _AllRows:
    """The rows of all tasks and splits in one order, evaluation rows first."""

    def __init__(self, splits: TaskSplits, specs: Sequence[TaskSpec]) -> None:
        own = {
            spec.name: OwnText(spec.prompt, _sample(splits[spec.name])) for spec in specs if not spec.image
        }
        self.parts = [
            _Part(spec, split, splits[spec.name][split], own.get(spec.name))
            for split in _ORDER
            for spec in specs
            if split in splits[spec.name]
        ]
        self.starts = np.cumsum([0, *(len(part.rows) for part in self.parts)])

    def __iter__(self) -> Iterator[tuple[OwnText | None, Example]]:
        for part in self.parts:
            for example in part.rows:
                yield part.own, example

    def spread(self, values: Sequence[Any] | Ints) -> NDArray[Any]:
        """One value for each part -> one for each row."""
        return np.repeat(values, np.diff(self.starts))

    def shingles(self, number: int) -> Words:
        """Of the row with this number, which is one to compare."""
        place = int(np.searchsorted(self.starts, number, side="right")) - 1
        part = self.parts[place]
        example = part.rows[number - int(self.starts[place])]
        assert part.own is not None, "only rows to compare have band keys"
        return part.own.shingles(part.own.text(example.prompt))


def _sample(splits: Mapping[str, Sequence[Example]]) -> Iterator[str]:
    """Prompts spread evenly over the rows of a task."""
    total = sum(map(len, splits.values()))
    for rows in splits.values():
        count = -(-len(rows) * min(SAMPLED_ROWS, total) // total) if total else 0
        for i in np.linspace(0, len(rows) - 1, count).astype(int).tolist():
            yield rows[i].prompt


@dataclass
class _Reading:
    """What is kept while rows stream by."""

    bands: Bands | None
    texts: list[bytes] = field(default_factory=list)
    targets: list[bytes] = field(default_factory=list)
    long: list[int] = field(default_factory=list)
    """Rows with enough shingles."""
    keys: list[Words] = field(default_factory=list)
    """Of those, in pieces."""
    _pending: list[Words] = field(default_factory=list)
    _pending_shingles: int = 0

    def add(self, own: OwnText | None, example: Example) -> None:
        # No text has a NUL: this one equals no other.
        text = own.text(example.prompt) if own else f"\0{len(self.texts)}"
        if own and self.bands is not None:
            shingles = own.shingles(text)
            if len(shingles) >= MIN_SHINGLES:
                self.long.append(len(self.texts))
                self._pending.append(shingles)
                self._pending_shingles += len(shingles)
        self.texts.append(_digest(text))
        self.targets.append(_digest(normalise(example.target)))
        if self._pending_shingles > _CHUNK_SHINGLES:
            self.flush()

    def flush(self) -> None:
        if self.bands is not None:
            self.keys.append(self.bands.keys(self._pending))
        self._pending = []
        self._pending_shingles = 0


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _number(digests: Sequence[bytes]) -> tuple[Ints, Ints]:
    """Numbers by order of first appearance, and the first row of each."""
    words = np.frombuffer(b"".join(digests), np.dtype("S16"))
    _, first, inverse = np.unique(words, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[inverse].astype(np.int64), np.sort(first).astype(np.int64)


def _near_pairs(
    reading: _Reading, first: Ints, threshold: float, shingles_of: Callable[[int], Words]
) -> tuple[Ints, NDArray[np.float64]]:
    """Pairs of rows, each the first of its group, with at least the threshold's similarity."""
    if not reading.keys:
        return np.zeros((0, 2), np.int64), np.zeros(0)
    rows = np.array(reading.long, np.int64)
    kept = np.isin(rows, first, assume_unique=True)
    pairs = rows[kept][candidate_pairs(np.concatenate(reading.keys)[kept])]
    read = lru_cache(maxsize=_KEPT_ROWS)(shingles_of)
    similarity = np.array([_jaccard(read(a), read(b)) for a, b in pairs.tolist()], np.float64)
    near = similarity >= threshold
    return pairs[near], similarity[near]


def _jaccard(one: Words, other: Words) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
