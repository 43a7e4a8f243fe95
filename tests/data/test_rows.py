"""The row store: what comes out, flat memory, keys, views, and what a second process finds."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny import ROOT, write_tiny_tasks

from moe_medical.data.recipe import FilesSource, TaskSpec
from moe_medical.data.rows import BATCH_ROWS, Example, TextRows
from moe_medical.data.sources import Split, load_split
from moe_medical.data.store import published
from moe_medical.errors import DataError, StorageError

ROWS = 2 * BATCH_ROWS + 100


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _row(i: int) -> dict[str, object]:
    return {"id": f"r{i}", "q": f"question {i} 发热", "a": f"answer {i}", "options": ["yes", f"no {i % 3}"]}


def _spec(folder: Path, *files: Path, **changes: object) -> TaskSpec:
    source = FilesSource({"train": tuple(map(str, files or [folder / "x.jsonl"]))})
    given = {"prompt": "{q}", "target": "{a}", "id": "id", "choices": "options", **changes}
    return TaskSpec("t", "yes_no", "accuracy", folder / "t.yaml", source, **given)  # type: ignore[arg-type]


def _write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _load(folder: Path, *files: Path, most: float = 0.0, **changes: object) -> Split:
    return load_split(_spec(folder, *files, **changes), "train", most)


@pytest.fixture
def rows(tmp_path: Path) -> TextRows:
    _write(tmp_path / "x.jsonl", *map(_row, range(ROWS)))
    return _load(tmp_path).examples


def _expected(i: int) -> Example:
    return Example("t", f"r{i}", f"question {i} 发热", f"answer {i}", ("yes", f"no {i % 3}"))


def test_rows_by_number_slice_iteration_and_at_random(rows: TextRows) -> None:
    assert len(rows) == ROWS
    assert rows[0] == _expected(0)
    assert rows[-1] == rows[ROWS - 1] == _expected(ROWS - 1)
    assert rows[np.int64(BATCH_ROWS)] == _expected(BATCH_ROWS)
    assert list(rows) == [_expected(i) for i in range(ROWS)]
    assert list(rows[10:30:7]) == [_expected(i) for i in (10, 17, 24)]
    assert [len(batch) for batch in rows.batches(1000)] == [1000, 1000, ROWS - 2000]
    picks = np.random.default_rng(0).integers(ROWS, size=300).tolist()
    assert rows.take(picks) == [_expected(i) for i in picks]
    for outside in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError):
            rows[outside]


def test_a_view_has_the_rows_it_was_asked_for_in_their_order(rows: TextRows) -> None:
    view = rows.select(np.array([2000, 5, 5, 1023, 1024]))
    assert [e.id for e in view] == ["r2000", "r5", "r5", "r1023", "r1024"]
    assert [e.id for e in view.select(np.array([4, 0]))] == ["r1024", "r2000"]
    assert [record.line for record in view.records([0, 3], "why")] == [2001, 1024]
    assert rows.distinct_choices() == {"yes", "no 0", "no 1", "no 2"}
    assert view[1:3].distinct_choices() == {"yes", "no 2"}
    assert len(rows.select(np.zeros(0, dtype=np.int64))) == 0


def test_records_without_an_id_are_numbered_by_file_and_line(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.jsonl", *map(_row, range(3)))
    second = tmp_path / "b.jsonl"
    second.write_text("\n" + first.read_text())
    found = _load(tmp_path, first, second, id=None, choices=None).examples
    assert [e.id for e in found] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        *(f"b.jsonl:{i}" for i in (2, 3, 4)),
    ]
    [record] = found.records([4], "why")
    assert (record.file, record.line) == (str(second), 3)


def test_duplicate_ids_are_found_across_batches_and_files(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.jsonl", *map(_row, range(ROWS)))
    second = _write(tmp_path / "b.jsonl", _row(ROWS), _row(7), _row(ROWS), _row(BATCH_ROWS))
    split = _load(tmp_path, first, second, most=0.9)
    assert [e.id for e in split.examples] == [f"r{i}" for i in range(ROWS + 1)]
    assert [(Path(b.file).name, b.line, b.reason) for b in split.rejected] == [
        ("b.jsonl", line, "duplicate id") for line in (2, 3, 4)
    ]


def test_rows_of_one_hash_but_different_ids_are_no_duplicates(tmp_path: Path) -> None:
    """The writer is given hashes that collide."""
    from moe_medical.data.rows import BatchFile, _repeats

    split = _load(tmp_path, _write(tmp_path / "x.jsonl", *(_row(i) for i in range(5))))
    folder = next((tmp_path / "cache" / "rows").glob("[0-9a-f]*"))
    assert len(split.examples) == 5
    assert list(_repeats(np.array([3, 3, 1, 3, 1]), BatchFile(folder, "rows"))) == []


def test_the_second_reading_opens_the_store_without_the_source(tmp_path: Path, cache: Path) -> None:
    file = _write(tmp_path / "x.jsonl", _row(0), {"q": 1}, _row(1))
    first = _load(tmp_path, most=0.5)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix == ".arrow"}
    again = _load(tmp_path, most=0.5)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(before) == 1
    assert (list(again.examples), again.rejected) == (list(first.examples), first.rejected)
    assert again.fingerprints == first.fingerprints
    assert again.examples.key == first.examples.key
    with pytest.raises(DataError, match="1 of 3 records"):
        _load(tmp_path, most=0.3)
    moved = tmp_path / "moved.jsonl"
    file.rename(moved)
    elsewhere = _load(tmp_path, moved, most=0.5)
    assert elsewhere.examples.key == first.examples.key
    assert [bad.file for bad in elsewhere.rejected] == [str(moved)]


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "Q {q}"}, {"target": "{id}"}, {"choices": None}, {"id": None}, {"source": "y.jsonl"}],
)
def test_what_shapes_a_row_shapes_the_key(tmp_path: Path, changes: dict[str, object]) -> None:
    _write(tmp_path / "x.jsonl", _row(0), _row(1))
    _write(tmp_path / "y.jsonl", _row(1), _row(0))
    spec = _spec(tmp_path)
    if "source" in changes:
        changes = {"source": FilesSource({"train": (str(tmp_path / "y.jsonl"),)})}
    key = load_split(spec, "train", 0.0).examples.key
    assert load_split(replace(spec, **changes), "train", 0.0).examples.key != key
    same = replace(spec, name="u", metric="macro_f1", weight=3.0, licence="x", path=tmp_path / "u.yaml")
    assert load_split(same, "train", 0.0).examples.key == key


def test_keys_of_views_follow_their_rows(rows: TextRows) -> None:
    assert rows.select(np.arange(5)).key == rows[:5].key
    assert len({rows.key, rows[:5].key, rows[:6].key, rows[1:6].key}) == 4


def test_only_the_owner_may_read_the_text(tmp_path: Path, cache: Path) -> None:
    _load(tmp_path, _write(tmp_path / "x.jsonl", _row(0)))
    folders = [cache / "rows", *(cache / "rows").iterdir()]
    assert len(folders) == 2
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_a_damaged_store_is_named(tmp_path: Path, cache: Path) -> None:
    _write(tmp_path / "x.jsonl", _row(0))
    _load(tmp_path)
    [table] = cache.rglob("rows.arrow")
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(StorageError, match=f"{table.parent} is damaged. Delete it"):
        _load(tmp_path)


@pytest.mark.parametrize("left", [0, 40, -8])
def test_a_damaged_selection_is_named(tmp_path: Path, cache: Path, left: int) -> None:
    _load(tmp_path, _write(tmp_path / "x.jsonl", _row(0), _row(0), _row(1)), most=0.5)
    [kept] = cache.rglob("kept.npy")
    kept.write_bytes(kept.read_bytes()[:left])
    with pytest.raises(StorageError, match=f"{kept.parent} is damaged. Delete it"):
        _load(tmp_path, most=0.5)


def test_threads_read_what_one_thread_reads(rows: TextRows) -> None:
    wrong: list[int] = []

    def read(seed: int) -> None:
        picks = np.random.default_rng(seed).integers(ROWS, size=500).tolist()
        if rows.take(picks) != [_expected(i) for i in picks]:
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_builds_while_the_other_waits(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first is held up until the second says that it waits."""
    waits, built = threading.Event(), []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("waiting for another process that builds"):
                waits.set()

    def build(folder: Path) -> None:
        built.append(folder)
        assert waits.wait(60)

    logger = logging.getLogger("moe_medical.files")
    listener = Listener()
    logger.addHandler(listener)
    found: list[Path] = []
    with caplog.at_level(logging.INFO):
        threads = [
            threading.Thread(target=lambda: found.append(published("kind", "key", build))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    logger.removeHandler(listener)
    assert len(built) == 1
    assert found == [cache / "kind" / "key"] * 2
    assert list((cache / "kind").iterdir()) == [cache / "kind" / "key"]


# Memory

_CHILD = """
import resource, sys
from pathlib import Path
from moe_medical.data.recipe import FilesSource, TaskSpec
from moe_medical.data.sources import load_split

def load(file):
    source = FilesSource({"train": (file,)})
    spec = TaskSpec("t", "yes_no", "accuracy", Path("t.yaml"), source, "{q}", "{a}", id="id")
    return load_split(spec, "train", 0.0)

def private():  # of this process alone; pages of a file are the system's
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0])

small, large = sys.argv[1:]
load(small)
before, anonymous = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, private()
rows = load(large).examples
writing = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
reading, characters = 0, 0
for i, example in enumerate(rows):
    characters += len(example.prompt)
    if i % 5000 == 0:
        reading = max(reading, private() - anonymous)
print(len(rows), characters, writing, reading)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_while_a_store_is_written_and_read(tmp_path: Path, cache: Path) -> None:
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    text, count = "fever and cough " * 150, 50_000
    for file, number in ((small, 3000), (large, count)):
        with file.open("w") as stream:
            stream.writelines(f'{{"id": "{i}", "q": "{i} {text}", "a": "yes"}}\n' for i in range(number))
    assert large.stat().st_size > 115 * 2**20
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MOE_MEDICAL_CACHE": str(cache)}
    command = [sys.executable, "-c", _CHILD, str(small), str(large)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows, characters, writing, reading = map(int, done.stdout.split())
    assert (rows, characters > 110e6) == (count, True)
    assert writing < 30 * 1024, f"{writing} KiB more while a file of 115 MiB was written"
    assert reading < 30 * 1024, f"{reading} KiB more while it was read"


def test_reading_starts_no_thread(tmp_path: Path) -> None:
    """Arrow's own threads may abort a process that ends; jemalloc's is of another kind."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import pyarrow\n"
        "from moe_medical.data.recipe import load_task\n"
        "from moe_medical.data.sources import load_split\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        "rows = load_split(load_task(Path(sys.argv[1])), 'train', 0.0).examples\n"
        "assert len(list(rows.batches())[0]) == len(rows) == 80\n"
        "assert threads() == before, (before, threads())\n"
    )
    write_tiny_tasks(tmp_path)
    environment = os.environ | {"MOE_MEDICAL_CACHE": str(tmp_path / "cache")}
    for _ in range(2):  # made, then found
        command = [sys.executable, "-c", code, str(tmp_path / "last_word.yaml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
