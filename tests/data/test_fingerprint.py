"""Promise P12: changed data is named by task, file and place; moved, renamed or touched is not changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import write_tiny_run

from moe_medical.base_model import locate_base
from moe_medical.config import load_config
from moe_medical.data.chat import ChatFormat
from moe_medical.data.store import CHUNK_BYTES, Fingerprint, Fingerprinter, fingerprint_file
from moe_medical.data.tasks import build_plan, load_tasks
from moe_medical.errors import DataError
from moe_medical.training.fingerprint import RunFingerprint, run_fingerprint

DAY_NS = 86_400 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_MEDICAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# One file


def _of(data: bytes) -> Fingerprint:
    running = Fingerprinter()
    running.update(data)
    return running.result()


@given(st.binary(max_size=3000), st.lists(st.integers(1, 3000)), st.integers(1, 40))
def test_pieces_do_not_matter(data: bytes, cuts: list[int], repeat: int) -> None:
    data *= repeat * 50  # up to several chunks
    running, at = Fingerprinter(), 0
    for cut in cuts:
        running.update(data[at : at + cut])
        at += cut
    running.update(data[at:])
    found = running.result()
    pieces = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    assert found.chunks == "".join(f"{zlib.crc32(piece):08x}" for piece in pieces)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.size, found.lines) == (
        len(data),
        len(data.splitlines()) if b"\r" not in data else found.lines,
    )


def test_lines_are_those_that_an_editor_counts() -> None:
    assert [_of(data).lines for data in (b"", b"a", b"a\n", b"a\nb", b"\n\n")] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("before", "after", "chunk"),
    [
        (b"x" * 10, b"x" * 9 + b"y", 0),
        (b"x" * 3 * CHUNK_BYTES, b"x" * 2 * CHUNK_BYTES + b"y" + b"x" * (CHUNK_BYTES - 1), 2),
        (b"x" * CHUNK_BYTES, b"x" * CHUNK_BYTES + b"more", 1),
        (b"x" * (CHUNK_BYTES + 7), b"x" * (CHUNK_BYTES + 9), 1),
        (b"x" * 2 * CHUNK_BYTES, b"x" * CHUNK_BYTES, 1),
        (b"", b"x", 0),
    ],
)
def test_the_first_chunk_that_differs(before: bytes, after: bytes, chunk: int) -> None:
    assert _of(before).first_difference(_of(after)) == chunk
    assert _of(after).first_difference(_of(before)) == chunk


def test_a_fingerprint_is_small_and_survives_json() -> None:
    found = _of(b"line\n" * CHUNK_BYTES)
    assert Fingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert len(json.dumps(found.to_json())) < 200


def test_a_parquet_file_has_no_lines(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x\n"] * 9}), tmp_path / "x.parquet")
    assert fingerprint_file(tmp_path / "x.parquet").lines is None


def _later() -> int:
    """A clock that is a day ahead, so that every file has long been at rest."""
    return time.time_ns() + DAY_NS


def _forge(cache: Path) -> None:
    """Whoever reads the forged digest has not read the file."""
    [kept] = (cache / "fingerprints").iterdir()
    value = json.loads(kept.read_text())
    value["fingerprint"]["sha256"] = "forged"
    kept.write_text(json.dumps(value))


def test_a_file_at_rest_is_read_once(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("one\n")
    digest = hashlib.sha256(b"one\n").hexdigest()
    assert fingerprint_file(file, _later).sha256 == digest
    _forge(cache)
    assert fingerprint_file(file, _later).sha256 == "forged"
    os.utime(file)
    assert fingerprint_file(file, _later).sha256 == digest


def test_same_size_and_time_do_not_hide_a_change(tmp_path: Path, cache: Path) -> None:
    """A tool that restores the time of a file cannot restore when its entry was changed."""
    file = tmp_path / "x.jsonl"
    file.write_text("one\n")
    times = file.stat()
    fingerprint_file(file, _later)
    file.write_text("two\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint_file(file, _later).sha256 == hashlib.sha256(b"two\n").hexdigest()


def test_a_file_that_has_just_been_written_is_read_again(tmp_path: Path, cache: Path) -> None:
    """It could change again within one tick of its time stamp."""
    file = tmp_path / "x.jsonl"
    file.write_text("one\n")
    fingerprint_file(file)
    assert not (cache / "fingerprints").exists()


def test_a_cache_that_cannot_be_used_is_no_error(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("one\n")
    cache.write_text("not a folder")
    assert fingerprint_file(file, _later).lines == 1
    cache.unlink()
    fingerprint_file(file, _later)
    [kept] = (cache / "fingerprints").iterdir()
    for damage in ("", "{", "[]", '{"state": 1}'):
        kept.write_text(damage)
        assert fingerprint_file(file, _later).lines == 1


# A run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose task `even` has two training files, one of them of several MiB."""
    folder = tmp_path / "run"
    write_tiny_run(folder)
    files = {"train": ["even.train*.jsonl"], "validation": "even.validation.jsonl"}
    _edit(folder, "even", id=None, source={"files": files})
    rows = [{"id": f"big-{i}", "input": f"w1 {'w2 ' * 400}", "output": "yes"} for i in range(2500)]
    more = folder / "tasks" / "even.train2.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert more.stat().st_size > 2.5 * CHUNK_BYTES
    return folder


def _edit(folder: Path, task: str, **keys: Any) -> None:
    path = folder / "tasks" / f"{task}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))


def _identity(folder: Path, *overrides: str) -> RunFingerprint:
    config = load_config(folder / "run.yaml", overrides)
    base = locate_base(config.model)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    plan = build_plan(tasks, config.data, config.run.seed, 48)
    return run_fingerprint(config, base, config.adapters, tasks, plan)


def _saved(identity: RunFingerprint) -> dict[str, Any]:
    """What a checkpoint gives back."""
    return json.loads(json.dumps(identity.to_json()))


def _refused(folder: Path, saved: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        _identity(folder).check_resumes(saved)
    assert caught.value.exit_code == 65
    return str(caught.value)


def test_an_untouched_run_resumes(folder: Path) -> None:
    identity = _identity(folder)
    assert identity.check_resumes(_saved(identity)) == identity


def test_touched_moved_and_renamed_files_are_no_change(folder: Path) -> None:
    saved = _saved(_identity(folder))
    for file in (folder / "tasks").glob("*.jsonl"):
        os.utime(file, ns=(DAY_NS, DAY_NS))
    _identity(folder).check_resumes(saved)
    moved = folder / "elsewhere"
    shutil.move(folder / "tasks", moved)
    recipe = f"data.recipe={moved / 'mixture.yaml'}"
    assert _identity(folder, recipe).check_resumes(saved).accepted_changes == ()
    (moved / "even.train.jsonl").rename(moved / "a.jsonl")
    (moved / "even.train2.jsonl").rename(moved / "b.jsonl")
    files = {"train": ["a.jsonl", "b.jsonl"], "validation": "even.validation.jsonl"}
    (moved / "even.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((moved / "even.yaml").read_text()) | {"source": {"files": files}})
    )
    _identity(folder, recipe).check_resumes(saved)


def _append(tasks: Path) -> None:
    with (tasks / "even.train2.jsonl").open("a") as file:
        file.write('{"id": "new", "input": "w1", "output": "no"}\n')


def _edit_byte(tasks: Path) -> None:
    file = tasks / "even.train2.jsonl"
    data = bytearray(file.read_bytes())
    at = data.index(b"yes", CHUNK_BYTES + 1000)
    data[at : at + 3] = b"Yes"
    file.write_bytes(bytes(data))


def _edit_validation(tasks: Path) -> None:
    file = tasks / "even.validation.jsonl"
    file.write_text(file.read_text().replace('"yes"', '"no"', 1))


def _reorder(tasks: Path) -> None:
    for old, new in (("even.train", "x"), ("even.train2", "even.train"), ("x", "even.train2")):
        (tasks / f"{old}.jsonl").rename(tasks / f"{new}.jsonl")


def _add_file(tasks: Path) -> None:
    shutil.copy(tasks / "even.validation.jsonl", tasks / "even.train0.jsonl")


def _twice(tasks: Path) -> None:
    shutil.copy(tasks / "even.train.jsonl", tasks / "even.train9.jsonl")


BEFORE = "has changed since the checkpoint: task even, 2,500 lines and 3,128,890 bytes then"
CHANGES = {
    _append: (
        f"{{tasks}}/even.train2.jsonl {BEFORE}, 2,501 lines and 3,128,935 bytes now, "
        "the first 1 MiB chunk that differs is number 2, at byte 2,097,152."
    ),
    _edit_byte: (
        f"{{tasks}}/even.train2.jsonl {BEFORE}, 2,500 lines and 3,128,890 bytes now, "
        "the first 1 MiB chunk that differs is number 1, at byte 1,048,576."
    ),
    _edit_validation: "{tasks}/even.validation.jsonl has changed since the checkpoint: task even, 8 lines",
    _reorder: (
        "the train files of even are in another order than in the checkpoint: "
        "{tasks}/even.train.jsonl is the first out of place."
    ),
    _add_file: "{tasks}/even.train0.jsonl (train file of even) is not in the checkpoint.",
    _twice: "the train files of even are 3, were 2 in the checkpoint.",
    lambda tasks: (tasks / "even.train.jsonl").unlink(): (
        "even.train.jsonl (train file of even) is in the checkpoint but gone."
    ),
    lambda tasks: _edit(tasks.parent, "even", prompt="Even? {input}"): (
        "{tasks}/even.yaml: prompt has changed since the checkpoint."
    ),
    lambda tasks: _edit(tasks.parent, "even", metric="macro_f1"): (
        "{tasks}/even.yaml: metric has changed since the checkpoint."
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_and_named_alone(folder: Path, change: Any) -> None:
    saved = _saved(_identity(folder))
    change(folder / "tasks")
    told, remedy = _refused(folder, saved).split("\n")
    assert told.startswith(CHANGES[change].format(tasks=folder / "tasks"))
    assert "checkpoint.accept_data_change=true" in remedy


def test_an_accepted_change_marks_the_run_for_good(folder: Path) -> None:
    saved = _saved(_identity(folder))
    _append(folder / "tasks")
    accepted = _identity(folder).check_resumes(saved, accept_data_change=True)
    assert len(accepted.accepted_changes) == 1
    assert "even.train2.jsonl has changed" in accepted.accepted_changes[0]
    later = _saved(accepted)
    assert _identity(folder).check_resumes(later) == accepted  # no flag needed any more
    _edit_validation(folder / "tasks")
    with pytest.raises(DataError, match=r"even\.validation"):
        _identity(folder).check_resumes(later)
    again = _identity(folder).check_resumes(later, accept_data_change=True)
    assert [change.split(" has")[0][-16:] for change in again.accepted_changes] == [
        "ven.train2.jsonl",
        "validation.jsonl",
    ]


def test_settings_cannot_be_accepted(folder: Path) -> None:
    saved = _saved(_identity(folder))
    _append(folder / "tasks")
    changed = _identity(folder, "training.learning_rate=0.5", "data.mix.rule=uniform")
    with pytest.raises(DataError) as caught:
        changed.check_resumes(saved, accept_data_change=True)
    assert str(caught.value).splitlines() == [
        "data.mix.rule was 'temperature' in the checkpoint, is 'uniform'. Restore it or use a new run.name.",
        "training.learning_rate was 0.01 in the checkpoint, is 0.5. Restore it or use a new run.name.",
    ]


def test_a_checkpoint_of_an_older_version_is_refused_in_words(folder: Path) -> None:
    saved = {"settings": {}, "tasks": {"even": {"0:even.train.jsonl": "0" * 64}}, "mixture": {}}
    assert "another version of moe_medical" in _refused(folder, saved)


def test_no_text_of_a_record_is_in_an_identity(folder: Path) -> None:
    assert '"w2' not in json.dumps(_saved(_identity(folder)))
    assert len(json.dumps(_saved(_identity(folder))["tasks"])) < 4000
