"""The recipes that ship: all parse, and a few of the public sets load where the data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_medical.data.recipe import TaskSpec, load_recipe, load_task
from moe_medical.data.sources import load_split

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "data_recipes"
DATA = Path(os.environ.get("MOE_MEDICAL_DATA", "unset"))

TASKS = sorted((RECIPES / "tasks").glob("*.yaml"))
MIXTURES = sorted(RECIPES.glob("*.yaml"))


@pytest.fixture
def without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_DATA", str(tmp_path))


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_task_recipe_is_valid_and_named_like_its_file(path: Path) -> None:
    spec = load_task(path)
    assert spec.name == path.stem
    assert spec.licence
    assert spec.citation


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("path", MIXTURES, ids=lambda p: p.stem)
def test_mixture_is_valid(path: Path) -> None:
    assert load_recipe(path)


@pytest.fixture
def public_tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, TaskSpec]:
    if not (DATA / "text/manifest.json").is_file():
        pytest.skip(f"no public task sets at {DATA}/text; set MOE_MEDICAL_DATA")
    monkeypatch.setenv("MOE_MEDICAL_DATA", str(DATA))
    return {spec.name: spec for spec in load_recipe(RECIPES / "public_text.yaml")}


def test_public_mixture_has_all_sets(public_tasks: dict[str, TaskSpec]) -> None:
    folders = {p.name for p in (DATA / "text").iterdir() if p.is_dir()}
    assert set(public_tasks) == folders


@pytest.mark.parametrize(
    ("name", "rows", "target", "num_choices"),
    [
        ("pubmedqa", 50, {"yes", "no", "maybe"}, {0}),
        ("medqa_usmle", 100, set("ABCDE"), {5}),
        ("zh_cmedqq", 300, {"是", "否"}, {0}),
        ("mediqa_mas", 10, None, {0}),
    ],
)
def test_public_set_loads_without_a_bad_record(
    public_tasks: dict[str, TaskSpec], name: str, rows: int, target: set[str] | None, num_choices: set[int]
) -> None:
    split = load_split(public_tasks[name], "validation", 0.0)
    assert len(split.examples) == rows
    assert split.bad == []
    assert {len(e.choices) for e in split.examples} == num_choices
    if target is not None:
        assert {e.target for e in split.examples} == target
