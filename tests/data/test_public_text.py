"""The recipes that ship: all parse, and the public sets load without a bad record where the data is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_medical.data.recipe import SPLITS, FilesSource, TaskSpec, load_mixture, load_task
from moe_medical.data.sources import load_split

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "data_recipes"
DATA = Path(os.environ.get("MOE_MEDICAL_DATA", "unset"))

TASKS = sorted((RECIPES / "tasks").rglob("*.yaml"))
VARIABLES = (
    "MOE_MEDICAL",
    "PROMPTCBLUE",
    "MEDQA",
    "MEDMCQA",
    "CMB",
    "CMEXAM",
    "MMLU",
    "CMMLU",
    "CEVAL",
    "MING",
)
VARIABLES += ("MED_MOE",)
MIXTURES = sorted(RECIPES.glob("*.yaml"))


@pytest.fixture
def without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(f"{variable}_DATA", str(tmp_path))


@pytest.mark.usefixtures("without_data")
def test_every_task_is_in_a_mixture_or_is_said_not_to_be() -> None:
    mixed = {spec.path for path in MIXTURES for spec in load_mixture(path).tasks}
    apart = {path.stem for path in TASKS if path.resolve() not in mixed}
    assert apart == {"medmcqa_hub", "llava_med_alignment", "llava_med_instruct"}


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
    assert load_mixture(path).tasks


@pytest.fixture(params=["text", "images"])
def public_tasks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, TaskSpec]:
    if not (DATA / request.param / "manifest.json").is_file():
        pytest.skip(f"no public task sets at {DATA}; set MOE_MEDICAL_DATA")
    monkeypatch.setenv("MOE_MEDICAL_DATA", str(DATA))
    mixture = {"text": "public_text", "images": "images"}[request.param]
    return {spec.name: spec for spec in load_mixture(RECIPES / f"{mixture}.yaml").tasks}


def test_public_sets_load_without_a_bad_record(
    public_tasks: dict[str, TaskSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path))
    rows: dict[str, int] = {}
    for spec in public_tasks.values():
        splits = {name: load_split(spec, name, 0.0) for name in SPLITS}
        assert all(not split.rejected for split in splits.values())
        assert all(
            (split.examples[0].image is not None) == (spec.image is not None) for split in splits.values()
        )
        folder = _folder(spec)
        rows[folder] = rows.get(folder, 0) + sum(len(split.examples) for split in splits.values())
    assert rows == _rows_there(spec)


def _folder(spec: TaskSpec) -> str:
    assert isinstance(spec.source, FilesSource)
    return Path(spec.source.patterns["train"][0]).parent.name


def _rows_there(spec: TaskSpec) -> dict[str, int]:
    """Rows of each set, counted by its manifest."""
    assert isinstance(spec.source, FilesSource)
    manifest = Path(spec.source.patterns["train"][0]).parents[1] / "manifest.json"
    sets = json.loads(manifest.read_text(encoding="utf-8"))
    return {one["task"]: sum(one["sizes"].values()) for one in sets}


@pytest.mark.parametrize("public_tasks", ["text"], indirect=True)
@pytest.mark.parametrize(
    ("name", "rows", "target", "num_choices"),
    [
        ("pubmedqa", 50, {"yes", "no", "maybe"}, {0}),
        ("medqa_usmle", 100, set("ABCDE"), {5}),
        ("zh_cmedqq", 300, {"是", "否"}, {0}),
        ("mediqa_mas", 10, None, {0}),
    ],
)
def test_public_set_holds(
    public_tasks: dict[str, TaskSpec], name: str, rows: int, target: set[str] | None, num_choices: set[int]
) -> None:
    split = load_split(public_tasks[name], "validation", 0.0)
    assert len(split.examples) == rows
    assert {len(e.choices) for e in split.examples} == num_choices
    if target is not None:
        assert {e.target for e in split.examples} == target
