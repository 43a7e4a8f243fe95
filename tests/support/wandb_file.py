"""Reads an offline W&B run back from its `run-*.wandb` file, without a network or a W&B process.

The file is a LevelDB log: a 7-byte header (":W&B", 0xBEE1, version), then 32 KiB blocks. A record is cut into
fragments framed as crc32 (of type and data), length, type; fewer than 7 bytes at the end of a block are
padding. A payload is a protobuf `Record` of wandb 0.31.

Strict reading refuses a damaged or truncated file, and one without an exit record, whose run is open or was
killed. Lenient reading stops at the damage. Tables are files beside this one and are not read.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from moe_medical.errors import DataError
from moe_medical.tracking.sinks import import_wandb

BLOCK_BYTES = 32768
FILE_HEADER = struct.Struct("<4sHB")
FRAGMENT_HEADER = struct.Struct("<IHB")
MAGIC = (b":W&B", 0xBEE1)
FULL = 1
FIRST = 2
MIDDLE = 3
LAST = 4


class MetricDefinition(NamedTuple):
    """One `define_metric`."""

    name: str
    """Name, or a glob such as "eval_loss/*"."""
    step_metric: str
    summary: tuple[str, ...]
    """What the summary keeps: of "min", "max", "mean", "last"; empty for W&B's default."""


class Alert(NamedTuple):
    """One message to a person."""

    title: str
    text: str


@dataclass(frozen=True)
class WandbRun:
    """What one file says. Names of nested values are joined with "/"; W&B's own begin with "_"."""

    id: str = ""
    name: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[MetricDefinition] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    exit_code: int | None = None

    def rows(self) -> list[dict[str, Any]]:
        """The history without tables and charts: one row per row of `metrics.jsonl`."""
        return [row for row in self.history if "global_step" in row]


class _Fragment(NamedTuple):
    kind: int
    data: bytes


class _Damage(Exception):
    """The log cannot be read on from a byte; becomes a `DataError`, or the end for a lenient reader."""


def read_run(path: Path, strict: bool = True) -> WandbRun:
    """Reads a `.wandb` file, or the only one below a folder.

    Raises:
        DataError: There is not exactly one file, or it is no W&B file; when `strict`, also if it is damaged,
            truncated or has no exit record.
    """
    path = _find(path)
    log = path.read_bytes()
    if len(log) < FILE_HEADER.size or FILE_HEADER.unpack_from(log)[:2] != MAGIC:
        raise DataError(f"{path} is not a W&B run file.")
    run = _collect(_payloads(path, log, strict))
    if strict and run.exit_code is None:
        raise DataError(f"{path} has no exit record: the run is open or was killed. Try strict=False.")
    return run


def run_files(folder: Path) -> list[Path]:
    """The `.wandb` files below a folder, one for each start of the run, oldest first."""
    files = (file for file in folder.rglob("*.wandb") if not file.parent.is_symlink())
    return sorted(files, key=lambda file: file.parent.name.partition("run-")[2])


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    files = run_files(path)
    if len(files) != 1:
        raise DataError(f"{path} must hold exactly one .wandb file, got {len(files)}. Name the file itself.")
    return files[0]


def _payloads(path: Path, log: bytes, strict: bool) -> Iterator[bytes]:
    try:
        yield from _join(_fragments(log))
    except _Damage as damage:
        if strict:
            raise DataError(f"{path} is damaged: {damage}. Try strict=False.") from None


def _fragments(log: bytes) -> Iterator[_Fragment]:
    at = FILE_HEADER.size
    while at < len(log):
        left_in_block = BLOCK_BYTES - at % BLOCK_BYTES
        if left_in_block < FRAGMENT_HEADER.size:
            at += left_in_block
            continue
        fragment = _fragment(log, at)
        yield fragment
        at += FRAGMENT_HEADER.size + len(fragment.data)


def _fragment(log: bytes, at: int) -> _Fragment:
    if at + FRAGMENT_HEADER.size > len(log):
        raise _Damage(f"truncated at byte {at}")
    crc, length, kind = FRAGMENT_HEADER.unpack_from(log, at)
    start = at + FRAGMENT_HEADER.size
    data = log[start : start + length]
    if len(data) < length:
        raise _Damage(f"truncated at byte {at}")
    if zlib.crc32(bytes([kind]) + data) != crc:
        raise _Damage(f"wrong checksum at byte {at}")
    return _Fragment(kind, data)


def _join(fragments: Iterable[_Fragment]) -> Iterator[bytes]:
    """Whole payloads; a record that lacks its first or last fragment is damage."""
    parts: list[bytes] = []
    for kind, data in fragments:
        if kind not in (FULL, FIRST, MIDDLE, LAST) or (kind in (FULL, FIRST)) == bool(parts):
            raise _Damage(f"fragment of type {kind} out of order")
        parts.append(data)
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
    if parts:
        raise _Damage("the last record is not complete")


def _collect(payloads: Iterable[bytes]) -> WandbRun:
    record_type = import_wandb().proto.wandb_internal_pb2.Record
    run = WandbRun()
    for payload in payloads:
        run = _with_record(run, record_type.FromString(payload))
    return run


def _with_record(run: WandbRun, record: Any) -> WandbRun:
    """The run after one more record."""
    match record.WhichOneof("record_type"):
        case "run":
            _update(run.config, record.run.config)
            told = record.run
            named = {"id": told.run_id, "name": told.display_name, "group": told.run_group}
            return replace(run, **named, tags=tuple(told.tags))
        case "config":
            _update(run.config, record.config)
        case "history":
            run.history.append(_values(record.history.item))
        case "summary":
            _update(run.summary, record.summary)
        case "metric":
            run.metrics.append(_definition(record.metric))
        case "alert":
            run.alerts.append(Alert(record.alert.title, record.alert.text))
        case "exit":
            return replace(run, exit_code=record.exit.exit_code)
    return run


def _update(values: dict[str, Any], change: Any) -> None:
    values.update(_values(change.update))
    for item in change.remove:
        values.pop(_name(item), None)


def _values(items: Iterable[Any]) -> dict[str, Any]:
    return {_name(item): json.loads(item.value_json) for item in items}


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _definition(metric: Any) -> MetricDefinition:
    kept = tuple(kind for kind in ("min", "max", "mean", "last") if getattr(metric.summary, kind))
    return MetricDefinition(metric.name or metric.glob_name, metric.step_metric, kept)
