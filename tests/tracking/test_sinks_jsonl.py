"""`metrics.jsonl` survives kills, full disks and resumes."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_medical.errors import DataError, StorageError
from moe_medical.tracking.sinks import JsonlSink, read_metrics


def written(path: Path, *steps: int) -> JsonlSink:
    sink = JsonlSink(path)
    for step in steps:
        sink.log({"tokens": 10 * step, "loss": 1 / (step + 1)}, step)
    return sink


def steps_in(path: Path) -> list[float]:
    return [row["step"] for row in read_metrics(path)]


def test_each_row_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    written(path, 1)
    assert path.read_text() == '{"step": 1, "tokens": 10, "loss": 0.5}\n'


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}, 1)
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.1
    }  # fmt: skip
    (row,) = read_metrics(path)
    assert math.isnan(row.pop("a"))
    assert row == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.1}


def test_a_second_process_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 1, 2).close(0)
    written(path, 3)
    assert steps_in(path) == [1, 2, 3]


def test_truncate_after_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = written(path, 1, 2, 2, 3, 4)
    sink.truncate_after(2)
    assert steps_in(path) == [1, 2, 2]
    sink.log({}, 3)
    assert steps_in(path) == [1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_torn_tail_is_dropped_on_reopening(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    written(whole, 1, 2).close(0)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        path = tmp_path / f"cut_{size}.jsonl"
        path.write_bytes(content[:size])
        num_whole = content[:size].count(b"\n")
        assert steps_in(path) == [1, 2][:num_whole]
        written(path, 7)
        assert steps_in(path) == [*[1, 2][:num_whole], 7]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 "):
        read_metrics(path)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = written(path, 1, 2)
    size = path.stat().st_size
    with (
        largest_file(size + 5),
        pytest.raises(StorageError, match=r"step 3 .* last step written: 2") as error,
    ):
        sink.log({"loss": 1.0}, 3)
    assert error.value.exit_code == 74
    assert path.stat().st_size == size
    sink.log({"loss": 1.0}, 4)
    assert steps_in(path) == [1, 2, 4]


def test_a_truncation_that_does_not_fit_keeps_every_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = written(path, 1, 2)
    with largest_file(5), pytest.raises(StorageError):
        sink.truncate_after(1)
    assert steps_in(path) == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        written(path, 1)


def test_a_path_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        JsonlSink(tmp_path)


def test_writing_after_close_is_a_storage_error(tmp_path: Path) -> None:
    sink = written(tmp_path / "metrics.jsonl", 1)
    sink.close(0)
    sink.close(0)
    with pytest.raises(StorageError):
        sink.log({}, 2)
