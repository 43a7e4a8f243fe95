"""`moe-medical data check`: what it counts, what it never says, how it ends."""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny import WORDS, write_tiny_model

from moe_medical import cli
from moe_medical.data.check import CheckReport, check_recipe
from moe_medical.data.check.measure import LENGTH_EDGES

CANARY = "kanarienvogel"
Row = tuple[str, str]
"""Prompt and target."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))


class Folder:
    """A mixture whose tasks are written row by row."""

    def __init__(self, root: Path) -> None:
        self.root, self.recipe = root, root / "mixture.yaml"
        self._tasks: list[str] = []

    def task(
        self, name: str, kind: str = "qa", keys: dict[str, Any] | None = None, **splits: Sequence[Row]
    ) -> None:
        for split, rows in splits.items():
            self.write(name, split, [{"id": f"{split}{i}", "q": q, "a": a} for i, (q, a) in enumerate(rows)])
        spec = {"name": name, "kind": kind, "prompt": "Answer.\n{q}", "target": "{a}", "id": "id"}
        files = {split: f"{name}.{split}.jsonl" for split in splits}
        spec |= {"licence": "CC0-1.0", "source": {"files": files}, **(keys or {})}
        (self.root / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        self._tasks.append(f"{name}.yaml")
        self.mixture()

    def write(self, name: str, split: str, rows: Sequence[object]) -> Path:
        path = self.root / f"{name}.{split}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    def mixture(self, **keys: object) -> None:
        self.recipe.write_text(yaml.safe_dump({"name": "ours", "tasks": self._tasks, **keys}))

    def check(self) -> CheckReport:
        return check_recipe(self.recipe, None, None)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def _texts(count: int, words: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(f"{seed} {count} {words}")
    return [" ".join(f"{rng.choice(WORDS)}{rng.randrange(50)}" for _ in range(words)) for _ in range(count)]


def _answered(texts: Sequence[str], *targets: str) -> list[Row]:
    return [(text, (targets or ("fine",))[i % max(len(targets), 1)]) for i, text in enumerate(texts)]


def _leaky(folder: Folder) -> None:
    """Two tasks: a duplicate, a conflict and a leak in `a`; `b` trains on two test rows of `a`."""
    texts = _texts(20)
    train = _answered(texts[:10], "yes", "no")
    folder.task(
        "a",
        "yes_no",
        train=[*train, train[0], (train[1][0], "maybe"), (f"{texts[10]} and more", "no")],
        test=_answered(texts[10:14], "no"),
    )
    folder.task("b", train=_answered([*texts[11:13], *_texts(8, seed=1)]), validation=_answered(texts[18:]))


def test_counts_repeats_and_overlaps(folder: Folder) -> None:
    _leaky(folder)
    report = folder.check()
    a, b = report.tasks
    assert [(t.name, s, part.rows) for t in report.tasks for s, part in t.splits.items()] == [
        *[("a", "train", 13), ("a", "test", 4), ("b", "train", 10), ("b", "validation", 2)]
    ]
    repeats = a.splits["train"].repeats
    assert (repeats.exact, repeats.conflicting, repeats.near) == (1, 1, 0)
    assert (a.splits["train"].leaking, a.splits["test"].leaking) == (1, 0)
    assert b.splits["train"].leaking == 2
    leaks = [(o.first, o.second, o.exact, o.near, o.rows_of_first) for o in report.leaks]
    assert leaks == [("b", "a", 2, 2, 2), ("a", "a", 0, 1, 1)]
    assert report.shared == []
    assert [place.split("jsonl:")[1].rpartition(":")[0] for place in a.places] == [
        "11:equals an earlier row",
        "12:equals an earlier row but for the target",
        "13:is in an evaluation split too",
    ]


def test_tells_what_the_mixtures_hygiene_would_drop(folder: Folder) -> None:
    _leaky(folder)
    assert [task.dropped for task in folder.check().tasks] == [0, 0]
    folder.mixture(hygiene={"duplicates": "drop", "overlap": "drop"})
    assert [task.dropped for task in folder.check().tasks] == [2, 2]
    folder.mixture(hygiene={"overlap": "drop", "threshold": 1.0})
    report = folder.check()
    assert [task.dropped for task in report.tasks] == [0, 2]
    assert report.hygiene["threshold"] == 1.0


def test_lengths_without_a_model_are_characters(folder: Folder) -> None:
    rows = [("x" * n, "y" * 10) for n in (*range(1, 100), 882)]
    folder.task("a", train=rows)
    report = folder.check()
    lengths = report.tasks[0].splits["train"].lengths
    extra = len("Answer.\n") + 10
    assert report.length_unit == "characters"
    assert (lengths.median, lengths.longest, lengths.over) == (50.5 + extra, 900, None)
    assert sum(lengths.histogram) == 100
    assert lengths.histogram[LENGTH_EDGES.index(724)] == 1


def test_a_base_model_counts_tokens_and_the_share_above_a_limit(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model")
    folder.task("a", train=[("w1", "w2")] * 3 + [(" ".join(["w1"] * 300), "w2")], test=[("w3", "w4")])
    out = tmp_path / "report.json"
    options = ["--base", str(model), "--max-length", "64", "--json", str(out)]
    assert cli.main(["data", "check", str(folder.recipe), *options]) == 0
    report = json.loads(out.read_text())
    lengths = report["tasks"][0]["splits"]["train"]["lengths"]
    assert (report["length_unit"], report["length_limit"], lengths["over"]) == ("tokens", 64, 0.25)
    assert lengths["longest"] > 300
    assert "25.0 %" in capsys.readouterr().out


def test_labels_of_closed_kinds_are_counted(folder: Folder) -> None:
    texts = _texts(40)
    folder.task("triage", "classification", train=_answered(texts, *["skin"] * 3, "eye\n clinic"))
    folder.task("exam", "multiple_choice", train=_answered(texts, "A", "B. aspirin", "(C)", "Aspirin"))
    folder.task("open", "qa", train=_answered(texts, "skin"))
    triage, exam, free = (task.labels for task in folder.check().tasks)
    assert triage is not None
    assert (triage.counts, triage.distinct) == ({"skin": 30, "eye clinic": 10}, 2)
    assert (triage.largest_share, triage.imbalance) == (0.75, 3.0)
    assert exam is not None
    assert exam.counts == {"A": 10, "B": 10, "C": 10, "other": 10}
    assert free is None


def test_labels_that_are_no_closed_set_are_not_shown(folder: Folder) -> None:
    texts = _texts(40)
    folder.task("many", "classification", train=_answered(texts, *(f"{CANARY} {i}" for i in range(40))))
    folder.task("long", "classification", train=_answered(texts, "short", CANARY * 10))
    folder.task("rare", "classification", train=_answered(texts, *["usual"] * 39, CANARY))
    many, long, rare = (task.labels for task in folder.check().tasks)
    assert many is not None
    assert long is not None
    assert rare is not None
    assert (many.distinct, many.counts) == (40, {})
    assert (long.distinct, long.counts) == (2, {})
    assert (rare.distinct, rare.counts) == (2, {"usual": 39})


def _spoil(path: Path, line: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


def _outputs(folder: Folder, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Exit code and everything that a check wrote."""
    page, out = folder.root / "page.html", folder.root / "report.json"
    code = cli.main(["data", "check", str(folder.recipe), "--json", str(out), "--html", str(page)])
    console = capsys.readouterr()
    return code, {
        "stdout": console.out,
        "stderr": console.err,
        "json": out.read_text(),
        "html": html.unescape(page.read_text()),
    }


def test_no_text_of_a_record_is_told(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    secret = [f"{text} {CANARY}" for text in _texts(30)]
    folder.task("a", train=_answered([*secret, *secret[:3]], CANARY), test=_answered(secret[:2], CANARY))
    folder.task("b", "classification", train=_answered(secret, *(f"{CANARY} {i}" for i in range(30))))
    folder.task("c", "multiple_choice", train=_answered(secret, f"A. {CANARY}", f"{CANARY.upper()}"))
    _spoil(folder.root / "a.train.jsonl", 5, f'{{"id": "x", "q": "{CANARY}"')
    code, told = _outputs(folder, capsys)
    assert code == 65
    assert [name for name, text in told.items() if CANARY in text.casefold()] == []
    assert "a.train.jsonl:5:invalid JSON:" in told["stdout"]


def test_findings_alone_end_with_0(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    _leaky(folder)
    code, told = _outputs(folder, capsys)
    assert code == 0
    table = re.sub(" +", " ", told["stdout"])
    assert "a yes_no 13 - 4 0 " in table
    assert "a 1 1 0 1 0\n" in table
    assert "b a 2 2 2\n" in table
    assert json.loads(told["json"])["errors"] == []


def test_a_file_that_cannot_be_used_ends_with_65_after_the_report(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    _leaky(folder)
    folder.task("gone", train=[("q", "a")], test=[("q", "a")])
    (folder.root / "gone.train.jsonl").unlink()
    code, told = _outputs(folder, capsys)
    errors = json.loads(told["json"])["errors"]
    assert code == 65
    assert len(errors) == 1
    assert "gone.train.jsonl" in errors[0]
    assert errors[0] in told["stderr"]
    assert errors[0] in told["html"]
    assert "b a 2 2 2\n" in re.sub(" +", " ", told["stdout"])


def test_too_many_bad_records_end_with_65_and_are_named(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.task("a", train=_answered(_texts(10)))
    _spoil(folder.root / "a.train.jsonl", 3, "[1]")
    _spoil(folder.root / "a.train.jsonl", 7, '{"id": "7", "a": "x"}')
    code, told = _outputs(folder, capsys)
    task = json.loads(told["json"])["tasks"][0]
    assert code == 65
    assert task["splits"]["train"]["bad"] == 2
    lines = sorted(place.rpartition(":")[0].rpartition("jsonl:")[2] for place in task["bad_places"])
    assert lines == ["3:not a JSON object", "7:missing column 'q'"]
    assert "2 of 10 records" in told["stderr"]


def test_the_page_stands_alone_and_escapes(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    _leaky(folder)
    folder.task("t", "classification", {"licence": "<b>CC</b>"}, train=_answered(_texts(10), "<i>x</i>"))
    page_file = folder.root / "page.html"
    assert cli.main(["data", "check", str(folder.recipe), "--html", str(page_file)]) == 0
    page = page_file.read_text()
    assert not re.search(r"<(script|link)\b[^>]*(src|href)=", page)
    assert page.count("vegaEmbed('#vis'") == 1
    assert "&lt;b&gt;CC&lt;/b&gt;" in page
    assert "&lt;i&gt;x&lt;/i&gt;" in page
    assert "<b>CC" not in page
    capsys.readouterr()


def test_labels_with_brackets_reach_the_console_whole(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.task("t", "classification", train=_answered(_texts(10), "[red]", "[/red]"))
    assert cli.main(["data", "check", str(folder.recipe)]) == 0
    assert "[red] 50.0 %, [/red] 50.0 %" in capsys.readouterr().out


def test_missing_data_folder_and_wrong_options_are_problems_of_the_command(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _leaky(folder)
    assert cli.main(["data", "check", str(folder.recipe), "--max-length", "64"]) == 64
    assert "--max-length needs --base" in capsys.readouterr().err
    monkeypatch.delenv("MOE_MEDICAL_DATA", raising=False)
    text = (folder.root / "b.yaml").read_text()
    (folder.root / "b.yaml").write_text(text.replace("b.train", "${oc.env:MOE_MEDICAL_DATA}/b.train"))
    assert cli.main(["data", "check", str(folder.recipe)]) == 64
    error = capsys.readouterr().err
    assert "MOE_MEDICAL_DATA" in error
    assert "Traceback" not in error


def test_images_are_measured_but_not_compared(folder: Folder) -> None:
    rows = [{"id": str(i), "q": "what is shown?", "a": "lung", "file": f"{i}.png"} for i in range(4)]
    folder.task("v", "vqa", {"image": "file"}, train=[], test=[])
    for split in ("train", "test"):
        folder.write("v", split, rows)
    for row in rows:
        (folder.root / str(row["file"])).write_bytes(b"")
    task = folder.check().tasks[0]
    assert not task.compared
    assert task.splits["train"].repeats.exact == 0
    assert task.splits["train"].leaking == 0
