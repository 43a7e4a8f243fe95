"""The `source` keys of a task YAML -> where its rows come from.

Decisions: exactly one of files, hub and builder. Paths are relative to the YAML. Whether a file is there is
not looked at here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_medical.data.yaml_keys import Problems

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class BuilderSource:
    """Rows that the package makes itself from an embedded terminology."""

    name: str
    """`terminology/task`, for example `icd10cm/code_to_description`."""


@dataclass(frozen=True)
class FilesSource:
    """Rows in local files."""

    patterns: Mapping[str, tuple[str, ...]]
    """Split -> absolute paths or globs."""
    header: tuple[str, ...] | None = None
    """Names of the columns of a CSV or TSV without a header line."""
    join: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Split -> files whose records complete those with the same `join_by`."""
    join_by: str = "id"


@dataclass(frozen=True)
class HubSource:
    """Rows that `datasets.load_dataset` reads: a hub id, or a local folder."""

    name: str
    config: str | None
    revision: str | None
    splits: Mapping[str, str]
    """Our split -> its name in the data set."""


Source = BuilderSource | FilesSource | HubSource


@dataclass
class _JoinKeys:
    by: str = "id"
    train: Any = None
    validation: Any = None
    test: Any = None


@dataclass
class _FilesKeys:
    train: Any = None
    validation: Any = None
    test: Any = None
    header: list[str] | None = None
    join: _JoinKeys | None = None


@dataclass
class _SplitKeys:
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = "test"


@dataclass
class _HubKeys:
    name: str = ""
    config: str | None = None
    revision: str | None = None
    splits: _SplitKeys = field(default_factory=_SplitKeys)


@dataclass
class SourceKeys:
    """The keys as the YAML has them."""

    builder: str | None = None
    files: _FilesKeys | None = None
    hub: _HubKeys | None = None


def read_source(keys: SourceKeys, path: Path, found: Problems) -> Source:
    """The source of the task YAML at `path`; what is wrong is noted in `found`."""
    given = [name for name in ("builder", "files", "hub") if getattr(keys, name) is not None]
    where = f"{path}: source"
    got = ", ".join(given) or "none"
    found.check(len(given) == 1, where, "must be exactly one of builder, files, hub", got)
    if keys.files is not None:
        return _files(keys.files, path, found)
    if keys.hub is not None:
        return _hub(keys.hub, f"{where}.hub", found)
    named = keys.builder is None or re.fullmatch(r"[\w-]+/[\w-]+", keys.builder)
    found.check(bool(named), f"{where}.builder", "must be terminology/task", keys.builder)
    return BuilderSource(keys.builder or "")


def _hub(keys: _HubKeys, where: str, found: Problems) -> HubSource:
    found.check(bool(keys.name), f"{where}.name", "must be given")
    splits = {s: name for s in SPLITS if (name := getattr(keys.splits, s))}
    found.check("train" in splits, f"{where}.splits.train", "must be given")
    return HubSource(keys.name, keys.config, keys.revision, splits)


def _files(keys: _FilesKeys, path: Path, found: Problems) -> FilesSource:
    where = f"{path}: source.files"
    found.check(keys.train is not None, f"{where}.train", "must be given")
    patterns = _patterns(keys, path, where, found)
    header = tuple(keys.header) if keys.header is not None else None
    distinct = header is None or (header and len(set(header)) == len(header))
    found.check(bool(distinct), f"{where}.header", "must be a list of different names", keys.header)
    if keys.join is None:
        return FilesSource(patterns, header)
    join = _patterns(keys.join, path, f"{where}.join", found)
    found.check(
        bool(join) and set(join) <= set(patterns), f"{where}.join", "must name a split that has files"
    )
    return FilesSource(patterns, header, join, keys.join.by)


def _patterns(
    keys: _FilesKeys | _JoinKeys, path: Path, where: str, found: Problems
) -> dict[str, tuple[str, ...]]:
    patterns = {}
    for split in SPLITS:
        value = getattr(keys, split)
        place = f"{where}.{split}"
        entries = [value] if isinstance(value, str) else value
        if value is None:
            continue
        if not isinstance(entries, list) or not entries or not all(e and isinstance(e, str) for e in entries):
            found.add(place, "must be a path or a list of paths", value)
            continue
        for entry in entries:
            found.check(entry.endswith(SUFFIXES), place, f"must end in {', '.join(SUFFIXES)}", entry)
        patterns[split] = tuple(str(path.parent.absolute() / Path(e).expanduser()) for e in entries)
    return patterns
