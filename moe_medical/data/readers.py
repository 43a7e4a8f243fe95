"""Files -> raw records: JSONL, JSON, CSV, TSV, Parquet.

Decisions: a record that cannot be parsed is yielded with a reason; a file that cannot be parsed as a whole
is a DataError. A line is counted from 1; in a JSON list and in Parquet it is the record's number. No message
quotes the file. CSV and TSV have quotes as spreadsheets write them, and a header line unless the columns are
named. A `.json` of several lines whose first is an object is JSON Lines, as several public sets name it so.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_medical.errors import DataError

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 1024
_MAX_CELL = 2**24
"""Characters of one CSV cell. Python's own limit is 128 Ki, less than a long report; without any, one
forgotten quote would make a cell of the rest of the file."""


class Raw(NamedTuple):
    """One record: where it is, its bytes, and its row or the reason why there is none."""

    line: int
    data: bytes
    row: dict[str, Any] | None
    reason: str = ""


def read_file(file: Path, where: str, header: Sequence[str] | None = None) -> Iterator[Raw]:
    """Yields the records of a file by its suffix.

    Args:
        file: Its suffix is one of `READERS`.
        where: Task YAML and key, for messages.
        header: Names of the columns of a CSV or TSV that has no header line.

    Raises:
        DataError: where the file as a whole cannot be read.
    """
    reader = READERS.get(file.suffix)
    if header is not None and file.suffix in _DELIMITERS:
        reader = _read_table(_DELIMITERS[file.suffix], header)
    if reader is None:
        raise DataError(f"{where}: {file} must end in {', '.join(READERS)}.")
    try:
        yield from reader(file)
    except OSError as e:
        reason = e.strerror or type(e).__name__
    except Unreadable as e:
        reason = str(e)
    else:
        return
    raise DataError(f"{where}: cannot read {file} ({reason}).") from None


class Unreadable(Exception):
    """Why a file cannot be parsed; never its text."""


def _read_jsonl(file: Path) -> Iterator[Raw]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            data = (line.removeprefix(_BOM) if number == 1 else line).strip()
            if data:
                yield _parse_line(number, data)


def _parse_line(number: int, data: bytes) -> Raw:
    if b"\0" in data:
        return Raw(number, data, None, "NUL byte")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return Raw(number, data, None, "invalid UTF-8")
    except (ValueError, RecursionError):
        return Raw(number, data, None, "invalid JSON")
    return _object(number, data, value)


def _object(number: int, data: bytes, value: Any) -> Raw:
    if not isinstance(value, dict):
        return Raw(number, data, None, "not a JSON object")
    return Raw(number, data, value)


def _read_json(file: Path) -> Iterator[Raw]:
    if _is_json_lines(file):
        yield from _read_jsonl(file)
        return
    try:
        records = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise Unreadable(f"invalid UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise Unreadable(f"invalid JSON at line {e.lineno}; one object per line is .jsonl") from None
    except (ValueError, RecursionError):
        raise Unreadable("invalid JSON") from None
    if not isinstance(records, list):
        raise Unreadable("must be a list of objects")
    for number, value in enumerate(records, start=1):
        yield _object(number, json.dumps(value, sort_keys=True).encode(), value)


def _is_json_lines(file: Path) -> bool:
    with file.open("rb") as stream:
        lines = (line for line in stream if line.strip())
        first = next(lines, b"")
        second = next(lines, b"")
    whole = _parse_line(1, first.removeprefix(_BOM).strip()) if second else None
    return whole is not None and whole.row is not None


def _read_table(delimiter: str, columns: Sequence[str] | None = None) -> Callable[[Path], Iterator[Raw]]:
    def read(file: Path) -> Iterator[Raw]:
        csv.field_size_limit(max(_MAX_CELL, csv.field_size_limit()))
        # surrogateescape keeps the line of a byte that is not UTF-8, to be found again below
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
            try:
                header = next(rows, []) if columns is None else list(columns)
                if len(set(header)) != len(header):
                    raise Unreadable("the header names a column twice")
                for cells in rows:
                    if cells:
                        yield _table_row(rows.line_num, header, cells)
            except csv.Error:
                raise Unreadable(f"broken quotes or an over-long cell near line {rows.line_num}") from None

    return read


def _table_row(line: int, header: list[str], cells: list[str]) -> Raw:
    data = "\x1f".join(cells).encode("utf-8", "surrogateescape")
    if len(cells) != len(header):
        return Raw(line, data, None, "more or fewer cells than the header")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return Raw(line, data, None, "invalid UTF-8")
    return Raw(line, data, dict(zip(header, cells, strict=True)))


def _read_parquet(file: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS, use_threads=False):
                for i in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(number, batch.slice(i, 1))
    except pa.ArrowException:
        raise Unreadable("not a complete Parquet file") from None


def _parquet_row(number: int, batch: Any) -> Raw:
    try:
        row = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return Raw(number, f"row {number}".encode(), None, "invalid UTF-8")
    except (ValueError, OverflowError):  # for example a timestamp that Python's datetime cannot hold
        return Raw(number, f"row {number}".encode(), None, "a value outside Python's range")
    return Raw(number, json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"), row)


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    **{suffix: _read_table(delimiter) for suffix, delimiter in _DELIMITERS.items()},
    ".parquet": _read_parquet,
}
"""Suffix -> reader: yields raw records, and raises `Unreadable` where the file as a whole is broken."""
