"""Files -> examples: every format, every kind of bad record, and no record text in any message."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_medical.data.recipe import BuilderSource, FilesSource, HubSource, Source, TaskSpec
from moe_medical.data.sources import Split, load_split
from moe_medical.errors import DataError

SECRET = "Mrs Jones of Elm Street"
ROWS = [
    {"id": "1", "q": "Fever?", "a": "yes", "options": ["yes", "no"]},
    {"id": "2", "q": "发热", "a": "no", "options": ["yes", "no"]},
]


def task(folder: Path, source: Source, **changes: object) -> TaskSpec:
    given = {"prompt": "Q: {q}", "target": "{a}", "id": "id", "choices": "options", **changes}
    return TaskSpec("t", "yes_no", "accuracy", folder / "t.yaml", source, **given)  # type: ignore[arg-type]


def load(file: Path, max_bad_fraction: float = 0.0, **changes: object) -> Split:
    spec = task(file.parent, FilesSource({"train": (str(file),)}), **changes)
    return load_split(spec, "train", max_bad_fraction)


def jsonl(path: Path, *rows: object) -> Path:
    lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_table(path: Path, delimiter: str) -> None:
    lines = [["id", "q", "a", "options"]]
    quoted = '"[""yes"", ""no""]"'
    lines += [[row["id"], row["q"], row["a"], quoted] for row in ROWS]
    path.write_text("\n".join(delimiter.join(cells) for cells in lines), encoding="utf-8")


def write(path: Path) -> Path:
    if path.suffix in (".jsonl", ".ndjson"):
        jsonl(path, *ROWS)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write_table(path, "\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"x.{suffix}")
    split = load(file)
    assert [(e.task, e.id, e.prompt, e.target, e.choices) for e in split.examples] == [
        ("t", "1", "Q: Fever?", "yes", ("yes", "no")),
        ("t", "2", "Q: 发热", "no", ("yes", "no")),
    ]
    assert split.rejected == []
    [(name, fingerprint)] = split.fingerprints.items()
    assert (name, fingerprint.sha256) == (str(file), hashlib.sha256(file.read_bytes()).hexdigest())


def test_lists_numbers_and_missing_id(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"q": 2, "a": ["x", 1.5, True]})
    [example] = load(file, id=None, choices=None).examples
    assert (example.id, example.prompt, example.target) == ("x.jsonl:1", "Q: 2", "x; 1.5; true")


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    first, second = (json.dumps(row).encode() for row in ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n" + second)
    assert len(load(file).examples) == 2


GOOD = ROWS[0]
BAD = {
    "invalid JSON": b'{"id": "9", "q": "%s' % SECRET.encode(),
    "not a JSON object": b'["%s"]' % SECRET.encode(),
    "invalid UTF-8": b'{"q": "%s\xff"}' % SECRET.encode(),
    "NUL byte": b'{"q": "%s\x00"}' % SECRET.encode(),
    "NUL character in column 'q'": {**GOOD, "id": "9", "q": SECRET + "\0"},
    "invalid Unicode in column 'q'": json.dumps({**GOOD, "id": "9", "q": SECRET + "\ud800"}).encode(),
    "missing column 'q'": {"id": "9", "a": SECRET, "options": []},
    "column 'a' is null": {**GOOD, "id": "9", "a": None},
    "column 'a' is of type dict": {**GOOD, "id": "9", "a": {SECRET: 1}},
    "column 'a' is not a finite number": b'{"id": "9", "q": "x", "a": NaN, "options": []}',
    "column 'options' is not a list": {**GOOD, "id": "9", "options": SECRET},
    "empty target": {**GOOD, "id": "9", "q": SECRET, "a": " "},
    "empty column 'id'": {**GOOD, "id": "", "q": SECRET},
    "duplicate id": {**GOOD, "q": SECRET},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_record_is_rejected_without_its_text(tmp_path: Path, reason: str) -> None:
    file = jsonl(tmp_path / "x.jsonl", GOOD, BAD[reason], ROWS[1])
    split = load(file, max_bad_fraction=0.5)
    assert [e.id for e in split.examples] == ["1", "2"]
    [bad] = split.rejected
    digest = hashlib.sha256(file.read_bytes().splitlines()[1]).hexdigest()[:12]
    assert (bad.file, bad.line, bad.reason, bad.digest) == (str(file), 2, reason, digest)
    assert str(bad) == f"{file}:2:{reason}:{digest}"


@pytest.mark.parametrize("reason", BAD)
def test_too_many_bad_records_stop_the_run(tmp_path: Path, reason: str) -> None:
    file = jsonl(tmp_path / "x.jsonl", GOOD, BAD[reason], ROWS[1])
    with pytest.raises(DataError) as caught:
        load(file, max_bad_fraction=0.3)
    message = str(caught.value)
    assert f"1 of 3 records of {file}" in message
    assert f"1 x {reason}" in message
    assert "line 2" in message
    assert "t.yaml: source.files.train" in message
    assert SECRET not in message
    assert caught.value.__cause__ is None


def test_deeply_nested_json_is_a_bad_record(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", GOOD, b"[" * 100_000, ROWS[1])
    assert [b.reason for b in load(file, max_bad_fraction=0.5).rejected] == ["invalid JSON"]


def test_ids_are_unique_over_all_files_of_a_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl")
    spec = task(tmp_path, FilesSource({"train": (str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"))}))
    split = load_split(spec, "train", 1.0)
    assert [e.id for e in split.examples] == ["1", "2"]
    assert [(Path(b.file).name, b.reason) for b in split.rejected] == [("b.jsonl", "duplicate id")] * 2
    assert [Path(f).name for f in split.fingerprints] == ["a.jsonl", "b.jsonl"]


def test_column_that_no_record_has(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl")
    with pytest.raises(DataError) as caught:
        load(file, prompt="{question}")
    path = tmp_path / "t.yaml"
    assert str(caught.value) == (
        f"{path}: prompt: column 'question' is not in {file}; columns there: id, q, a, options"
    )


def test_columns_of_a_headless_table_are_not_quoted(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(f"1,{SECRET},yes\n2,other,no\n")
    with pytest.raises(DataError, match="column 'q' is not in") as caught:
        load(file, id=None, choices=None)
    assert "Jones" not in str(caught.value)


def test_a_report_longer_than_pythons_own_limit_for_a_cell(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text(f"id,q,a\n1,{'long ' * 30_000},yes\n")
    [example] = load(file, choices=None).examples
    assert len(example.prompt) > 131_072


BROKEN_TABLES = {
    "ragged": (b"id,q,a\n1,x\n2,y,no\n", "more or fewer cells than the header"),
    "latin1": ("id,q,a\n1,é,yes\n2,y,no\n".encode("latin1"), "invalid UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN_TABLES)
def test_bad_rows_of_a_table(tmp_path: Path, name: str) -> None:
    data, reason = BROKEN_TABLES[name]
    file = tmp_path / "x.csv"
    file.write_bytes(data)
    split = load(file, max_bad_fraction=0.5, choices=None)
    assert [e.id for e in split.examples] == ["2"]
    assert [(b.line, b.reason) for b in split.rejected] == [(2, reason)]


UNREADABLE = {
    "x.json": b'[{"q": "' + SECRET.encode(),
    "y.json": b'{"q": 1}',
    "z.json": b"\xff",
    "x.csv": b'id,q,a\n1,"' + SECRET.encode(),
    "y.csv": b"q,q\n1,2\n",
    "x.parquet": b"PAR1" + SECRET.encode(),
    "empty.jsonl": b"",
    "empty.csv": b"",
    "header.csv": b"id,q,a,options\n",
    "empty.json": b"[]",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_or_empty_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(UNREADABLE[name])
    with pytest.raises(DataError) as caught:
        load(file)
    message = str(caught.value)
    assert str(file) in message
    assert "t.yaml: source.files.train" in message
    assert SECRET not in message
    assert caught.value.__cause__ is None


def test_missing_file_and_missing_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.yaml: source\.files\.train matches no file: .*none\.jsonl"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"source\.files\.test is not given"):
        load_split(task(tmp_path, FilesSource({})), "test", 0.0)


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot read"):
        load(tmp_path / "x.jsonl")


def test_builder_files_take_the_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def build_task(builder: str, cache: Path) -> dict[str, Path]:
        calls.append((builder, cache))
        return {"train": jsonl(tmp_path / "train.jsonl", *ROWS)}

    fake = types.ModuleType("moe_medical.data.terminologies")
    fake.build_task = build_task  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moe_medical.data.terminologies", fake)
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))
    spec = task(tmp_path, BuilderSource("hpo/is_a"))
    assert [e.id for e in load_split(spec, "train", 0.0).examples] == ["1", "2"]
    assert calls == [("hpo/is_a", tmp_path / "cache")]
    with pytest.raises(DataError, match="makes no test split"):
        load_split(spec, "test", 0.0)


def test_hub_source_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", *ROWS)
    spec = task(tmp_path, HubSource("set", None, None, {"train": "train", "test": "test"}))
    split = load_split(spec, "train", 0.0)
    assert [(e.id, e.target, e.choices) for e in split.examples] == [
        ("1", "yes", ("yes", "no")),
        ("2", "no", ("yes", "no")),
    ]
    parts = task(tmp_path, HubSource("set", None, None, {"train": "train[:1]", "validation": "train[1:]"}))
    assert [load_split(parts, s, 0.0).examples[0].id for s in ("train", "validation")] == ["1", "2"]
    [digest] = split.fingerprints.values()
    assert digest == next(iter(load_split(spec, "train", 0.0).fingerprints.values()))
    with pytest.raises(DataError, match=r"t\.yaml: source\.hub: cannot load"):
        load_split(spec, "test", 0.0)
    with pytest.raises(DataError, match=r"source\.hub\.splits\.validation is not given"):
        load_split(spec, "validation", 0.0)
