"""PromptCBLUE's sixteen scoring rules, letters of options, token recall: cases small enough to score by eye.

What is expected here was worked out by hand from the official post_generate_process.py and evaluators.py.
"""

from __future__ import annotations

import pytest

from moe_medical.evaluation.metric import Answers
from moe_medical.evaluation.metrics import all_scores, score
from moe_medical.evaluation.promptcblue import (
    Shape,
    answer_items,
    answer_shape,
    full_width,
    report_sections,
)

ENTITIES = "上述句子中的实体包含：\n药物实体：甲药，乙药\n疾病实体：丙病"
TRIPLES = "具有药物治疗关系的头尾实体对如下：头实体为甲病，尾实体为乙药。头实体为甲病，尾实体为丙药。"
EVENTS = (
    "上述句子中的临床发现事件如下：\n主体词：疼痛；发生状态：否定；描述词：胀，钝；解剖部位：\n主体词：热"
)
FINDINGS = "上述对话中临床发现实体以及其阴阳性判别如下：\n咳嗽：未患有症状疾病\n发热：患有该疾病症状"
SYMPTOMS = "当前对话中的症状及其阴阳性判断为：\n咳嗽：没有患有该症状"
REPORT = "上述问诊对话的诊疗报告如下：\n主诉：咳嗽三天\n现病史：\n诊断：感冒"
UNSURE = "无法根据上下文确定病人是否患有该症状"


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (ENTITIES, "entities"),
        (TRIPLES, "triples"),
        (EVENTS, "events"),
        (FINDINGS, "findings"),
        (SYMPTOMS, "findings"),
        ("甲病，乙病", "terms"),
        ("没有对应的标准化实体", "terms"),
    ],
)
def test_targets_tell_the_shape_of_the_answers(target: str, shape: Shape) -> None:
    assert answer_shape([target]) == answer_shape(["没有指定的内容", target]) == shape


@pytest.mark.parametrize(
    ("shape", "text", "choices", "items"),
    [
        # CMeEE-V2, IMCS-V2-NER: types that were not offered are dropped
        ("entities", ENTITIES, [], {("药物", "甲药"), ("药物", "乙药"), ("疾病", "丙病")}),
        ("entities", ENTITIES, ["疾病", "检查"], {("疾病", "丙病")}),
        ("entities", "上述句子中的实体包含：\n药物实体：", ["药物"], set()),
        ("entities", "药物：甲药", ["药物"], set()),
        ("entities", "没有药物实体", ["药物"], set()),
        # CMeIE: choices do not matter; a piece without a tail states nothing
        (
            "triples",
            f"{TRIPLES}\n具有相关（症状）关系的头尾实体对如下：",
            ["别的"],
            {("药物治疗", "甲病", "乙药"), ("药物治疗", "甲病", "丙药")},
        ),
        ("triples", "具有药物治疗关系的头尾实体对如下：头实体为甲病。", [], set()),
        ("triples", "头实体为甲，尾实体为乙", [], {("体为甲，尾实体为乙", "甲", "乙")}),
        # CHIP-CDEE: four fields of each line but the first
        (
            "events",
            EVENTS,
            [],
            {
                ("主体词：疼痛", "发生状态：否定", "描述词：胀，钝", "解剖部位："),
                ("主体词：热", "发生状态：", "描述词：", "解剖部位："),
            },
        ),
        ("events", "主体词：热", [], set()),
        # CHIP-MDCFNPC, IMCS-V2-SR: a conclusion that was not offered becomes the default
        ("findings", SYMPTOMS, ["没有患有该症状", UNSURE], {("咳嗽", "没有患有该症状")}),
        ("findings", SYMPTOMS, [UNSURE], {("咳嗽", UNSURE)}),
        ("findings", FINDINGS, ["患有该疾病症状"], {("咳嗽", "不标注"), ("发热", "患有该疾病症状")}),
        ("findings", FINDINGS, [], {("咳嗽", "未患有症状疾病"), ("发热", "患有该疾病症状")}),
        ("findings", "判断为：\n咳嗽：是：否\n发热", [], set()),
        ("findings", "咳嗽：没有患有该症状", [], set()),
        # CHIP-CDN: the last line; terms that were not offered are dropped
        ("terms", "甲病，乙病，甲病", ["甲病", "丙病"], {("甲病",)}),
        ("terms", "标准词是：\n甲病， 乙病", [], {("甲病",), ("乙病",)}),
        ("terms", "没有对应的标准化实体", [], set()),
        ("terms", "", [], set()),
    ],
)
def test_what_an_answer_states(shape: Shape, text: str, choices: list[str], items: set) -> None:
    assert answer_items(text, shape, choices) == items


def test_the_lists_of_an_event_are_in_order() -> None:
    target = "事件如下：\n主体词：疼痛；描述词：胀，钝\n主体词：热"
    assert score("promptcblue_f1_strict", ["事件如下：\n主体词：疼痛；描述词：胀，钝"], [target]) == 2 / 3
    assert score("promptcblue_f1_strict", ["事件如下：\n主体词：疼痛；描述词：钝，胀"], [target]) == 0.0


def test_f1_is_taken_over_the_items_of_all_rows() -> None:
    targets, choices = [ENTITIES, "上述句子中的实体包含：\n药物实体："], [["药物", "疾病"], ["药物"]]
    predictions = ["如下：\n药物实体：甲药\n疾病实体：丁病", "如下：\n药物实体：戊药\n检查实体：己"]
    # TP 1; FP 丁病, 戊药 (己 was not asked for); FN 乙药, 丙病
    for metric in ("promptcblue_f1", "promptcblue_f1_strict"):
        assert score(metric, predictions, targets, "zh", choices) == pytest.approx(2 / (2 + 2 + 2))


def test_terms_not_offered_neither_help_nor_hurt() -> None:
    choices = [["甲病", "乙病"]]
    assert score("promptcblue_f1", ["甲病，丙病"], ["甲病"], "zh", choices) == 1.0
    assert score("promptcblue_f1", ["甲病，丙病"], ["甲病"], "zh") == pytest.approx(2 / 3)


def test_the_forgiving_metric_and_the_official_one() -> None:
    spelled = ["如下：\n药物实体: 甲药, 乙药\n疾病实体：丙病"]
    assert score("promptcblue_f1", spelled, [ENTITIES], "zh", [["药物", "疾病"]]) == 1.0
    assert score("promptcblue_f1_strict", spelled, [ENTITIES], "zh", [["药物", "疾病"]]) == 2 / 4
    nothing = ["没有对应的标准化实体"]
    assert score("promptcblue_f1", nothing, nothing, "zh") == 1.0
    assert score("promptcblue_f1_strict", nothing, nothing, "zh") == 0.0
    assert score("promptcblue_f1", ["甲病"], nothing, "zh") == 0.0
    assert full_width("甲:乙,丙;丁") == "甲：乙，丙；丁"


def test_both_readings_are_told() -> None:
    told = all_scores("promptcblue_f1", Answers(["甲病"], ["甲病"], "zh", [["甲病", "乙病"]]), 0)
    assert told.all == {"promptcblue_f1": 1.0, "promptcblue_f1_strict": 1.0}


# --- labels: CHIP-CTC, IMCS-V2-DAC, KUAKE-QIC; CHIP-STS, KUAKE-QTR, KUAKE-QQR, KUAKE-IR ---


def test_macro_tasks_average_over_predicted_labels_too() -> None:
    targets, predictions = ["年龄", "年龄", "性别"], ["年龄", "疾病", "性别"]
    # 年龄 2/3, 性别 1, 疾病 0
    assert score("macro_f1_union", predictions, targets, "zh") == pytest.approx((2 / 3 + 1) / 3)
    assert score("macro_f1", predictions, targets, "zh") == pytest.approx((2 / 3 + 1) / 2)
    assert score("micro_f1", predictions, targets, "zh") == pytest.approx(2 / 3)  # MOELoRA's for CHIP-CTC


def test_weighted_f1_is_what_goes_by_the_name_of_micro_f1() -> None:
    targets, predictions = ["完全匹配", "完全匹配", "部分匹配"], ["完全匹配", "部分匹配", "部分匹配"]
    # both labels: TP 1, one error -> 2/3
    assert score("weighted_f1", predictions, targets, "zh") == pytest.approx(2 / 3)
    skewed = ["部分匹配", "部分匹配", "部分匹配"]
    assert score("weighted_f1", skewed, targets, "zh") == pytest.approx(1 / 2 / 3)
    assert score("micro_f1", skewed, targets, "zh") == pytest.approx(1 / 3)


def test_sts_spells_its_labels_in_two_ways() -> None:
    assert score("micro_f1", ["相同", "是的", "不同"], ["是的", "相同", "是的"], "zh") == pytest.approx(2 / 3)
    assert score("micro_f1", ["相同"], ["部分相同"], "zh") == 0.0


# --- IMCS-V2-MRG, MedDG ---


def test_sections_of_a_report() -> None:
    assert report_sections(REPORT) == {"主诉": "咳嗽三天", "现病史": "", "诊断": "感冒"}
    assert report_sections("主诉：咳嗽") == {}  # the first line is the lead
    assert report_sections("如下：\n主诉：甲\n别的：乙\n主诉：丙") == {"主诉": "丙"}


def test_rouge_of_sections_counts_every_section_of_the_target_alike() -> None:
    said = "报告如下：\n诊断：感冒\n主诉：咳嗽\n建议：休息"
    # 主诉: precision 1, recall 2/4 -> 2/3; 现病史 is empty on both sides -> 1; 诊断 1; 建议 does not count
    assert score("rouge_l_sections", [said], [REPORT], "zh") == pytest.approx((2 / 3 + 1 + 1) / 3)
    other = "如下：\n主诉：甲乙"
    both = score("rouge_l_sections", [said, "如下：\n主诉：丙"], [REPORT, other], "zh")
    assert both == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    whole = score("rouge_l_char", [said], [REPORT], "zh")
    assert 0 < whole < 0.6


def test_official_tokens_keep_words_and_numbers_whole() -> None:
    assert score("rouge_l_cblue", ["CT 示 12 处"], ["ct示15处"], "zh") == pytest.approx(3 / 4)
    assert score("rouge_l_char", ["CT 示 12 处"], ["ct示15处"], "zh") == pytest.approx(5 / 6)


# --- other tasks ---


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
        ("AC", "A, C", True),
        ("C, A", "A;C", True),
        ("A AND C", "AC", True),
        ("A and D", "A、C", False),
    ],
)
def test_letter_accuracy(prediction: str, target: str, hit: bool) -> None:
    assert score("letter_accuracy", [prediction], [target]) == hit


def test_token_recall_does_not_punish_more_words() -> None:
    assert score("token_recall", ["a nodule in the left lung", "no"], ["left lung", "right lung"]) == 0.5
    assert score("token_recall", ["nodule"], ["left nodule"]) == 0.5
