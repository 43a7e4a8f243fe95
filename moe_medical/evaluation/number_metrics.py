"""Correlations of the first number of each text."""

from __future__ import annotations

import numpy as np

from moe_medical.evaluation.metric import Answers, Metric
from moe_medical.evaluation.readings import first_number


def _numbers(answers: Answers) -> np.ndarray:
    """Predicted and expected number of each row, shape (rows, 2); NaN where none was predicted."""
    expected = [first_number(t) for t in answers.targets]
    if None in expected:
        raise ValueError(f"a correlation needs numbers, target {expected.index(None)} has none")
    predicted = [first_number(p) for p in answers.predictions]
    return np.array([predicted, expected], dtype=np.float64).T


def _pearson(numbers: np.ndarray) -> np.ndarray:
    return _correlation(*_sides(numbers))


def _spearman(numbers: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    predicted, expected, defined = _sides(numbers)
    return _correlation(rankdata(predicted, axis=-1), rankdata(expected, axis=-1), defined)


def _sides(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both sides, and whether neither is constant: else there is no correlation, and the score is 0.

    A prediction without a number takes the mean of those with one. Such a row adds nothing to the covariance,
    so it can only pull a Pearson coefficient towards 0: silence earns nothing.
    """
    predicted = numbers[..., 0]
    expected = numbers[..., 1]
    known = ~np.isnan(predicted)
    scale = np.abs(np.where(known, predicted, 0)).max(-1, keepdims=True)
    scaled = np.where(known, predicted, 0) / np.where(scale > 0, scale, 1)  # else squares may overflow
    mean = scaled.sum(-1, keepdims=True) / np.maximum(known.sum(-1, keepdims=True), 1)
    filled = np.where(known, scaled, mean)
    low, high = (np.where(known, scaled, bound) for bound in (np.inf, -np.inf))
    varies = high.max(-1) > low.min(-1)
    return filled, expected, varies & (expected.max(-1) > expected.min(-1))


def _correlation(predicted: np.ndarray, expected: np.ndarray, defined: np.ndarray) -> np.ndarray:
    a, b = (side - side.mean(-1, keepdims=True) for side in (predicted, expected))
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(defined & (norm > 0), (a * b).sum(-1) / np.where(norm > 0, norm, 1), 0.0)


PEARSON = Metric(_numbers, _pearson, by_rows=True)
SPEARMAN = Metric(_numbers, _spearman, by_rows=True)
