"""`metrics.jsonl`: one JSON object per line, append-only, the record of truth."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_medical.errors import DataError, StorageError
from moe_medical.files import write_file
from moe_medical.tracking.sinks.sink import Sink


class JsonlSink(Sink):
    """Append-only file of one JSON object per line, each with its "step".

    JSON has no NaN, so a number that is not finite is written as "NaN", "Infinity" or "-Infinity";
    `read_metrics` gives it back as a float. Tables and matrices are files of the run's folder already.
    A torn last line of an earlier, killed process is removed.

    Args:
        path: The file; its folder is made.

    Raises:
        StorageError: The file cannot be opened, here, or written, in `log` and `truncate_after`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._last_step: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open_append(path)
            _drop_torn_line(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be opened ({error.strerror}). Check its rights.") from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Appends one line; it is with the operating system when this returns."""
        row = {"step": step} | {name: _json_number(value) for name, value in values.items()}
        try:
            _append(self._descriptor, json.dumps(row, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise self._refused(step, error) from None
        self._last_step = step

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, atomically; a resumed run calls this with its checkpoint's step."""
        try:
            rows = [row for row in _rows(self.path) if row["step"] <= step]
            write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            os.close(self._descriptor)
            self._descriptor = _open_append(self.path)
        except OSError as error:
            raise self._refused(step, error) from None
        self._last_step = rows[-1]["step"] if rows else None

    def close(self, exit_code: int = 0) -> None:
        """Closes the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _refused(self, step: int, error: OSError) -> StorageError:
        last = "none" if self._last_step is None else self._last_step
        return StorageError(
            f"{self.path} cannot be written at step {step} ({error.strerror}); last step written: {last}. "
            "Free space or mend the disk, then resume."
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl` as numbers, without a torn last line as a running process may show.

    Raises:
        DataError: A line before the last is damaged.
    """
    return [{name: _number(value) for name, value in row.items()} for row in _rows(path)]


def _number(value: int | float | str) -> float:
    return value if isinstance(value, int) else float(value)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f'{path}:{number} is no object with a "step". Remove the line.') from None
            yield row


def _json_number(value: float) -> int | float | str:
    number = value if type(value) is int else float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _open_append(path: Path) -> int:
    return os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)


def _append(descriptor: int, line: bytes) -> None:
    """Writes the whole line or, with the error raised, none of it."""
    start = os.fstat(descriptor).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, start)
        raise


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():  # a device has no lines
        return
    with path.open("rb") as file:
        torn = b""
        for line in file:
            torn = b"" if line.endswith(b"\n") else line
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
