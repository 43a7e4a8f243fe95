"""Promise P11: corrupt files of every kind are rejected by place, reason and digest, never with their text.

Every text field of every file holds the canary, and it is searched in all that is said: records, messages,
logs, and a second process's output.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.tiny import ROOT, write_tiny_model

from moe_medical.config.schema import DataSection
from moe_medical.data.chat import ChatFormat
from moe_medical.data.recipe import load_task
from moe_medical.data.sources import Split, load_split
from moe_medical.data.tasks import TOO_LONG, load_tasks
from moe_medical.errors import DataError

CANARY = "Zyxwv of Elm Street"
GOOD = 8
PLACE = 3
"""The bad record comes after so many good ones."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _row(i: int, **changes: Any) -> dict[str, Any]:
    return {"id": f"{CANARY} {i}", "q": f"{CANARY} asks {i}", "a": f"{CANARY} yes", **changes}


def _without(column: str) -> dict[str, Any]:
    return {key: value for key, value in _row(99).items() if key != column}


LINES: dict[str, object] = {
    "invalid JSON": f'{{"id": "9", "q": "{CANARY}'.encode(),
    "not a JSON object": f'["{CANARY}"]'.encode(),
    "invalid UTF-8": f'{{"id": "9", "q": "{CANARY}'.encode() + b'\xff", "a": "x"}',
    "NUL byte": f'{{"id": "9", "q": "{CANARY}'.encode() + b'\0", "a": "x"}',
}
"""What only a line of JSON can be."""
VALUES: dict[str, dict[str, Any]] = {
    "missing column 'q'": _without("q"),
    "missing column 'id'": _without("id"),
    "empty target": _row(99, a=" \n"),
    "empty prompt": _row(99, q=""),
    "empty column 'id'": _row(99, id=""),
    "column 'a' is null": _row(99, a=None),
    "column 'a' is of type dict": _row(99, a={CANARY: CANARY}),
    "column 'a' is not a finite number": _row(99, a=float("nan")),
    "NUL character in column 'q'": _row(99, q=f"{CANARY}\0"),
    "invalid Unicode in column 'q'": _row(99, q=f"{CANARY}\ud800"),
    "duplicate id": _row(0),
}
CELLS = {
    "invalid UTF-8": f"9,{CANARY}".encode() + b"\xff,yes",
    "NUL character in column 'q'": f"9,{CANARY}".encode() + b"\0,yes",
    "empty target": f"9,{CANARY}, ".encode(),
    "empty prompt": f"9,,{CANARY}".encode(),
    "empty column 'id'": f",{CANARY},{CANARY}".encode(),
    "more or fewer cells than the header": f"9,{CANARY}".encode(),
    "duplicate id": f"{CANARY} 0,{CANARY},{CANARY}".encode(),
}
PARQUET_COLUMNS = {
    "column 'a' is null": pa.array([None], pa.string()),
    "empty target": pa.array([" "]),
    "NUL character in column 'a'": pa.array([f"{CANARY}\0"]),
    "invalid UTF-8": pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    ),
}
JSON_VALUES = {"not a JSON object": [CANARY], **VALUES}


def _write_jsonl(path: Path, bad: object) -> None:
    rows = [_row(i) for i in range(GOOD)]
    lines = [json.dumps(row).encode() for row in rows]
    lines.insert(PLACE, bad if isinstance(bad, bytes) else json.dumps(bad).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")


def _write_json(path: Path, bad: object) -> None:
    rows: list[Any] = [_row(i) for i in range(GOOD)]
    path.write_text(json.dumps([*rows[:PLACE], bad, *rows[PLACE:]], indent=1))


def _write_csv(path: Path, bad: object) -> None:
    assert isinstance(bad, bytes)
    lines = [",".join(map(str, _row(i).values())).encode() for i in range(GOOD)]
    lines.insert(PLACE, bad)
    path.write_bytes(b"\n".join([b"id,q,a", *lines]) + b"\n")


def _write_tsv(path: Path, bad: object) -> None:
    _write_csv(path, bad)
    path.write_bytes(path.read_bytes().replace(b",", b"\t"))


def _write_parquet(path: Path, bad: object) -> None:
    good = pa.Table.from_pylist([_row(i) for i in range(GOOD)])
    table = pa.table({"id": ["9"], "q": [CANARY], "a": bad})
    pq.write_table(pa.concat_tables([good[:PLACE], table, good[PLACE:]]), path)


Case = tuple[Callable[[Path, object], None], str, str, object]
CASES: list[Case] = [
    *((_write_jsonl, "jsonl", reason, bad) for reason, bad in {**LINES, **VALUES}.items()),
    *((_write_json, "json", reason, bad) for reason, bad in JSON_VALUES.items()),
    *((_write_csv, "csv", reason, bad) for reason, bad in CELLS.items()),
    *((_write_tsv, "tsv", reason, bad) for reason, bad in CELLS.items()),
    *((_write_parquet, "parquet", reason, bad) for reason, bad in PARQUET_COLUMNS.items()),
]


def _spec(folder: Path, file: Path) -> Path:
    task = {"name": "t", "kind": "generation", "metric": "exact_match", "prompt": "{q}", "target": "{a}"}
    files = dict.fromkeys(("train", "validation"), file.name)
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump({**task, "id": "id", "source": {"files": files}}))
    return path


def _load(file: Path, most: float) -> Split:
    return load_split(load_task(_spec(file.parent, file)), "train", most)


@pytest.mark.parametrize(("write", "suffix", "reason", "bad"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_a_bad_record_is_rejected_or_fatal(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Path, object], None],
    suffix: str,
    reason: str,
    bad: object,
) -> None:
    file = tmp_path / f"x.{suffix}"
    write(file, bad)
    caplog.set_level(logging.DEBUG)
    split = _load(file, most=0.2)
    assert [e.prompt for e in split.examples] == [f"{CANARY} asks {i}" for i in range(GOOD)]
    [record] = split.rejected
    line = PLACE + (2 if suffix in ("csv", "tsv") else 1)
    assert re.fullmatch(rf"{re.escape(str(file))}:{line}:{re.escape(reason)}:[0-9a-f]{{12}}", str(record))
    assert _load(file, most=0.2).rejected == [record]  # from the store
    with pytest.raises(DataError) as caught:
        _load(file, most=0.1)
    told = "".join(traceback.format_exception(caught.value))
    assert f"1 of {GOOD + 1} records of {file} cannot be used (1 x {reason})" in told
    assert f"The first is at line {line}." in told
    assert caught.value.exit_code == 65
    for said in (str(record), repr(record), told, caplog.text):
        assert CANARY.split()[0] not in said


def _cut(path: Path, write: Callable[[Path], object], keep: float) -> None:
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _table(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([_row(i) for i in range(GOOD)]), path)


def _flipped(path: Path) -> None:
    """Damage in the middle of the data, behind an intact footer."""
    _table(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"\x15\x00")  # the first page header
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))


BROKEN: dict[str, Callable[[Path], None]] = {
    "cut.parquet": lambda path: _cut(path, _table, 0.7),
    "damaged.parquet": _flipped,
    "empty.parquet": lambda path: path.write_bytes(b"") and None,
    "text.parquet": lambda path: path.write_text(CANARY * 9) and None,
    "cut.json": lambda path: _cut(path, lambda p: _write_json(p, _row(99)), 0.7),
    "one.json": lambda path: path.write_text(json.dumps(_row(0), indent=1)) and None,
    "latin1.json": lambda path: path.write_bytes(b'[{"q": "' + CANARY.encode() + b'\xe9"}]') and None,
    "quote.csv": lambda path: path.write_text(f'id,q,a\n1,"{CANARY},yes\n2,x,no\n') and None,
    "twice.csv": lambda path: path.write_text(f"q,q\n{CANARY},x\n") and None,
    "empty.jsonl": lambda path: path.write_text("\n\n") and None,
    "headless.csv": lambda path: path.write_text(f"{CANARY},{CANARY} b,c\nx,y,z\n") and None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_broken_as_a_whole_is_fatal(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = tmp_path / name
    BROKEN[name](file)
    caplog.set_level(logging.DEBUG)
    for _ in range(2):  # nothing half-built is found the second time
        with pytest.raises(DataError) as caught:
            _load(file, most=1.0)
        told = "".join(traceback.format_exception(caught.value)) + caplog.text
        assert str(file) in str(caught.value)
        assert CANARY.split()[0] not in told
        assert [p for p in (cache / "rows").iterdir() if not p.name.startswith(".")] == []


def test_a_last_line_that_is_cut_off(tmp_path: Path) -> None:
    for suffix, reason in (("jsonl", "invalid JSON"), ("csv", "more or fewer cells than the header")):
        file = tmp_path / f"x.{suffix}"
        lines = [json.dumps(_row(i)) if suffix == "jsonl" else f"{i},{CANARY},yes" for i in range(GOOD)]
        header = [] if suffix == "jsonl" else ["id,q,a"]
        file.write_text("\n".join([*header, *lines])[:-5])
        split = _load(file, most=0.2)
        assert [(b.line, b.reason) for b in split.rejected] == [(GOOD + len(header), reason)]
        assert len(split.examples) == GOOD - 1


# Over-long targets, counts per task, and the same in another process

_CHILD = """
import json, logging, sys
from pathlib import Path
from moe_medical.config.schema import DataSection
from moe_medical.data.chat import ChatFormat
from moe_medical.data.tasks import load_tasks
logging.basicConfig(level=logging.DEBUG)
recipe, model = sys.argv[1:]
section = DataSection(recipe, max_bad_fraction=0.5)
tasks = load_tasks(section, "validation", ChatFormat.from_folder(Path(model), None, 96))
told = {t.name: [list(map(str, t.rejected())), t.rejected_counts(), len(t.train)] for t in tasks}
print(json.dumps(told))
"""


def _recipe(folder: Path) -> Path:
    _write_jsonl(folder / "x.jsonl", LINES["invalid JSON"])
    _spec(folder, folder / "x.jsonl")
    long = "Zyxwv " * 200
    rows = [_row(0), _row(1, a=long), _row(2), _row(3, a=""), _row(4, a=long), _row(2)]
    (folder / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load((folder / "t.yaml").read_text())
    task |= {"name": "u", "source": {"files": {"train": "u.jsonl", "validation": "x.jsonl"}}}
    (folder / "u.yaml").write_text(yaml.safe_dump(task))
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"name": "m", "tasks": ["t.yaml", "u.yaml"]}))
    return folder / "mixture.yaml"


def test_counted_per_task_and_the_same_in_a_second_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, model = _recipe(tmp_path), write_tiny_model(tmp_path / "model")
    chat = ChatFormat.from_folder(model, None, 96)
    with caplog.at_level(logging.DEBUG):
        tasks = load_tasks(DataSection(str(recipe), max_bad_fraction=0.5), "validation", chat)
    assert [t.rejected_counts() for t in tasks] == [
        {"invalid JSON": 2},
        {"empty target": 1, "duplicate id": 1, "invalid JSON": 1, TOO_LONG: 2},
    ]
    here = [list(map(str, t.rejected())) for t in tasks]
    assert [(line.split(":")[1:3]) for line in here[1] if TOO_LONG in line] == [
        ["2", TOO_LONG],
        ["5", TOO_LONG],
    ]
    assert all(re.fullmatch(r".+:\d+:[^:]+:[0-9a-f]{12}", line) for line in [*here[0], *here[1]])
    assert f"u: 5 records rejected: 1 x empty target, 1 x duplicate id, 1 x invalid JSON, 2 x {TOO_LONG}" in (
        caplog.text
    )
    command = [sys.executable, "-c", _CHILD, str(recipe), str(model)]
    for cache in (tmp_path / "cache", tmp_path / "other"):  # from the store, and built again
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MOE_MEDICAL_CACHE": str(cache)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        expected = [[lines, t.rejected_counts(), len(t.train)] for lines, t in zip(here, tasks, strict=True)]
        assert list(json.loads(done.stdout).values()) == expected
        assert "Zyxwv" not in done.stdout + done.stderr + caplog.text
