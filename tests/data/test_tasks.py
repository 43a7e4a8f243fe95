"""The tasks of a run: overrides, repeat caps, and rows whose target does not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.tiny import write_tiny_model, write_tiny_tasks

from moe_medical.config.schema import DataSection, MixSection, TaskOverride
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import TOO_LONG, TaskData, build_plan, load_tasks
from moe_medical.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.from_folder(write_tiny_model(tmp_path_factory.mktemp("model")), None, 96)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_tasks(tmp_path / "tasks")


def _edit(path: Path, **keys: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))


def _load(recipe: Path, chat: ChatFormat, **overrides: TaskOverride) -> list[TaskData]:
    return load_tasks(DataSection(str(recipe), tasks=overrides), "validation", chat)


def test_tasks_come_in_recipe_order_with_both_splits(recipe: Path, chat: ChatFormat) -> None:
    tasks = _load(recipe, chat)
    assert [(t.name, len(t.train), len(t.evaluation)) for t in tasks] == [
        ("last_word", 80, 12),
        ("even", 20, 8),
    ]
    files = {split: [Path(name).name for name in of] for split, of in tasks[1].fingerprints.items()}
    assert files == {"train": ["even.train.jsonl"], "evaluation": ["even.validation.jsonl"]}


def test_every_unknown_override_is_told_with_the_tasks_there_are(recipe: Path, chat: ChatFormat) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(recipe, chat, evn=TaskOverride(), even=TaskOverride(), last=TaskOverride())
    fix = "Tasks there: even, last_word."
    assert str(caught.value).splitlines()[1:] == [
        f"  data.tasks.evn is not a task of {recipe}. {fix}",
        f"  data.tasks.last is not a task of {recipe}. {fix}",
    ]


def test_only_some_tasks_are_taken_in_recipe_order_and_cleaned_with_all(
    recipe: Path, chat: ChatFormat
) -> None:
    both = DataSection(str(recipe), only=["even", "last_word"])
    assert [t.name for t in load_tasks(both, "validation", chat)] == ["last_word", "even"]
    twin = json.loads((recipe.parent / "even.train.jsonl").read_text().splitlines()[3])
    with (recipe.parent / "last_word.test.jsonl").open("a") as file:
        file.write(json.dumps(twin | {"id": "twin"}) + "\n")
    for name in ("even", "last_word"):  # the same prompt, so that a row of one repeats one of the other
        _edit(recipe.parent / f"{name}.yaml", prompt="{input}")
    _edit(recipe, hygiene={"overlap": "drop"})
    (even,) = load_tasks(DataSection(str(recipe), only=["even"]), "validation", chat)
    (whole,) = [t for t in load_tasks(DataSection(str(recipe)), "validation", chat) if t.name == "even"]
    assert even.name == "even"
    assert len(even.train) == len(whole.train) < 20


def test_an_unknown_task_among_the_only_ones_is_told(recipe: Path, chat: ChatFormat) -> None:
    section = DataSection(str(recipe), only=["even", "odd"], tasks={"even": TaskOverride(weight=0)})
    with pytest.raises(ConfigError) as caught:
        load_tasks(section, "validation", chat)
    assert str(caught.value).splitlines()[1:] == [
        f"  data.only.odd is not a task of {recipe}. Tasks there: even, last_word.",
        "  data.tasks give every task weight 0. Leave one above 0.",
    ]


def test_all_weights_zero_is_refused_but_one_may_be(recipe: Path, chat: ChatFormat) -> None:
    off = TaskOverride(weight=0)
    with pytest.raises(ConfigError, match=r"data\.tasks give every task weight 0\. Leave one above 0\."):
        _load(recipe, chat, even=off, last_word=off)
    section = DataSection(str(recipe), tasks={"even": off}, mix=MixSection(max_repeats=None))
    counts = build_plan(load_tasks(section, "test", chat), section, 1, 100).counts(100)
    assert counts.tolist() == [100, 0]


def test_weights_of_run_and_task_multiply(recipe: Path, chat: ChatFormat) -> None:
    _edit(recipe.parent / "even.yaml", weight=3.0)
    section = DataSection(str(recipe), tasks={"even": TaskOverride(weight=0.5)})
    section.mix = MixSection("uniform", max_repeats=None, block=10)
    tasks = load_tasks(section, "test", chat)
    assert [t.weight for t in tasks] == [1.0, 1.5]
    assert build_plan(tasks, section, 1, 100).counts(100).tolist() == [40, 60]


def test_a_cap_of_the_run_beats_the_tasks_and_that_the_mixtures(recipe: Path, chat: ChatFormat) -> None:
    def cap() -> float | None:
        section = DataSection(str(recipe), tasks={"even": TaskOverride(max_repeats=run)})
        section.mix.max_repeats = mix
        return load_tasks(section, "test", chat)[1].max_repeats

    run, mix = None, 2.0
    assert cap() == 2.0
    _edit(recipe.parent / "even.yaml", max_repeats=3.0)
    assert cap() == 3.0
    run = 1.5
    assert cap() == 1.5
    run, mix = None, None
    assert cap() == 3.0


def test_a_capped_task_is_spread_over_the_run(recipe: Path, chat: ChatFormat) -> None:
    section = DataSection(str(recipe), tasks={"even": TaskOverride(max_repeats=1)})
    section.mix = MixSection("uniform", max_repeats=None, block=10)
    plan = build_plan(load_tasks(section, "test", chat), section, 1, 100)
    halves = plan.counts(50), plan.counts(100) - plan.counts(50)
    assert np.array(halves).tolist() == [[40, 10], [40, 10]]


def _append(recipe: Path, split: str, target: str, count: int = 1) -> None:
    with (recipe.parent / f"even.{split}.jsonl").open("a") as file:
        for i in range(count):
            file.write(json.dumps({"id": f"long-{i}-{len(target)}", "input": "w1", "output": target}) + "\n")


def test_rows_whose_target_does_not_fit_are_rejected(
    recipe: Path, chat: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    _append(recipe, "train", "yes " * 100)
    _append(recipe, "validation", "发热 " * 60, count=2)
    with caplog.at_level(logging.INFO):
        task = _load(recipe, chat)[1]
    assert (len(task.train), len(task.evaluation)) == (20, 8)
    assert task.rejected_counts() == {TOO_LONG: 3}
    assert [(Path(b.file).name, b.line, b.reason) for b in task.rejected()] == [
        ("even.train.jsonl", 21, TOO_LONG),
        *(("even.validation.jsonl", line, TOO_LONG) for line in (9, 10)),
    ]
    assert f"even: 3 records rejected: 3 x {TOO_LONG}" in caplog.text
    assert "yes yes" not in caplog.text


def test_every_row_that_is_kept_can_be_encoded(recipe: Path, chat: ChatFormat) -> None:
    """Targets of one token per character, around the limit: no run may die of one in its middle."""
    limit = chat.max_target_tokens
    for length in range(limit - 3, limit + 3):
        _append(recipe, "train", "~!" * (length // 2) + "~" * (length % 2))
    kept = _load(recipe, chat)[1].train
    lengths = [len(chat.encode(e.prompt, e.target).input_ids) for e in kept]
    assert max(lengths) <= 96
    assert sorted(len(e.target) for e in kept)[20:] == [limit - 3, limit - 2, limit - 1]


def test_a_split_without_a_row_that_fits_is_refused(recipe: Path, chat: ChatFormat) -> None:
    (recipe.parent / "even.validation.jsonl").write_text("")
    _append(recipe, "validation", "no " * 100)
    with pytest.raises(
        DataError, match=r"even\.yaml: no row is left whose target fits data\.max_length \(96\)"
    ):
        load_tasks(DataSection(str(recipe), max_length=96), "validation", chat)


def test_what_the_mixtures_hygiene_drops_is_not_trained_on(
    recipe: Path, chat: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    folder = recipe.parent
    rows = [json.loads(line) for line in (folder / "even.train.jsonl").read_text().splitlines()]
    leak = json.loads((folder / "even.test.jsonl").read_text().splitlines()[0])
    copies = [
        {**rows[4], "id": "copy"},
        {**leak, "id": "leak"},
        {**rows[2], "id": "long", "output": "no " * 100},
    ]
    (folder / "even.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*copies, *rows]))
    _edit(folder / "even.yaml", id="id")
    plain = _load(recipe, chat)[1]
    assert [len(plain.train), plain.train[0].id, plain.train[1].id] == [22, "copy", "leak"]
    _edit(recipe, hygiene={"duplicates": "drop", "overlap": "drop"})
    caplog.clear()
    with caplog.at_level(logging.INFO):
        cleaned = _load(recipe, chat)
        again = _load(recipe, chat)
    train = cleaned[1].train
    ids = [e.id for e in train]
    assert "leak" not in ids  # a row of the test split, which this run does not read otherwise
    assert "copy" in ids
    assert rows[4]["id"] not in ids
    assert ids == [e.id for e in again[1].train]
    assert cleaned[1].rejected_counts() == {TOO_LONG: 1}
    assert caplog.text.count("even: ") == 3  # what is rejected is logged twice, the comparison is made once
    tokens = cleaned[1].tokens
    assert tokens.encoded([0]) == [chat.encode(train[0].prompt, train[0].target)]
