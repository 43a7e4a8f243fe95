"""What a metric is: a few numbers of each row, and a rule that makes one score of the numbers of many rows.

So a bootstrap sample costs a sum, not another look at the texts: the rule gets all samples at once.
Resamples are drawn from one seed and depend on the number of rows alone, so an interval is the same on any
number of ranks and for any batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_SEED = 20_240_409
_LEVEL = (2.5, 97.5)
"""Percentiles of the 95 % interval."""
_BLOCK_ROWS = 2**21
"""Rows of resamples in memory at a time."""


class Answers(NamedTuple):
    """What is scored, row by row."""

    predictions: Sequence[str]
    targets: Sequence[str]
    language: str = "en"
    choices: Sequence[Sequence[str]] = ()
    """The options of each row; empty where there are none."""

    def options(self, row: int) -> Sequence[str]:
        return self.choices[row] if self.choices else ()


def _always(answers: Answers) -> bool:
    return True


@dataclass(frozen=True)
class Metric:
    """Higher is better; the range is [0, 1], or [-1, 1] for correlations."""

    measure: Callable[[Answers], np.ndarray]
    """Answers -> the numbers of each row, shape (rows, K)."""
    combine: Callable[[np.ndarray], np.ndarray]
    """Their sums over rows, shape (..., K), or with `by_rows` all of them, (..., rows, K) -> scores (...)."""
    by_rows: bool = False
    applies: Callable[[Answers], bool] = _always
    """Whether it means anything for such answers."""

    def score(self, measured_NK: np.ndarray) -> float:
        """The score of all rows."""
        return float(self.combine(measured_NK if self.by_rows else measured_NK.sum(0)))

    def interval(self, measured_NK: np.ndarray, resamples: int) -> tuple[float, float]:
        """95 % interval of the score, by the percentiles of so many bootstrap samples of the rows."""
        blocks = _resampled_rows(len(measured_NK), resamples)
        scores = np.concatenate([self._scores(measured_NK, rows_RN) for rows_RN in blocks])
        low, high = np.percentile(scores, _LEVEL)
        return float(low), float(high)

    def _scores(self, measured_NK: np.ndarray, rows_RN: np.ndarray) -> np.ndarray:
        if self.by_rows:
            return self.combine(measured_NK[rows_RN])
        samples, rows = rows_RN.shape
        places = rows_RN + rows * np.arange(samples)[:, None]
        times_RN = np.bincount(places.ravel(), minlength=samples * rows).reshape(samples, rows)
        return self.combine(times_RN.astype(np.float64) @ measured_NK)


def _resampled_rows(rows: int, resamples: int) -> Iterator[np.ndarray]:
    """Row numbers of each bootstrap sample, in blocks of shape (samples, rows)."""
    generator = np.random.default_rng(_SEED)
    block = max(1, _BLOCK_ROWS // rows)
    for first in range(0, resamples, block):
        yield generator.integers(0, rows, size=(min(block, resamples - first), rows))


def ratio(sums: np.ndarray) -> np.ndarray:
    """First number over second: a mean where the second counts rows."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def mean_of(values: Sequence[float]) -> np.ndarray:
    """The numbers of a metric that is a mean over rows, for `ratio`."""
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)


def f1(sums: np.ndarray) -> np.ndarray:
    """F1 of (hits, predicted, expected): 2 TP / (2 TP + FP + FN); 1 where there is nothing on either side.

    Silence was the right answer there.
    """
    total = sums[..., 1] + sums[..., 2]
    return np.where(total > 0, 2 * sums[..., 0] / np.maximum(total, 1), 1.0)
