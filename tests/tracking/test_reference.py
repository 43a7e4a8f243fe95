"""Reference files: read to the last field or refused with every problem, and gains of the right sign."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_medical.errors import ConfigError
from moe_medical.tracking.reference import Reference, TaskReference, load_reference, relative_gain

REFERENCE = Reference(
    run="ward",
    tokens=5000,
    single={
        "ner": TaskReference(0.8, 0.5, "entity_f1", 4000, 12),
        "qa": TaskReference(1.6, None, "accuracy", 1000, 3),
    },
    multi={"ner": TaskReference(0.9, 0.4, "entity_f1", 4000, 15)},
    trainable_parameters={"run": 100, "single": 40, "multi": None},
    settings={"learning_rate": 0.01},
)


def written(folder: Path, data: Any) -> Path:
    path = folder / "reference.json"
    path.write_text(json.dumps(data))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = REFERENCE.to_json()
    assert data["format"] == 1
    assert load_reference(written(tmp_path, data), ["ner", "qa"]) == REFERENCE
    alone = Reference("ward", 5000, REFERENCE.single)
    assert load_reference(str(written(tmp_path, alone.to_json())), ["qa"]) == alone


def test_gains_are_positive_where_the_run_is_better() -> None:
    """Lower is better for losses, higher for scores, and for scores below 0 too."""
    assert REFERENCE.loss_gain("ner", 0.6) == pytest.approx(0.25)
    assert REFERENCE.loss_gain("ner", 1.0) == pytest.approx(-0.25)
    assert REFERENCE.score_gain("ner", 0.6) == pytest.approx(0.2)
    assert REFERENCE.score_gain("ner", 0.4) == pytest.approx(-0.2)
    assert relative_gain(-0.1, -0.2, higher_is_better=True) == pytest.approx(0.5)


def test_what_cannot_be_compared_is_not_a_number() -> None:
    gains = [
        REFERENCE.loss_gain("icd", 1.0),
        REFERENCE.loss_gain("ner", math.nan),
        REFERENCE.score_gain("icd", 1.0),
        REFERENCE.score_gain("qa", 1.0),
        REFERENCE.score_gain("ner", None),
        relative_gain(0.5, 0.0, higher_is_better=True),
    ]
    assert all(math.isnan(gain) for gain in gains)


def test_tasks_that_are_missing_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moe_medical.tracking.reference"):
        load_reference(written(tmp_path, REFERENCE.to_json()), ["ner", "icd", "qa", "triage"])
    assert len(caplog.records) == 1
    assert "no reference for 2 tasks: icd, triage" in caplog.text
    caplog.clear()
    load_reference(written(tmp_path, REFERENCE.to_json()), ["ner"])
    assert not caplog.records


def test_a_file_of_other_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"single must hold a task of this run.*'ner, qa'"):
        load_reference(written(tmp_path, REFERENCE.to_json()), ["icd"])


def edited(change: Callable[[dict], object]) -> dict:
    data = json.loads(json.dumps(REFERENCE.to_json()))
    change(data)
    return data


WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "another format": (lambda d: d.update(format=2), "format must be 1, got 2"),
    "no format": (lambda d: d.pop("format"), "format must be 1"),
    "a part missing": (lambda d: d.pop("tokens"), "tokens must be given"),
    "a part too many": (lambda d: d.update(extra=1), "extra is not known"),
    "a text for a number": (
        lambda d: d["single"]["ner"].update(loss="low"),
        "single.ner.loss must be a whole number or a number, got 'str'",
    ),
    "a truth value for a number": (
        lambda d: d["single"]["ner"].update(loss=True),
        "single.ner.loss must be a whole number or a number, got 'bool'",
    ),
    "a loss that is none": (
        lambda d: d["single"]["ner"].update(loss=math.nan),
        "single.ner.loss must be finite",
    ),
    "a score that is none": (
        lambda d: d["single"]["ner"].update(score=math.inf),
        "single.ner.score must be finite",
    ),
    "a loss below 0": (lambda d: d["multi"]["ner"].update(loss=-1.0), "multi.ner.loss must be finite and"),
    "a score of text": (lambda d: d["single"]["qa"].update(score="1"), "single.qa.score must be"),
    "a fraction of a step": (
        lambda d: d["single"]["qa"].update(steps=1.5),
        "single.qa.steps must be a whole",
    ),
    "a task that is a list": (lambda d: d["single"].update(qa=[]), "single.qa must be a table, got 'list'"),
    "tasks in a list": (lambda d: d.update(single=[]), "single must be a table, got 'list'"),
    "parameters of text": (
        lambda d: d["trainable_parameters"].update(run="many"),
        "trainable_parameters.run must be a whole number or null",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    path = written(tmp_path, edited(change))
    with pytest.raises(ConfigError) as raised:
        load_reference(path, ["ner"])
    assert message in str(raised.value)
    assert raised.value.source == str(path)
    assert "moe-medical baseline" in str(raised.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    def change(data: dict) -> None:
        data["single"]["ner"].update(loss=None, steps="x")
        del data["single"]["qa"]["metric"]
        data["multi"]["ner"]["tokens"] = -1

    with pytest.raises(ConfigError) as raised:
        load_reference(written(tmp_path, edited(change)), ["ner"])
    assert [p.path for p in raised.value.problems] == [
        *("single.ner.loss", "single.ner.steps", "single.qa.metric", "multi.ner.tokens")
    ]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b"\x80\x04K\x01."]
)
def test_a_file_that_is_no_reference_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "reference.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="must be"):
        load_reference(path, ["ner"])


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable file"):
        load_reference(tmp_path / "lost.json", ["ner"])
