"""Micro-F1 of sets: a text states items; hits, predicted and expected items are summed over rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Set

import numpy as np

from moe_medical.evaluation.metric import Answers, Metric, f1
from moe_medical.evaluation.promptcblue import answer_items, answer_shape, full_width
from moe_medical.evaluation.readings import normalise

OTHER = "\0other"  # no normalised type holds a NUL
NOTHING = frozenset({"none", "无"})


def _set_counts(sides: Iterable[tuple[Set[object], Set[object]]]) -> np.ndarray:
    """Hits, predicted and expected items of each row, shape (rows, 3)."""
    rows = [(len(ours & theirs), len(ours), len(theirs)) for ours, theirs in sides]
    return np.array(rows, dtype=np.float64)


def _each(read: Callable[[str], Set[object]]) -> Callable[[Answers], np.ndarray]:
    def measure(answers: Answers) -> np.ndarray:
        rows = zip(answers.predictions, answers.targets, strict=True)
        return _set_counts((read(p), read(t)) for p, t in rows)

    return measure


def _items(text: str) -> set[str]:
    """Items between semicolons or line ends; order and repetition do not count."""
    return {normalise(part) for part in re.split(r"[;\uff1b\n]", text) if part.strip()}


def _entities(text: str) -> set[tuple[str, str]]:
    """(type, mention) pairs of lines "type: mention; mention", or "none".

    A line without a type keeps its mentions, under a type that matches none.
    """
    pairs: set[tuple[str, str]] = set()
    for line in text.splitlines():
        kind, colon, mentions = line.replace("\uff1a", ":").partition(":")
        kind, mentions = (normalise(kind), mentions) if colon else (OTHER, line)
        pairs |= {(kind, mention) for mention in _items(mentions) - NOTHING}
    return pairs


def _promptcblue(answers: Answers, widen: Callable[[str], str], spell: Callable[[str], str]) -> np.ndarray:
    shape = answer_shape(map(widen, answers.targets))

    def stated(text: str, row: int) -> set[tuple[str, ...]]:
        return answer_items(widen(text), shape, answers.options(row), spell)

    rows = enumerate(zip(answers.predictions, answers.targets, strict=True))
    return _set_counts((stated(p, i), stated(t, i)) for i, (p, t) in rows)


def _strict_f1(sums: np.ndarray) -> np.ndarray:
    """0 without a hit, even where nothing was to be found."""
    return np.where(sums[..., 0] > 0, f1(sums), 0.0)


SET_F1 = Metric(_each(_items), f1)
ENTITY_F1 = Metric(_each(_entities), f1)
PROMPTCBLUE_F1 = Metric(lambda answers: _promptcblue(answers, full_width, normalise), f1)
"""Official rules (`promptcblue.py`), but spelling is forgiven, and silence is right where it was."""
PROMPTCBLUE_F1_STRICT = Metric(lambda answers: _promptcblue(answers, str, str), _strict_f1)
"""Official to the letter."""
