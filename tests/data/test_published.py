"""Shipped recipes on small files in the published formats: exact samples, and what is rejected.

The records are made up; only their form is that of the data sets.
"""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.tiny import write_tiny_model

from moe_medical.config.schema import DataSection
from moe_medical.data.chat import ChatFormat
from moe_medical.data.recipe import load_mixture, load_task
from moe_medical.data.rows import Example
from moe_medical.data.sources import Split, load_split
from moe_medical.data.tasks import load_tasks
from moe_medical.errors import ConfigError, DataError
from moe_medical.evaluation.metrics import score

RECIPES = Path(__file__).parents[2] / "data_recipes"
TASKS = RECIPES / "tasks"
VARIABLES = ("PROMPTCBLUE", "MEDQA", "MEDMCQA", "CMB", "CMEXAM", "MMLU", "CMMLU", "CEVAL", "MING", "MED_MOE")
SECRET = "patient 4711"


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that every variable of the recipes names."""
    folder = tmp_path / "data"
    for variable in VARIABLES:
        monkeypatch.setenv(f"{variable}_DATA", str(folder))
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))
    return folder


def lines(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows)
    path.write_text(text, encoding="utf-8")


def whole(path: Path, *rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def table(path: Path, *rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)


def load(task: str, split: str, max_bad_fraction: float = 0.0) -> Split:
    return load_split(load_task(TASKS / f"{task}.yaml"), split, max_bad_fraction)


def only(task: str, split: str) -> Example:
    [example] = load(task, split).examples
    return example


def rejected(task: str, split: str) -> list[tuple[int, str]]:
    bad = load(task, split, 1.0).rejected
    assert all(SECRET not in str(record) for record in bad)
    return [(record.line, record.reason) for record in bad]


# --- PromptCBLUE ---

CBLUE = {
    "CHIP-CDEE": (
        "抽取事件：\n左臂疼痛3天",
        "上述句子中的临床发现事件如下：\n主体词：疼痛；发生状态：；描述词：；解剖部位：左臂",
        None,
    ),
    "CMeEE-V2": (
        "找出药物，疾病实体：\n甲药治乙病",
        "上述句子中的实体包含：\n药物实体：甲药\n疾病实体：乙病",
        ["药物", "疾病"],
    ),
    "CHIP-CTC": ("判断类型：\n年满18岁\n选项：年龄，性别", "年龄", ["年龄", "性别"]),
    "IMCS-V2-DAC": ("什么意图？\n咳几天了\n选项：关于症状的询问", "关于症状的询问", ["关于症状的询问"]),
    "CHIP-STS": ("“甲”，“乙”。意思相同吗？\n选项：是的，不是", "不是", ["是的", "不是"]),
    "IMCS-V2-MRG": ("写诊疗报告：\n患者：咳嗽", "上述问诊对话的诊疗报告如下：\n主诉：咳嗽\n诊断：感冒", None),
    "MedDG": ("给出医生的下一句：\n患者：胃痛", "痛多久了？", None),
    "CHIP-CDN": ("找出标准词：\n甲病？\n选项：甲病，乙病", "甲病", ["甲病", "乙病"]),
    "IMCS-V2-NER": ("找出症状实体：\n咳嗽", "上述句子中的实体包含：\n症状实体：咳嗽", ["症状"]),
    "CHIP-MDCFNPC": (
        "判断阴阳性：\n实体：咳嗽",
        "上述对话中临床发现实体以及其阴阳性判别如下：\n咳嗽：未患有症状疾病",
        ["未患有症状疾病"],
    ),
    "KUAKE-QTR": ("“甲”，“乙”。匹配程度？", "部分匹配", ["部分匹配", "完全匹配"]),
    "KUAKE-QIC": ("判断意图：\n甲药有什么用", "功效作用", ["功效作用", "就医建议"]),
    "CMeIE": (
        "抽取关系：\n甲药治乙病",
        "具有药物治疗关系的头尾实体对如下：头实体为乙病，尾实体为甲药。",
        ["药物治疗"],
    ),
    "IMCS-V2-SR": (
        "抽取症状：\n不咳",
        "当前对话中的症状及其阴阳性判断为：\n咳嗽：没有患有该症状",
        ["没有患有该症状"],
    ),
    "KUAKE-QQR": ("“甲”，“乙”。语义关系？", "完全一致", ["完全一致", "语义无直接关联"]),
    "KUAKE-IR": ("是否相关？\n搜索：甲\n内容：乙", "不相关", ["相关", "不相关"]),
}


def cblue(dataset: str, number: int = 1, **other: Any) -> dict[str, Any]:
    prompt, target, choices = CBLUE[dataset]
    row = {"input": prompt, "target": target, "answer_choices": choices, "task_type": "x"}
    return {**row, "task_dataset": dataset, "sample_id": f"dev-{number}", **other}


def test_promptcblue_tasks_share_one_file(data: Path) -> None:
    lines(data / "dev.json", *(cblue(d, i) for i, d in enumerate(CBLUE)))
    specs = load_mixture(RECIPES / "promptcblue.yaml").tasks
    assert [spec.name for spec in specs] == [d.lower().replace("-", "_") for d in CBLUE]
    for (dataset, (prompt, target, choices)), spec in zip(CBLUE.items(), specs, strict=True):
        split = load_split(spec, "validation", 0.0)
        [example] = split.examples
        shown = tuple(choices) if choices and spec.choices else ()
        assert (example.prompt, example.target, example.choices) == (prompt, target, shown)
        assert example.id == f"dev-{list(CBLUE).index(dataset)}"
        assert split.rejected == []
        assert score(spec.metric, [target], [target], "zh") == 1.0
        assert score(spec.metric, ["别的"], [target], "zh") < 0.1


def test_promptcblue_spells_one_set_in_two_ways(data: Path) -> None:
    lines(data / "train.json", cblue("CMeIE"), cblue("CMeIE", 2, task_dataset="CMeIE-V2"), cblue("MedDG", 3))
    assert len(load("promptcblue/cmeie", "train").examples) == 2


def test_promptcblue_bad_records(data: Path) -> None:
    hidden = cblue("MedDG", 2, target="")
    odd = cblue("MedDG", 3, answer_choices=SECRET)
    no_input = {k: v for k, v in cblue("MedDG", 4).items() if k != "input"}
    other = cblue("CHIP-STS", 5, target="")  # not of this task, so not one of its bad records
    lines(data / "dev.json", cblue("MedDG"), hidden, odd, no_input, other, '{"task_dataset": "MedDG"')
    assert rejected("promptcblue/meddg", "validation") == [
        (2, "no answer"),
        (3, "column 'answer_choices' is neither a list of texts nor null"),
        (4, "missing column 'input'"),
        (6, "invalid JSON"),
    ]


def test_promptcblue_without_a_record_of_the_task(data: Path) -> None:
    lines(data / "dev.json", cblue("MedDG"), cblue("MedDG", 2))
    with pytest.raises(DataError, match=r"dev\.json holds no record that matches where"):
        load("promptcblue/chip_sts", "validation")


def test_promptcblue_without_the_column_of_where(data: Path) -> None:
    rows = [{k: v for k, v in cblue("MedDG", i).items() if k != "task_dataset"} for i in range(2)]
    lines(data / "dev.json", *rows)
    with pytest.raises(DataError, match=r"where: column 'task_dataset' is not in .*dev\.json"):
        load("promptcblue/meddg", "validation")


def test_moelora_takes_eight_of_the_sixteen() -> None:
    all_names = {spec.name for spec in load_mixture(RECIPES / "promptcblue.yaml").tasks}
    eight = [spec.name for spec in load_mixture(RECIPES / "moelora_eight.yaml").tasks]
    assert len(eight) == 8
    assert set(eight) < all_names


def test_ming_moe_is_sixteen_and_nine() -> None:
    specs = load_mixture(RECIPES / "ming_moe.yaml").tasks
    exams = load_mixture(RECIPES / "ming_exams.yaml").tasks
    assert len(specs) == 25
    assert [spec.name for spec in specs[16:]] == [spec.name for spec in exams]


# --- exams ---

EN = (
    "Answer the multiple-choice question. Reply with the letter of the correct option, or with all letters "
    "if several are correct.\n"
)
ZH = "回答下面的选择题，只写出正确选项的字母；有多个正确选项时写出全部字母。\n"


def test_medqa(data: Path) -> None:
    options = {"A": "rest", "B": "ice", "C": "heat", "D": "cast", "E": "none"}
    row = {
        "question": "A sprain?",
        "answer": "ice",
        "options": options,
        "meta_info": "step1",
        "answer_idx": "B",
    }
    no_letter = {k: v for k, v in row.items() if k != "answer_idx"}
    wrong = {**row, "answer_idx": "F"}
    lines(data / "questions/US/test.jsonl", row, no_letter, wrong, {**row, "options": [SECRET]})
    first, second = load("exams/medqa", "test", 1.0).examples
    assert first.prompt == EN + "A sprain?\nA. rest\nB. ice\nC. heat\nD. cast\nE. none"
    assert first.choices == ("rest", "ice", "heat", "cast", "none")
    assert (first.target, second.target) == ("B", "B")
    assert rejected("exams/medqa", "test") == [
        (3, "the answer is not the letter of an option"),
        (4, "column 'options' is not an object of options A, B, ..."),
    ]


MCQ = {"id": "u-1", "question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "exp": None}


def test_medmcqa_counts_from_one(data: Path) -> None:
    rows = [{**MCQ, "id": f"u-{i}", "cop": i} for i in (1, 4, 0)]
    lines(data / "dev.json", *rows, {**MCQ, "id": "u-9"})
    split = load("exams/medmcqa", "validation", 1.0)
    assert [(e.id, e.target) for e in split.examples] == [("u-1", "A"), ("u-4", "D")]
    assert split.examples[0].prompt == EN + "Which?\nA. w\nB. x\nC. y\nD. z"
    assert rejected("exams/medmcqa", "validation") == [
        (3, "column 'cop' is not a number from 1 to 4"),
        (4, "no answer"),
    ]


def test_medmcqa_of_the_hub_counts_from_zero(tmp_path: Path) -> None:
    lines(
        tmp_path / "set/train.jsonl",
        {**MCQ, "cop": 0},
        {**MCQ, "id": "u-2", "cop": -1},
        {**MCQ, "id": "u-3", "cop": 3},
    )
    text = (TASKS / "exams/medmcqa_hub.yaml").read_text(encoding="utf-8")
    path = tmp_path / "hub.yaml"
    path.write_text(text.replace("openlifescienceai/medmcqa,", "set,"), encoding="utf-8")
    split = load_split(load_task(path), "train", 1.0)
    assert [e.target for e in split.examples] == ["A", "D"]
    assert [b.reason for b in split.rejected] == ["no answer"]


def cmb(**other: Any) -> dict[str, Any]:
    kinds = {
        "exam_type": "医师考试",
        "exam_class": "执业医师",
        "exam_subject": "口腔",
        "question_type": "多项选择题",
    }
    options = {"A": "甲", "B": "", "C": "丙", "D": "丁", "E": ""}
    return {**kinds, "question": "哪些对？", "option": options, **other}


def test_cmb_keeps_the_letters_of_its_options(data: Path) -> None:
    empty = cmb(answer="B")
    whole(
        data / "CMB-Exam/CMB-train/CMB-train-merge.json",
        cmb(answer="DA"),
        empty,
        cmb(),
        cmb(answer="A", option={}),
    )
    [example] = load("exams/cmb", "train", 1.0).examples
    assert example.prompt == (
        "以下是中国医师考试中执业医师考试的一道多项选择题，不需要做任何分析和解释，直接输出答案选项。\n"
        "哪些对？\nA. 甲\nC. 丙\nD. 丁"
    )
    assert (example.target, example.choices) == ("AD", ("甲", "丙", "丁"))
    assert rejected("exams/cmb", "train") == [
        (2, "the answer is not the letter of an option"),
        (3, "no answer"),
        (4, "fewer than two options"),
    ]


def test_cmb_joins_the_answers_of_its_test_file(data: Path) -> None:
    whole(data / "CMB-Exam/CMB-test/CMB-test-choice-question-merge.json", cmb(id=7), cmb(id=8), cmb(id=9))
    answers = data / "CMB-test-choice-answer.json"
    whole(answers, {"id": 8, "answer": "C"}, {"id": 7, "answer": "ACD"})
    split = load("exams/cmb", "test", 1.0)
    assert [e.target for e in split.examples] == ["ACD", "C"]
    assert [b.reason for b in split.rejected] == ["no answer"]
    assert str(answers) in split.fingerprints
    whole(answers, {"id": 8, "answer": "A"}, {"id": 7, "answer": "ACD"})
    assert [e.target for e in load("exams/cmb", "test", 1.0).examples] == ["ACD", "A"]


def test_cmexam(data: Path) -> None:
    options = "A 甲\nB 乙\n乙的第二行\nC 丙"
    table(
        data / "train.csv",
        ["Question", "Options", "Answer", "Explanation"],
        ["哪个？", options, "B", "因为"],
        ["哪些？", "A. 甲\nB、乙", "AB", ""],
        ["哪个？", options, "", ""],
        ["哪个？", f"{SECRET}\nA 甲\nB 乙", "A", ""],
        ["哪个？", "A 甲\nA 乙", "A", ""],
    )
    first, second = load("exams/cmexam", "train", 1.0).examples
    assert first.prompt == ZH + "哪个？\nA. 甲\nB. 乙 乙的第二行\nC. 丙"
    assert (first.target, second.target) == ("B", "AB")
    assert second.choices == ("甲", "乙")
    assert [reason for _, reason in rejected("exams/cmexam", "train")] == [
        "no answer",
        "column 'Options' has a line before option A",
        "column 'Options' names a letter twice",
    ]


def test_mmlu_has_no_header(data: Path) -> None:
    for subject in (
        "anatomy",
        "clinical_knowledge",
        "college_biology",
        "college_medicine",
        "medical_genetics",
    ):
        table(data / f"dev/{subject}_dev.csv", [f"{subject}?", "1", "2", "3", "4", "C"])
    table(
        data / "dev/professional_medicine_dev.csv",
        ["Last, one?", "a", "b", "c", "d", "A"],
        ["q", "a", "b", "c", "d", "E"],
    )
    split = load("exams/mmlu", "train", 0.5)
    assert len(split.examples) == 6
    assert split.examples[0].prompt == EN + "anatomy?\nA. 1\nB. 2\nC. 3\nD. 4"
    assert [e.target for e in split.examples] == ["C"] * 5 + ["A"]
    assert [b.reason for b in split.rejected] == ["the answer is not the letter of an option"]


def test_cmmlu_has_an_index_column(data: Path) -> None:
    subjects = ["anatomy", "clinical_knowledge", "college_medicine", "genetics", "nutrition"]
    for subject in (*subjects, "traditional_chinese_medicine", "virology"):
        header = ["", "Question", "A", "B", "C", "D", "Answer"]
        table(data / f"dev/{subject}.csv", header, ["0", "不包括？", "甲", "乙", "丙", "丁", "B"])
    split = load("exams/cmmlu", "train")
    assert len(split.examples) == 7
    assert split.examples[0].prompt == ZH + "不包括？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"
    assert split.examples[0].target == "B"


def test_ceval(data: Path) -> None:
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for subject in ("basic_medicine", "clinical_medicine", "physician"):
        table(data / f"dev/{subject}_dev.csv", header, ["0", "哪个？", "甲", "乙", "丙", "丁", "D", "因为"])
    split = load("exams/ceval", "train")
    assert [(e.prompt, e.target) for e in split.examples] == [
        (ZH + "哪个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁", "D")
    ] * 3


def said(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_ple_in_the_form_of_ming(data: Path) -> None:
    question = "哪些对？\nA. 甲\nB. 乙"
    only_question = {"conversations": said(question), "eval": {"answer": ["A", "B"], "type": "多选"}}
    reasoned = {"conversations": said(question, "因为甲。答案为A。"), "eval": {"answer": "A", "type": "单选"}}
    silent = {"conversations": said(question)}
    odd = {"conversations": [{"from": "gpt", "value": SECRET}], "eval": {"answer": "A"}}
    whole(data / "PLE_Pharmacy.json", only_question, reasoned, silent, odd, {"conversations": SECRET})
    split = load("exams/ple_pharmacy", "test", 1.0)
    assert [e.target for e in split.examples] == ["AB", "A"]
    assert split.examples[0].prompt == question + "\n\n请用选项的字母直接回答，不要输出其他信息："
    assert rejected("exams/ple_pharmacy", "test") == [
        (3, "no answer"),
        (4, "the conversation is not human and gpt in turn"),
        (5, "no conversation"),
    ]


# --- images ---


def llava(image: str, *values: str, **other: str) -> dict[str, Any]:
    return {"id": "1", "image": image, "conversations": said(*values), **other}


def images(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"jpeg")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("x/b.jpg", b"jpeg")


def test_med_moe_vqa(data: Path) -> None:
    images(data / "3vqa/images")
    closed = llava("a.jpg", "<image>\nIs it large?", "no", answer_type="CLOSED")
    opened = llava("more.zip/x/b.jpg", "What is it?\n<image>", "a nodule", answer_type="OPEN")
    whole(data / "3vqa/train_rad.json", closed, opened)
    example = only("med_moe/med_moe_rad_closed", "train")
    assert (example.prompt, example.target) == ("Is it large?", "no")
    assert example.image == str(data / "3vqa/images/a.jpg")
    example = only("med_moe/med_moe_rad_open", "train")
    assert (example.prompt, example.target) == ("What is it?", "a nodule")
    assert example.image == str(data / "3vqa/images/more.zip/x/b.jpg")


def test_each_answer_of_a_conversation_is_a_sample(data: Path) -> None:
    images(data / "images")
    row = llava("a.jpg", "<image>\nWhat is shown?", "A lung.", "Which side?", "Left.", "Sure?", "Yes.")
    row["conversatons"] = row.pop("conversations")  # as Med-MoE's reader allows
    whole(data / "llava_med_instruct_60k_inline_mention.json", row, llava("a.jpg", "And?", "That."))
    examples = load("med_moe/llava_med_instruct", "train").examples
    assert [(e.prompt, e.target) for e in examples] == [
        ("What is shown?", "A lung."),
        ("User: What is shown?\nAssistant: A lung.\nWhich side?", "Left."),
        ("User: What is shown?\nAssistant: A lung.\nUser: Which side?\nAssistant: Left.\nSure?", "Yes."),
        ("And?", "That."),
    ]


def test_an_image_has_to_be_there(data: Path) -> None:
    images(data / "3vqa/images")
    names = ["none.jpg", "more.zip/none.jpg", "none.zip/b.jpg", "../images/a.jpg", "/a.jpg", "", "a.jpg"]
    rows = [llava(name, "Is it?", "yes", answer_type="CLOSED") for name in names]
    lacking = {k: v for k, v in rows[-1].items() if k != "image"}
    unanswered = llava("a.jpg", "Is it?", "yes", "And?", answer_type="CLOSED")
    whole(data / "3vqa/train_rad.json", *rows, lacking, unanswered)
    assert rejected("med_moe/med_moe_rad_closed", "train") == [
        (1, "the image is missing"),
        (2, "the image is missing"),
        (3, "the archive of the image cannot be read"),
        (4, "column 'image' leads out of the folder of images"),
        (5, "column 'image' leads out of the folder of images"),
        (6, "empty column 'image'"),
        (8, "missing column 'image'"),
        (9, "the conversation does not end with an answer"),
    ]


def test_images_that_are_unpacked_later_are_found(data: Path) -> None:
    """What was rejected for want of an image is not for ever, wherever the image turns up."""
    folder, elsewhere = data / "3vqa/images", data / "disk"
    names = ["a.jpg", "more.zip/x/b.jpg", "deep/down/c.jpg", "linked/d.jpg", "more.zip/e.jpg"]
    whole(data / "3vqa/train_rad.json", *(llava(n, "Is it?", "yes", answer_type="CLOSED") for n in names))

    def found() -> list[str | None]:
        rows = load("med_moe/med_moe_rad_closed", "train", 1.0).examples
        return [str(Path(e.image or "").relative_to(folder)) for e in rows]

    with pytest.raises(DataError, match="no usable record"):
        found()
    images(folder)
    assert found() == names[:2]
    (folder / "deep/down").mkdir(parents=True)
    assert found() == names[:2]
    (folder / "deep/down/c.jpg").write_bytes(b"jpeg")
    assert found() == names[:3]
    elsewhere.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(elsewhere)
    assert found() == names[:3]
    (elsewhere / "d.jpg").write_bytes(b"jpeg")
    assert found() == names[:4]
    with zipfile.ZipFile(folder / "more.zip", "a") as archive:
        archive.writestr("e.jpg", b"jpeg")
    assert found() == names
    (folder / "a.jpg").unlink()
    assert found() == names[1:]


def test_a_store_of_images_that_are_there_is_used_again(data: Path, tmp_path: Path) -> None:
    images(data / "3vqa/images")
    whole(data / "3vqa/train_rad.json", llava("a.jpg", "Is it?", "yes", answer_type="CLOSED"))
    only("med_moe/med_moe_rad_closed", "train")
    (data / "3vqa/images/a.jpg").touch()
    only("med_moe/med_moe_rad_closed", "train")
    assert len(list((tmp_path / "cache/rows").iterdir())) == 1


def test_a_text_run_refuses_tasks_of_images(tmp_path: Path) -> None:
    section = DataSection(recipe=str(RECIPES / "med_moe.yaml"))
    chat = ChatFormat.from_folder(write_tiny_model(tmp_path / "model"), None, 64)
    with pytest.raises(
        ConfigError, match=r"must hold tasks of text only.*med_moe_rad_closed, med_moe_rad_open"
    ):
        load_tasks(section, "validation", chat)


def test_every_published_mixture_parses() -> None:
    names = {path.stem: load_mixture(path).name for path in RECIPES.glob("m*.yaml")}
    assert names == {name: name for name in ("moelora_eight", "ming_exams", "ming_moe", "med_moe")}
