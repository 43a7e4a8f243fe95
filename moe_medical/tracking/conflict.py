"""Which tasks pull the shared parameters apart: cosines between their gradients, and the experts they share.

The cosines come from count-sketches, whose error has a standard deviation of about 1 / sqrt(size) where two
gradients are unrelated. So a pair counts as a conflict below -2 / sqrt(size), which one unrelated pair in 44
passes by chance, and is named only below -4 / sqrt(size), one in 30,000. What the few rows of a probe add is
not in that: rows that have nothing in common bring cosines nearer to 0, so that conflicts are missed rather
than made up.

PCGrad (Yu et al. 2020) calls a pair with a negative cosine a conflict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from moe_medical.tracking.routing_stats import RoutingStats

FALSE_RATE = 0.5 * math.erfc(2 / math.sqrt(2))
"""Share of unrelated pairs that pass as conflicts: a normal error below -2 standard deviations."""
_SHARED = 1.5
"""Of an expert's even share: what both tasks must exceed to share it."""
_NAMED = 3
"""Experts that a sentence names at most, those in most layers."""


class Pair(NamedTuple):
    """Two tasks and the cosine between their gradients."""

    first: str
    second: str
    cosine: float


class SharedExperts(NamedTuple):
    """Two tasks in conflict, and where they meet."""

    first: str
    second: str
    cosine: float
    layers: tuple[str, ...]
    experts: tuple[int, ...]
    """One for each of `layers`; a layer with several shared experts is there several times."""

    def sentence(self) -> str:
        """In plain words, such as `a and b conflict (cosine -0.31) and share expert 3 in layers 12-20`."""
        by_expert: dict[int, list[str]] = {}
        for layer, expert in zip(self.layers, self.experts, strict=True):
            by_expert.setdefault(expert, []).append(layer)
        most = sorted(by_expert, key=lambda e: (-len(by_expert[e]), e))[:_NAMED]
        where = "; ".join(f"expert {e} in {_spans(by_expert[e])}" for e in sorted(most))
        rest = len(by_expert) - len(most)
        more = f"; and {rest} more" if rest else ""
        return f"{self.first} and {self.second} conflict (cosine {self.cosine:.2f}) and share {where}{more}"


@dataclass(frozen=True, eq=False)
class Conflict:
    """Angles between the tasks' gradients at one step."""

    tasks: Sequence[str]
    cosine_TT: np.ndarray
    """NaN where a task has no gradient."""
    norm_T: np.ndarray
    """Of each task's gradient of its mean loss per target token."""
    noise: float
    """Twice the standard error of the cosine of two unrelated gradients; 0 if they were not sketched."""

    @classmethod
    def of(cls, gram_TT: np.ndarray, tasks: Sequence[str], sketch_size: int | None) -> Conflict:
        """From the gradients' inner products.

        Args:
            gram_TT: <g_i, g_j>; zero where a task has no gradient.
            tasks: T names.
            sketch_size: Numbers of a sketch, None for exact products.
        """
        norm_T = np.sqrt(np.maximum(np.diag(gram_TT), 0))
        known_T = np.where(norm_T > 0, norm_T, np.nan)
        cosine_TT = np.clip(gram_TT / np.outer(known_T, known_T), -1, 1)
        return cls(tuple(tasks), cosine_TT, norm_T, 2 / math.sqrt(sketch_size) if sketch_size else 0.0)

    @cached_property
    def pairs(self) -> list[Pair]:
        """All pairs of tasks that have gradients, the worst first."""
        rows, columns = np.triu_indices(len(self.tasks), 1)
        found = zip(rows.tolist(), columns.tolist(), self.cosine_TT[rows, columns], strict=True)
        pairs = [Pair(self.tasks[i], self.tasks[j], float(c)) for i, j, c in found if np.isfinite(c)]
        return sorted(pairs, key=lambda pair: pair.cosine)

    @property
    def conflicts(self) -> list[Pair]:
        """Pairs whose cosine is below what noise explains, as far as their number goes."""
        return [pair for pair in self.pairs if pair.cosine < -self.noise]

    @property
    def strong(self) -> list[Pair]:
        """Pairs sure enough to be named."""
        return [pair for pair in self.pairs if pair.cosine < -2 * self.noise]

    @property
    def worst(self) -> Pair | None:
        return self.pairs[0] if self.pairs else None

    @property
    def rate(self) -> float:
        """Share of pairs in conflict; noise alone makes it `FALSE_RATE`."""
        return len(self.conflicts) / max(len(self.pairs), 1)

    @property
    def mass(self) -> float:
        """Summed |cosine| of the pairs in conflict."""
        return sum(-pair.cosine for pair in self.conflicts)

    def values(self) -> dict[str, float]:
        """Series `conflict/*`; empty with fewer than two gradients."""
        if not self.pairs:
            return {}
        return {
            "conflict/rate": self.rate,
            "conflict/mass": self.mass,
            "conflict/mean_cosine": float(np.mean([pair.cosine for pair in self.pairs])),
            "conflict/worst_cosine": self.pairs[0].cosine,
            "conflict/strong_pairs": float(len(self.strong)),
        }

    def triples(self) -> list[tuple[str, str, float]]:
        """(task, task, cosine) for a heat map, both halves; tasks without a gradient are left out."""
        found = np.argwhere(np.isfinite(self.cosine_TT)).tolist()
        return [(self.tasks[i], self.tasks[j], float(self.cosine_TT[i, j])) for i, j in found]

    def to_json(self, step: int) -> dict[str, Any]:
        """What `conflicts/step-N.json` holds."""
        cosines = [[None if math.isnan(c) else c for c in row] for row in self.cosine_TT.tolist()]
        numbers = {"cosine_TT": cosines, "norm_T": self.norm_T.tolist(), "noise": self.noise}
        return {"step": step, "tasks": list(self.tasks), **numbers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Conflict:
        """What `to_json` gave."""
        cosines, norms = (np.array(data[key], dtype=np.float64) for key in ("cosine_TT", "norm_T"))
        return cls(tuple(data["tasks"]), cosines, norms, float(data["noise"]))


def conflict_overlap(conflict: Conflict, stats: RoutingStats) -> dict[str, float]:
    """Series `router/conflict_overlap`: how much the tasks in conflict use the same experts.

    Mean over pairs in conflict, weighted by |cosine|, of the cosine of their usage of experts: 1 where they
    use the same ones, 0 where they share none or nobody is in conflict. Empty without routed layers.

    Raises:
        ValueError: the two are of other tasks.
    """
    if not len(stats.layers):
        return {}
    overlap_TT = stats.overlap_TT()
    place = _places(conflict, stats)
    found = [(-cosine, overlap_TT[place[a], place[b]]) for a, b, cosine in conflict.conflicts]
    known = [(weight, overlap) for weight, overlap in found if np.isfinite(overlap)]
    mass = sum(weight for weight, _ in known)
    return {"router/conflict_overlap": float(sum(w * o for w, o in known) / mass) if mass else 0.0}


def shared_experts(conflict: Conflict, stats: RoutingStats) -> list[SharedExperts]:
    """Where the pairs that can be named meet, the worst pair first: what explains a seesaw.

    A pair shares an expert to which both give more than 1.5 times its even share.

    Raises:
        ValueError: the two are of other tasks.
    """
    place = _places(conflict, stats)
    used_LTE = np.nan_to_num(stats.usage_LTE) > _SHARED / stats.experts_L[:, None, None]
    found = []
    for first, second, cosine in conflict.strong:
        both = np.argwhere(used_LTE[:, place[first]] & used_LTE[:, place[second]]).tolist()
        if both:
            layers = tuple(stats.layers[i] for i, _ in both)
            found.append(SharedExperts(first, second, cosine, layers, tuple(e for _, e in both)))
    return found


def _places(conflict: Conflict, stats: RoutingStats) -> dict[str, int]:
    if set(conflict.tasks) != set(stats.tasks):
        raise ValueError("conflicts and routing are of other tasks")
    return {name: place for place, name in enumerate(stats.tasks)}


def _spans(layers: Sequence[str]) -> str:
    """`layers 3, 12-20` from the numbers in module names; the names themselves where one has none."""
    found = [re.search(r"\.(\d+)\.", layer) for layer in layers]
    numbers = sorted({int(match[1]) for match in found if match})
    if not all(found):
        return ", ".join(layers)
    spans = [f"{a}-{b}" if b > a else f"{a}" for a, b in _runs(numbers)]
    return f"{'layers' if len(numbers) > 1 else 'layer'} {', '.join(spans)}"


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return zip(starts, ends, strict=True)
