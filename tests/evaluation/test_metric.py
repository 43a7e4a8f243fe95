"""Bootstrap intervals: a resample scores what its answers score, and intervals cover as they should."""

from __future__ import annotations

import numpy as np
import pytest

from moe_medical.evaluation.metric import Answers, Metric, mean_of, ratio
from moe_medical.evaluation.metrics import ALL_METRICS, score
from moe_medical.evaluation.text_metrics import HAS_JIEBA

LABELS = ["yes", "no", "maybe so"]
LINES = ["drug: a; b", "disease: c", "drug: a\ndisease: c; d", "none"]
NUMBERS = ["1", "2", "2.5", "-4", "7", "0"]
WORDS = [
    "no acute fracture is seen here",
    "there is an acute fracture",
    "an acute fracture is seen",
    "normal",
]
ANSWERS = [
    "实体包含：\n药物实体：甲，乙",
    "实体包含：\n疾病实体：丙",
    "实体包含：\n药物实体：甲\n疾病实体：丙",
]
REPORTS = ["如下：\n主诉：咳嗽三天\n诊断：感冒", "如下：\n主诉：咳嗽", "如下：\n诊断：流感\n建议：休息"]
TEXTS = (
    dict.fromkeys(("entity_f1",), LINES)
    | dict.fromkeys(("pearson", "spearman"), NUMBERS)
    | dict.fromkeys(("bleu4", "bleu4_char", "token_f1", "rouge_l", "token_recall"), WORDS)
    | dict.fromkeys(("promptcblue_f1", "promptcblue_f1_strict"), ANSWERS)
    | dict.fromkeys(("rouge_l_sections", "rouge_l_sections_jieba", "rouge_l_jieba"), REPORTS)
)
NAMES = sorted(name for name in ALL_METRICS if HAS_JIEBA or not name.endswith("_jieba"))


def _answers(metric: str, rows: int) -> Answers:
    rng, texts = np.random.default_rng(1), TEXTS.get(metric, LABELS)
    targets = [texts[i % len(texts)] for i in range(rows)]
    predictions = [t if rng.random() < 0.5 else str(rng.choice(texts)) for t in targets]
    if texts is NUMBERS:
        predictions[3] = "no idea"
    return Answers(predictions, targets, "zh" if "jieba" in metric else "en")


@pytest.mark.parametrize("name", NAMES)
def test_the_interval_is_that_of_resampled_answers(name: str) -> None:
    metric, answers = ALL_METRICS[name], _answers(name, 12)
    measured = metric.measure(answers)
    drawn = np.random.default_rng(20_240_409).integers(0, 12, size=(40, 12))
    scores = []
    for rows in drawn:
        predictions, targets = ([side[i] for i in rows] for side in answers[:2])
        scores.append(score(name, predictions, targets, answers.language))
    assert len(set(scores)) > 3
    expected = np.percentile(scores, [2.5, 97.5])
    assert metric.interval(measured, 40) == pytest.approx(tuple(expected))


def test_a_mean_of_coin_throws_is_covered_about_as_often_as_promised() -> None:
    rng, metric = np.random.default_rng(0), Metric(lambda _: np.zeros(0), ratio)
    covered = 0
    for _ in range(300):
        low, high = metric.interval(mean_of((rng.random(80) < 0.4).tolist()), 400)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_width_is_that_of_the_normal_approximation() -> None:
    values = (np.random.default_rng(3).random(500) < 0.3).astype(float)
    low, high = Metric(lambda _: np.zeros(0), ratio).interval(mean_of(values.tolist()), 2000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 500**0.5, rel=0.1)
    assert low < values.mean() < high


def test_many_rows_are_resampled_in_blocks() -> None:
    values = mean_of([0.0, 1.0] * 500_000)
    low, high = Metric(lambda _: np.zeros(0), ratio).interval(values, 6)
    assert 0.49 < low < high < 0.51


def test_rows_that_are_all_right_leave_no_doubt() -> None:
    metric = ALL_METRICS["macro_f1"]
    assert metric.interval(metric.measure(Answers(LABELS, LABELS)), 100) == (1.0, 1.0)
