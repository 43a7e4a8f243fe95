"""A record format, and a kind of file, that are new to the package work in all of it, once they are where
CONTRIBUTING.md says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny import write_tiny_model

from moe_medical.config.schema import DataSection
from moe_medical.data.batches import BatchShape, TrainingBatches
from moe_medical.data.chat import ChatFormat
from moe_medical.data.published import FORMATS, BadShape, Row, text_of
from moe_medical.data.readers import READERS, Raw
from moe_medical.data.recipe import load_task
from moe_medical.data.sources import load_split
from moe_medical.data.tasks import build_plan, load_tasks
from moe_medical.errors import ConfigError

WARD = {"case": "Fever", "asked": [["38.5?", "B"], ["dry?", "wet"]], "given": ["dry", "wet"]}
SECRET = "patient 4711"
TASK: dict[str, Any] = {
    "name": "ward",
    "kind": "multiple_choice",
    "licence": "none",
    "format": "vignette",
}


def _vignette(row: Row) -> list[Row]:
    """A case with several questions -> one row each."""
    asked = row.get("asked")
    if not isinstance(asked, list) or not asked:
        raise BadShape("column 'asked' holds no question")
    case = text_of(row, "case")
    return [
        {**row, "question": f"{case}. {question}", "answer": answer, "choices": row["given"]}
        for question, answer in asked
    ]


def _read_blocks(file: Path) -> Iterator[Raw]:
    """JSON objects, one after each line that holds a dash alone."""
    for number, block in enumerate(file.read_bytes().split(b"\n-\n"), start=1):
        try:
            yield Raw(number, block, json.loads(block))
        except ValueError:
            yield Raw(number, block, None, "invalid JSON")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places: a row in `FORMATS` of `published.py`, and one in `READERS` of `readers.py`."""
    monkeypatch.setitem(FORMATS, "vignette", _vignette)
    monkeypatch.setitem(READERS, ".blocks", _read_blocks)


def _write_task(folder: Path, *blocks: str, validation: str = json.dumps(WARD)) -> Path:
    (folder / "train.blocks").write_text("\n-\n".join(blocks), encoding="utf-8")
    (folder / "validation.jsonl").write_text(validation, encoding="utf-8")
    files = {"train": "train.blocks", "validation": "validation.jsonl"}
    path = folder / "ward.yaml"
    path.write_text(yaml.safe_dump({**TASK, "source": {"files": files}}), encoding="utf-8")
    return path


@pytest.mark.usefixtures("places")
def test_its_rows_fill_the_templates_of_the_kind(tmp_path: Path) -> None:
    spec = load_task(_write_task(tmp_path, json.dumps(WARD)))
    first, second = load_split(spec, "train", 0.0).examples
    assert first.prompt.endswith("Fever. 38.5?\nA. dry\nB. wet")
    assert second.prompt.endswith("Fever. dry?\nA. dry\nB. wet")
    assert [first.target, second.target] == ["B", "B"]
    assert list(load_split(spec, "validation", 0.0).examples)[1].prompt == second.prompt


@pytest.mark.usefixtures("places")
def test_what_is_not_of_it_is_rejected_without_its_text(tmp_path: Path) -> None:
    blocks = (json.dumps(WARD), SECRET, json.dumps({"case": SECRET, "asked": None}), json.dumps({}))
    split = load_split(load_task(_write_task(tmp_path, *blocks)), "train", 1.0)
    assert len(split.examples) == 2
    assert [(record.line, record.reason) for record in split.rejected] == [
        (2, "invalid JSON"),
        (3, "column 'asked' holds no question"),
        (4, "column 'asked' holds no question"),
    ]
    assert SECRET not in "".join(map(str, split.rejected))


@pytest.mark.usefixtures("places")
def test_a_run_trains_on_it(tmp_path: Path) -> None:
    _write_task(tmp_path, json.dumps(WARD), json.dumps({**WARD, "case": "Cough"}))
    (tmp_path / "mixture.yaml").write_text("name: new\ntasks: [ward]\n", encoding="utf-8")
    chat = ChatFormat.from_folder(write_tiny_model(tmp_path / "model"), None, 256)
    section = DataSection(str(tmp_path / "mixture.yaml"))
    tasks = load_tasks(section, "validation", chat)
    shape = BatchShape(4, 4, rank=0, world_size=1, batching="grouped", pack_length=256)
    plan = build_plan(tasks, section, seed=0, num_samples=4)
    [batch] = TrainingBatches(plan, tasks, chat, shape).step(0)
    assert batch.samples_per_task(1).tolist() == [4]
    assert int(batch.targets_per_task(1)) > 0


def test_without_these_places_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(_write_task(tmp_path, json.dumps(WARD)))
    assert "format is not known" in str(caught.value)
    assert "source.files.train must end in .jsonl" in str(caught.value)
