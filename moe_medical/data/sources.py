"""Task spec -> examples of one split, with unusable records set aside and every file fingerprinted.

Decisions: one path for all formats: a reader yields raw records with their line, a spec turns a record into
an `Example` or into a `BadRecord` that tells where and why, never what it said. The share of bad records is
limited per file. An embedded terminology is a builder of JSONL files and then is read like any other file.
Does not shuffle, tokenise or keep raw records, and never runs code that comes with a data set.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_medical.data.readers import Raw, read_file
from moe_medical.data.recipe import (
    BuilderSource,
    FilesSource,
    HubSource,
    TaskSpec,
    parse_template,
    template_columns,
)
from moe_medical.digest import sha256_file
from moe_medical.errors import DataError

LIST_SEPARATOR = "; "


@dataclass(frozen=True, slots=True)
class Example:
    """One record as text, ready for the chat format."""

    task: str
    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Where a record is that was set aside, and why. Never its text."""

    file: str
    line: int
    reason: str
    digest: str
    """First 12 hex digits of the sha256 of the raw record."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.reason}:{self.digest}"


@dataclass(frozen=True)
class Split:
    """The usable rows of one split in file order."""

    examples: list[Example]
    bad: list[BadRecord]
    fingerprints: dict[str, str]
    """File -> sha256 of its bytes; for a hub source, of its records."""


class _Origin(NamedTuple):
    """One file, or one split of a hub data set."""

    name: str
    key: str
    """The key of the task YAML that named it."""
    records: Iterator[Raw]
    digest: str | None
    """sha256 where it is known before reading."""


def load_split(spec: TaskSpec, split: str, max_bad_fraction: float) -> Split:
    """Reads all records of `split` ("train", "validation" or "test").

    Raises:
        DataError: no such split, a file that is missing, unreadable or empty, a column that no record has,
            or more than `max_bad_fraction` of a file's records unusable. Names task YAML, key and file.
    """
    whole = Split([], [], {})
    ids: set[str] = set()
    for origin in _origins(spec, split):
        part = _read_origin(spec, origin, ids)
        _check_bad_share(spec, origin, part, max_bad_fraction)
        whole.examples.extend(part.examples)
        whole.bad.extend(part.bad)
        whole.fingerprints.update(part.fingerprints)
    if not whole.examples:
        raise DataError(f"{spec.path}: the {split} split has no usable record.")
    return whole


def _origins(spec: TaskSpec, split: str) -> Iterator[_Origin]:
    match spec.source:
        case FilesSource(patterns):
            key = f"source.files.{split}"
            files = _expand(spec, key, patterns.get(split, ()))
        case BuilderSource(name):
            key = "source.builder"
            files = [_built(spec, name, split)]
        case HubSource():
            yield _hub_origin(spec, spec.source, split)
            return
    for file in files:
        digest = _digest_file(file, f"{spec.path}: {key}")
        yield _Origin(str(file), key, read_file(file, f"{spec.path}: {key}"), digest)


def _expand(spec: TaskSpec, key: str, patterns: Sequence[str]) -> list[Path]:
    if not patterns:
        raise DataError(f"{spec.path}: {key} is not given, but this run needs that split.")
    files: dict[Path, None] = {}
    for pattern in patterns:
        # A path that exists is taken as it is, even where its name holds glob characters.
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise DataError(f"{spec.path}: {key} matches no file: {pattern}")
        files.update({Path(name): None for name in names})
    return list(files)


def _built(spec: TaskSpec, builder: str, split: str) -> Path:
    from moe_medical.cache import default_cache
    from moe_medical.data.terminologies import build_task

    files = build_task(builder, default_cache())
    if split not in files:
        raise DataError(f"{spec.path}: source.builder {builder!r} makes no {split} split.")
    return files[split]


def _digest_file(file: Path, where: str) -> str:
    try:
        return sha256_file(file)
    except OSError as e:
        raise DataError(f"{where}: cannot read {file} ({e.strerror}).") from None


def _hub_origin(spec: TaskSpec, source: HubSource, split: str) -> _Origin:
    where = f"{spec.path}: source.hub"
    if split not in source.splits:
        raise DataError(f"{where}.splits.{split} is not given, but this run needs that split.")
    local = spec.path.parent / source.name
    name = str(local) if local.is_dir() else source.name
    label = f"hub:{name}@{source.revision or 'latest'}/{source.config or 'default'}/{source.splits[split]}"
    rows = _load_hub(name, source, source.splits[split], where)
    records = (Raw(i, _canonical(row), row) for i, row in enumerate(rows, start=1))
    return _Origin(label, "source.hub", records, None)


def _load_hub(name: str, source: HubSource, split: str, where: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(name, source.config, revision=source.revision, split=split)
    except (FileNotFoundError, ConnectionError) as e:
        reason = str(e).partition("\n")[0]
    except Exception as e:  # `datasets` raises whatever its readers raise; their text may quote a record
        reason = f"{type(e).__name__}; check name, config, revision and splits"
    raise DataError(f"{where}: cannot load {name!r}, split {split!r} ({reason}).")


def _canonical(row: dict[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass")


@dataclass
class _Reading:
    """What is known of one origin while its records go by."""

    examples: list[Example] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    """Every column that any record has, in order of appearance."""


def _read_origin(spec: TaskSpec, origin: _Origin, ids: set[str]) -> Split:
    reading, running = _Reading(), hashlib.sha256()
    to_example = _ExampleMaker(spec, origin.name, ids)
    for raw in origin.records:
        if origin.digest is None:
            running.update(raw.data)
        try:
            if raw.row is None:
                raise _Unusable(raw.reason)
            reading.columns.update(dict.fromkeys(raw.row))
            reading.examples.append(to_example(raw.row, raw.line))
        except _Unusable as e:
            digest = hashlib.sha256(raw.data).hexdigest()[:12]
            reading.bad.append(BadRecord(origin.name, raw.line, str(e), digest))
    _check_columns(spec, origin, reading)
    digest = origin.digest or running.hexdigest()
    return Split(reading.examples, reading.bad, {origin.name: digest})


class _Unusable(Exception):
    """Why a record cannot be used; the text names columns and types only."""


class _ExampleMaker:
    """Fills a task's templates from rows. `ids` holds the identities seen in the split so far."""

    def __init__(self, spec: TaskSpec, origin: str, ids: set[str]) -> None:
        self._spec, self._ids = spec, ids
        self._prefix = Path(origin).name
        self._prompt, self._target = parse_template(spec.prompt), parse_template(spec.target)

    def __call__(self, row: dict[str, Any], line: int) -> Example:
        prompt, target = _fill(self._prompt, row), _fill(self._target, row)
        if not prompt:
            raise _Unusable("empty prompt")
        if not target:
            raise _Unusable("empty target")
        choices = _choices(row, self._spec.choices)
        return Example(self._spec.name, self._identity(row, line), prompt, target, choices)

    def _identity(self, row: dict[str, Any], line: int) -> str:
        if self._spec.id is None:
            return f"{self._prefix}:{line}"
        identity = _text(row, self._spec.id)
        if not identity:
            raise _Unusable(f"empty column {self._spec.id!r}")
        if identity in self._ids:
            raise _Unusable("duplicate id")
        self._ids.add(identity)
        return identity


def _fill(template: Sequence[tuple[str, str | None]], row: dict[str, Any]) -> str:
    parts = (literal + (_text(row, column) if column is not None else "") for literal, column in template)
    return "".join(parts).strip()


def _text(row: dict[str, Any], column: str) -> str:
    value = _value(row, column)
    if isinstance(value, (list, tuple)):
        return LIST_SEPARATOR.join(_scalar(item, column) for item in value)
    return _scalar(value, column)


def _value(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise _Unusable(f"missing column {column!r}")
    if row[column] is None:
        raise _Unusable(f"column {column!r} is null")
    return row[column]


def _scalar(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise _Unusable(f"column {column!r} is not a finite number")
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise _Unusable(f"column {column!r} is of type {type(value).__name__}")
    if "\0" in value:
        raise _Unusable(f"NUL character in column {column!r}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise _Unusable(f"invalid Unicode in column {column!r}")
    return value


def _choices(row: dict[str, Any], column: str | None) -> tuple[str, ...]:
    if column is None:
        return ()
    value = _value(row, column)
    if isinstance(value, str):  # CSV has no lists: a JSON list in the cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, (list, tuple)):
        raise _Unusable(f"column {column!r} is not a list")
    return tuple(_scalar(item, column) for item in value)


def _check_columns(spec: TaskSpec, origin: _Origin, reading: _Reading) -> None:
    """A column that no record has is a mistake of the recipe, not of the records."""
    if not reading.columns:
        return
    wanted = [("prompt", c) for c in template_columns(spec.prompt)]
    wanted += [("target", c) for c in template_columns(spec.target)]
    wanted += [("choices", spec.choices)] if spec.choices else []
    wanted += [("id", spec.id)] if spec.id else []
    for key, column in wanted:
        if column not in reading.columns:
            there = _shown_columns(reading.columns)
            raise DataError(f"{spec.path}: {key}: column {column!r} is not in {origin.name}; {there}")


def _shown_columns(columns: Iterable[str], limit: int = 20) -> str:
    """Column names, save those that may be text: a CSV without a header makes its first record the names."""
    names = list(columns)
    plain = [name for name in names if re.fullmatch(r"[\w.-]{1,40}", name)][:limit]
    hidden = len(names) - len(plain)
    more = f" and {hidden} more" if plain else f"{hidden}, none of them a plain word"
    return f"columns there: {', '.join(plain)}{more if hidden else ''}"


def _check_bad_share(spec: TaskSpec, origin: _Origin, part: Split, max_bad_fraction: float) -> None:
    total = len(part.examples) + len(part.bad)
    if total == 0:
        raise DataError(f"{spec.path}: {origin.key}: {origin.name} holds no record.")
    if len(part.bad) <= max_bad_fraction * total:
        return
    counts = ", ".join(f"{n} x {why}" for why, n in Counter(b.reason for b in part.bad).most_common())
    raise DataError(
        f"{spec.path}: {origin.key}: {len(part.bad)} of {total} records of {origin.name} cannot be used "
        f"({counts}), more than data.max_bad_fraction ({max_bad_fraction:g}) allows. "
        f"The first is at line {part.bad[0].line}."
    )
