"""PromptCBLUE answers, letters of options, token recall: cases small enough to score by eye."""

from __future__ import annotations

import pytest

from moe_medical.evaluation.metrics import score
from moe_medical.evaluation.promptcblue import answer_items

TRIPLES = "具有药物治疗关系的头尾实体对如下：头实体为甲病，尾实体为乙药。头实体为甲病，尾实体为丙药。"


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (
            "上述句子中的实体包含：\n药物实体：甲，乙\n疾病实体：",
            {("药物实体", "甲"), ("药物实体", "乙")},
        ),
        (
            f"{TRIPLES}\n具有相关（症状）关系的头尾实体对如下：",
            {("药物治疗", "甲病", "乙药"), ("药物治疗", "甲病", "丙药")},
        ),
        (
            "上述句子中的临床发现事件如下：\n主体词：疼痛；发生状态：否定；描述词：胀，钝；解剖部位：\n主体词：热；发生状态：；描述词：；解剖部位：",
            {("主体词：疼痛", "发生状态：否定", "描述词：胀", "描述词：钝"), ("主体词：热",)},
        ),
        ("当前对话中的症状及其阴阳性判断为：\n咳嗽：没有患有该症状", {("咳嗽", "没有患有该症状")}),
        ("甲病，乙病", {("", "甲病"), ("", "乙病")}),
        ("没有对应的标准化实体", set()),
        ("", set()),
    ],
)
def test_what_an_answer_states(text: str, items: set[tuple[str, ...]]) -> None:
    assert answer_items(text) == items


def test_promptcblue_f1_counts_whole_items() -> None:
    target = "上述句子中的临床发现事件如下：\n主体词：疼痛；描述词：胀，钝\n主体词：热；描述词："
    one_of_two = "事件：\n主体词：疼痛；描述词：钝，胀\n主体词：冷；描述词："
    assert score("promptcblue_f1", [one_of_two], [target], "zh") == pytest.approx(2 * 1 / (2 + 2))
    assert score("promptcblue_f1", ["甲病"], ["没有对应的标准化实体"], "zh") == 0.0
    assert score("promptcblue_f1", ["没有对应的标准化实体"], ["没有对应的标准化实体"], "zh") == 1.0


@pytest.mark.parametrize(
    ("prediction", "target", "hit"),
    [
        ("ABD", "ABD", True),
        ("A, B and D", "ABD", True),
        ("答案为A、B、D。", "ABD", True),
        ("The answer is B", "B", True),
        ("(B) aspirin", "B", True),
        ("b.", "B", True),
        ("AB", "ABD", False),
        ("ABCD", "ABD", False),
        ("AB", "B", False),
        ("A patient needs this", "A", False),
        ("aspirin", "aspirin", True),
        ("saipirn", "aspirin", False),
        ("", "B", False),
    ],
)
def test_letter_accuracy(prediction: str, target: str, hit: bool) -> None:
    assert score("letter_accuracy", [prediction], [target]) == hit


def test_token_recall_does_not_punish_more_words() -> None:
    assert score("token_recall", ["a nodule in the left lung", "no"], ["left lung", "right lung"]) == 0.5
    assert score("token_recall", ["nodule"], ["left nodule"]) == 0.5
