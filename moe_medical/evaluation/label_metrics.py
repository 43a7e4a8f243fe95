"""Metrics of closed labels: each text is read as one label or as letters of options (`readings.py`).

The sums are those of scikit-learn's `f1_score`, which the tests compare with; here they are taken of all
bootstrap samples at once.
"""

from __future__ import annotations

import numpy as np

from moe_medical.evaluation.metric import Answers, Metric, f1, mean_of, ratio
from moe_medical.evaluation.readings import are_letters, letters_meant, read_labels, token_list

POSITIVE_LABELS = frozenset({"yes", "是"})


def _accuracy(answers: Answers) -> np.ndarray:
    labels, references = read_labels(answers.predictions, answers.targets)
    return mean_of([a == r for a, r in zip(labels, references, strict=True)])


def _letter_accuracy(answers: Answers) -> np.ndarray:
    """Rows whose set of option letters is the target's: "B", "ABD", "A, B and D", "答案为ABD"."""
    rows = zip(answers.predictions, answers.targets, strict=True)
    return mean_of([letters_meant(p, t) == letters_meant(t, t) for p, t in rows])


def _f1_yes(answers: Answers) -> np.ndarray:
    """Hits, predicted and expected of the class "yes" or "是"; every other answer is a no."""
    labels, references = read_labels(answers.predictions, answers.targets)
    said, right = (np.array([x in POSITIVE_LABELS for x in side]) for side in (labels, references))
    return np.stack([said & right, said, right], axis=1).astype(np.float64)


def _contains_answer(answers: Answers) -> np.ndarray:
    """Rows whose prediction has the target's tokens as whole tokens, one behind the other.

    What LLaVA-Med and Med-MoE count for closed questions, but that there "no" is found in "normal".
    """
    rows = zip(answers.predictions, answers.targets, strict=True)
    return mean_of(
        [_has_run(token_list(p, answers.language), token_list(t, answers.language)) for p, t in rows]
    )


def _has_run(tokens: list[str], wanted: list[str]) -> bool:
    starts = range(len(tokens) - len(wanted) + 1)
    return bool(wanted) and any(tokens[i : i + len(wanted)] == wanted for i in starts)


def _codes(answers: Answers) -> np.ndarray:
    """Numbers of the label said and of the right one, shape (rows, 2)."""
    labels, references = read_labels(answers.predictions, answers.targets)
    numbers = {label: i for i, label in enumerate(sorted({*labels, *references}))}
    return np.array([[numbers[a], numbers[r]] for a, r in zip(labels, references, strict=True)])


def _class_counts(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, predicted and expected rows of each class, each of shape (..., classes)."""
    *lead, rows, _ = codes.shape
    classes = int(codes.max()) + 1
    samples = int(np.prod(lead, dtype=np.int64))
    first = classes * np.arange(samples)[:, None]
    said, right = (first + codes[..., side].reshape(samples, rows) for side in (0, 1))

    def count(places: np.ndarray) -> np.ndarray:
        return np.bincount(places.ravel(), minlength=samples * classes).reshape(*lead, classes)

    return count(said[said == right]), count(said), count(right)


def _class_f1(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1, predicted and expected rows of each class."""
    hits, predicted, expected = _class_counts(codes)
    return 2 * hits / np.maximum(predicted + expected, 1), predicted, expected


def _macro(codes: np.ndarray) -> np.ndarray:
    scores, _, expected = _class_f1(codes)
    return np.asarray((scores * (expected > 0)).sum(-1) / (expected > 0).sum(-1))


def _union(codes: np.ndarray) -> np.ndarray:
    scores, predicted, expected = _class_f1(codes)
    return np.asarray(scores.sum(-1) / (predicted + expected > 0).sum(-1))


def _weighted(codes: np.ndarray) -> np.ndarray:
    scores, _, expected = _class_f1(codes)
    return np.asarray((scores * expected).sum(-1) / expected.sum(-1))


def _no_letters(answers: Answers) -> bool:
    return not are_letters(answers.targets)


ACCURACY = Metric(_accuracy, ratio)
LETTER_ACCURACY = Metric(_letter_accuracy, ratio)
CONTAINS_ANSWER = Metric(_contains_answer, ratio, applies=_no_letters)
F1_YES = Metric(_f1_yes, f1)
MICRO_F1 = ACCURACY
"""Each row has one label and gets one, so both are the share of hits; an unknown label is a miss."""
MACRO_F1 = Metric(_codes, _macro, by_rows=True)
"""Mean over the labels that occur among the targets; any other prediction is wrong, but no class."""
MACRO_F1_UNION = Metric(_codes, _union, by_rows=True)
"""Mean over the labels that occur on either side, as scikit-learn does it where it is told no labels."""
WEIGHTED_F1 = Metric(_codes, _weighted, by_rows=True)
"""Each label's F1 weighed by its targets."""
