"""Task kinds: what a short task YAML gets from its kind, and that prompts, targets and metrics agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_medical.data.kinds import KINDS, KNOWN_METRICS
from moe_medical.data.recipe import TaskSpec, load_task, template_columns
from moe_medical.data.rows import Example
from moe_medical.data.sources import load_split
from moe_medical.errors import ConfigError, DataError
from moe_medical.evaluation.metrics import METRICS, score

SHORT = "name: t\nkind: {kind}\nlanguage: {language}\nsource: {{files: {{train: train.jsonl}}}}\n{more}"
RELATIONS = [["DM", "treated with", "insulin"], ["DM", "finding", "polyuria"]]
EVENTS = [{"subject": "pain", "place": ["arm", "hand"], "state": ""}, {"subject": "fever"}]
ENTITIES = [["drug", "a"], {"type": "disease", "mention": "b"}, ["drug", "c"]]

ROWS = {
    ("multiple_choice", "en"): {"question": "Which?", "choices": ["x", "y"], "answer": "y"},
    ("multiple_choice", "zh"): {"question": "哪些？", "choices": ["甲", "乙", "丙"], "answer": "C、A"},
    ("yes_no", "en"): {"question": "Is it?", "answer": True},
    ("yes_no", "zh"): {"question": "是吗？", "answer": "maybe"},
    ("classification", "en"): {"text": "Cough.", "label": "lung", "choices": ["lung", "heart"]},
    ("ner", "en"): {"text": "a b c", "entities": ENTITIES},
    ("ner", "zh"): {"text": "甲", "entities": [["药物", "甲"], ["药物", "乙"]]},
    ("relation", "en"): {"text": "DM", "relations": RELATIONS},
    ("event", "en"): {"text": "Pain.", "events": EVENTS},
    ("event", "zh"): {"text": "无事", "events": []},
    ("normalisation", "en"): {"term": "heart attack", "answer": ["Myocardial infarction", "x"]},
    ("set", "zh"): {"question": "有哪些？", "items": ["甲", "乙"]},
    ("nli", "en"): {"premise": "p", "hypothesis": "h", "label": "entailment"},
    ("similarity", "zh"): {"first": "甲", "second": "乙", "score": 3},
    ("summarisation", "zh"): {"text": "长文", "summary": "短"},
    ("dialogue", "en"): {"dialogue": [["Patient", "It hurts."]], "reply": "Where?"},
    ("dialogue", "zh"): {"dialogue": [{"role": "患者", "text": "疼"}], "reply": "哪里？"},
    ("qa", "en"): {"question": "Why?", "answer": "Because."},
}
TARGETS = {
    ("multiple_choice", "en"): "B",
    ("multiple_choice", "zh"): "AC",
    ("yes_no", "en"): "yes",
    ("yes_no", "zh"): "不确定",
    ("classification", "en"): "lung",
    ("ner", "en"): "drug: a; c\ndisease: b",
    ("ner", "zh"): "药物：甲；乙",
    ("relation", "en"): "DM | treated with | insulin\nDM | finding | polyuria",
    ("event", "en"): "subject: pain | place: arm, hand\nsubject: fever",
    ("event", "zh"): "无",
    ("normalisation", "en"): "Myocardial infarction; x",
    ("set", "zh"): "甲; 乙",
    ("nli", "en"): "entailment",
    ("similarity", "zh"): "3",
    ("summarisation", "zh"): "短",
    ("dialogue", "en"): "Where?",
    ("dialogue", "zh"): "哪里？",
    ("qa", "en"): "Because.",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))


def short(folder: Path, kind: str, language: str = "en", more: str = "") -> TaskSpec:
    path = folder / "t.yaml"
    path.write_text(SHORT.format(kind=kind, language=language, more=more), encoding="utf-8")
    return load_task(path)


def example(folder: Path, spec: TaskSpec, row: dict) -> Example:
    (folder / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    [made] = load_split(spec, "train", 0.0).examples
    return made


def test_the_metrics_of_the_kinds_are_those_there_are() -> None:
    assert set(KNOWN_METRICS) == set(METRICS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_templates_in_both_languages(kind: str) -> None:
    for prompts in (KINDS[kind].prompts, KINDS[kind].prompts_with_choices):
        if prompts is not None:
            assert set(prompts) == {"en", "zh"}
            assert template_columns(prompts["en"]) == template_columns(prompts["zh"])


@pytest.mark.parametrize(("kind", "language"), ROWS)
def test_a_short_task_gets_prompt_target_and_metric(tmp_path: Path, kind: str, language: str) -> None:
    spec = short(tmp_path, kind, language)
    made = example(tmp_path, spec, ROWS[kind, language])
    assert made.target == TARGETS[kind, language]
    assert made.prompt
    assert "{" not in made.prompt
    if spec.metric not in ("spearman", "pearson"):  # one row has no correlation
        assert score(spec.metric, [made.target], [made.target], language) == 1.0


def test_options_are_lettered_and_kept(tmp_path: Path) -> None:
    spec = short(tmp_path, "multiple_choice")
    assert (spec.choices, spec.metric) == ("choices", "letter_accuracy")
    made = example(tmp_path, spec, ROWS["multiple_choice", "en"])
    assert made.choices == ("x", "y")
    assert made.prompt.endswith("Which?\nA. x\nB. y")


def test_labels_are_listed_where_the_task_names_their_column(tmp_path: Path) -> None:
    spec = short(tmp_path, "classification", more="choices: labels\n")
    made = example(tmp_path, spec, {"text": "Cough.", "label": "lung", "labels": ["lung", "heart"]})
    assert "one of: lung, heart." in made.prompt
    plain = short(tmp_path, "classification")
    assert plain.choices is None
    assert "one of" not in plain.prompt


def test_a_task_may_keep_its_own(tmp_path: Path) -> None:
    spec = short(tmp_path, "qa", "fr", "prompt: 'Q : {question}'\nmetric: exact_match\n")
    assert (spec.prompt, spec.target, spec.metric) == ("Q : {question}", "{answer}", "exact_match")


def test_a_language_without_templates_needs_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt must be given: kind qa has prompts in en, zh only"):
        short(tmp_path, "qa", "fr")


def test_a_metric_that_does_not_suit_the_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric must be one that suits kind ner.*One of: entity_f1"):
        short(tmp_path, "ner", more="metric: spearman\n")


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("multiple_choice", {"question": "q", "choices": ["x", "y"], "answer": 1}, "neither the letter nor"),
        ("multiple_choice", {"question": "q", "answer": "A"}, "missing column 'choices'"),
        ("yes_no", {"question": "q", "answer": "SECRET"}, "is not yes, no or maybe"),
        ("ner", {"text": "t", "entities": "SECRET"}, "column 'entities' is not a list"),
        ("ner", {"text": "t", "entities": [["SECRET"]]}, "needs type, mention in every entry"),
        ("event", {"text": "t", "events": ["SECRET"]}, "something that is not an object"),
        ("relation", {"text": "t"}, "missing column 'relations'"),
    ],
)
def test_a_row_that_does_not_suit_its_kind_is_rejected(
    tmp_path: Path, kind: str, row: dict, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        example(tmp_path, short(tmp_path, kind), row)
    assert "SECRET" not in str(caught.value)
