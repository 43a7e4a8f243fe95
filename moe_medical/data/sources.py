"""Task spec -> examples of one split, with unusable records rejected and every file fingerprinted.

Decisions: one path for all formats: a reader yields raw records with their line, `columns.py` turns a record
into `Example`s, or it becomes a `RejectedRecord` that says where and why, never what it held. What comes out
is kept on disk (`rows.py`) under the hash of what went in, so a second run reads the source only to hash it,
and a source that has not been touched not even for that. The share of unusable records is limited per file.
An embedded terminology is a builder of JSONL files and then is read like any other file.
A `.json` list and a single record have to fit into memory; a split does not.
Does not shuffle or tokenise, and never runs code that comes with a data set.
"""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_medical.data.columns import ExampleMaker, image_content
from moe_medical.data.published import BadShape
from moe_medical.data.readers import Raw, read_file
from moe_medical.data.recipe import (
    SPLITS,
    BuilderSource,
    FilesSource,
    HubSource,
    TaskSpec,
    template_columns,
)
from moe_medical.data.rows import Example, RejectedRecord, RowWriter, TextRows, record_digest
from moe_medical.data.store import (
    Fingerprint,
    Fingerprinter,
    code_key,
    content_key,
    fingerprint_file,
    published,
)
from moe_medical.errors import DataError
from moe_medical.files import default_cache

__all__ = ["Example", "RejectedRecord", "Split", "load_split", "row_settings", "splits_of"]

_CODE = code_key("sources", "columns", "published", "readers", "recipe", "rows", "store")
_NO_MATTER = {"name", "kind", "metric", "path", "source", "licence", "citation", "attribution"}
_NO_MATTER |= {"tags", "phi", "weight", "max_repeats"}
"""Keys of a task YAML that do not shape its rows."""


@dataclass(frozen=True)
class Split:
    """The usable rows of one split in file order."""

    examples: TextRows
    rejected: list[RejectedRecord]
    fingerprints: dict[str, Fingerprint]
    """By file, in order; for a hub source, of its records."""


class _Origin(NamedTuple):
    """One file, or one split of a hub data set."""

    name: str
    key: str
    """The key of the task YAML that named it."""
    records: Callable[[], Iterator[Raw]]
    content: str
    """Hash that tells whether it is the same as before."""
    fingerprint: Fingerprint | None
    """None where the records have to be read for it."""


def load_split(spec: TaskSpec, split: str, max_bad_fraction: float) -> Split:
    """All usable records of `split` ("train", "validation" or "test").

    Raises:
        DataError: no such split, a file that is missing, unreadable or empty, a column that no record has,
            or more than `max_bad_fraction` of a file's records unusable. Names task YAML, key and file.
        StorageError: the cache cannot be written, or is damaged.
    """
    origins = list(_origins(spec, split))
    contents = [(origin.content, Path(origin.name).suffix) for origin in origins]
    key = content_key([_CODE, row_settings(spec), contents, image_content(spec)])
    folder = published("rows", key, lambda draft: _build(draft, spec, origins, max_bad_fraction))
    rows = TextRows.open(folder, spec.name, [origin.name for origin in origins], key)
    rejected = rows.rejected()
    unusable = {origin.name: _Unusables() for origin in origins}
    for record in rejected:
        unusable[record.file].add(record.line, record.reason)
    fingerprints = {}
    for origin, about in zip(origins, rows.sources, strict=True):
        _check_bad_share(spec, origin, about["records"], unusable[origin.name], max_bad_fraction)
        fingerprints[origin.name] = Fingerprint.from_json(about["fingerprint"])
    if not rows:
        raise DataError(f"{spec.path}: the {split} split has no usable record.")
    for file in _joined_files(spec, split):
        fingerprints[str(file)] = _fingerprint(file, f"{spec.path}: source.files.join.{split}")
    return Split(rows, rejected, fingerprints)


def splits_of(spec: TaskSpec) -> list[str]:
    """The splits that a task says it has."""
    match spec.source:
        case FilesSource(patterns):
            return [split for split in SPLITS if split in patterns]
        case HubSource():
            return [split for split in SPLITS if split in spec.source.splits]
        case BuilderSource(name):
            files = _build_files(name)
            return [split for split in SPLITS if split in files]


def row_settings(spec: TaskSpec) -> dict[str, Any]:
    """What of a task YAML shapes its rows, by key; where the files are is not of it."""
    settings = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in _NO_MATTER}
    settings |= {"where": dict(spec.where), "images": str(spec.images)}
    source = {key: value for key, value in asdict(spec.source).items() if key not in ("patterns", "join")}
    return settings | {"source": [type(spec.source).__name__, source]}


def _build(folder: Path, spec: TaskSpec, origins: Sequence[_Origin], max_bad_fraction: float) -> None:
    writer = RowWriter(folder, spec.id is not None, spec.choices is not None, spec.image is not None)
    to_example = ExampleMaker(spec)
    for origin in origins:
        about = _read_origin(spec, origin, to_example, writer, max_bad_fraction)
        writer.end_source(about)
    writer.finish()


def _origins(spec: TaskSpec, split: str) -> Iterator[_Origin]:
    match spec.source:
        case FilesSource():
            yield from _file_origins(spec, spec.source, split)
            return
        case BuilderSource(name):
            key = "source.builder"
            files = _build_files(name)
            if split not in files:
                raise DataError(f"{spec.path}: source.builder {name!r} makes no {split} split.")
            file = files[split]
            fingerprint = _fingerprint(file, f"{spec.path}: {key}")
            records = partial(read_file, file, f"{spec.path}: {key}")
            yield _Origin(str(file), key, records, fingerprint.sha256, fingerprint)
        case HubSource():
            yield _hub_origin(spec, spec.source, split)


def _file_origins(spec: TaskSpec, source: FilesSource, split: str) -> Iterator[_Origin]:
    key = f"source.files.{split}"
    where = f"{spec.path}: {key}"
    joined = _joined_files(spec, split)
    contents = [_fingerprint(file, where).sha256 for file in joined]
    for file in _expand(spec, key, source.patterns.get(split, ())):
        fingerprint = _fingerprint(file, where)
        records = partial(read_file, file, where, source.header)
        content = fingerprint.sha256
        if joined:
            records = partial(_completed, records, joined, source.join_by, where)
            content = content_key([content, contents])
        yield _Origin(str(file), key, records, content, fingerprint)


def _joined_files(spec: TaskSpec, split: str) -> list[Path]:
    """Files that complete the split's records."""
    if not isinstance(spec.source, FilesSource) or split not in spec.source.join:
        return []
    return _expand(spec, f"source.files.join.{split}", spec.source.join[split])


def _completed(
    records: Callable[[], Iterator[Raw]], files: Sequence[Path], column: str, where: str
) -> Iterator[Raw]:
    """The records, each with the columns of the record of `files` that has the same value of `column`."""
    others: dict[str, dict[str, Any]] = {}
    for file in files:
        rows = (raw.row for raw in read_file(file, where) if raw.row is not None)
        others.update({str(row[column]): row for row in rows if column in row})
    for raw in records():
        other = others.get(str(raw.row.get(column))) if raw.row is not None else None
        yield raw._replace(row={**(raw.row or {}), **other}) if other else raw


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


def _build_files(builder: str) -> dict[str, Path]:
    from moe_medical.data.terminologies import build_task

    return build_task(builder, default_cache())


def _fingerprint(file: Path, where: str) -> Fingerprint:
    try:
        return fingerprint_file(file)
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

    def records() -> Iterator[Raw]:
        for number, row in enumerate(rows, start=1):
            data = json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass")
            yield Raw(number, data, row)

    # Known by the Arrow files behind it; a data set that was made in memory has none, so by its records.
    files = [Path(file["filename"]) for file in rows.cache_files]
    if files:
        content = content_key([fingerprint_file(file).sha256 for file in files])
    else:
        content = _fingerprint_records(records()).sha256
    # A name such as "train[:80%]" takes some rows of the files.
    content = content_key([source.splits[split], content])
    return _Origin(label, "source.hub", records, content, None)


def _fingerprint_records(records: Iterable[Raw]) -> Fingerprint:
    running = Fingerprinter()
    for raw in records:
        running.update(raw.data + b"\n")
    return running.result()


def _load_hub(name: str, source: HubSource, split: str, where: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, source.config, revision=source.revision, split=split)
    except (FileNotFoundError, ConnectionError) as e:
        reason = str(e).partition("\n")[0]
    except Exception as e:  # `datasets` raises whatever its readers raise; their text may quote a record
        reason = f"{type(e).__name__}; check name, config, revision and splits"
    raise DataError(f"{where}: cannot load {name!r}, split {split!r} ({reason}).")


class _Unusables:
    """A file's unusable records, counted by reason."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.first_line = 0

    def add(self, line: int, reason: str) -> None:
        self.first_line = self.first_line or line
        self.reasons[reason] += 1


def _read_origin(
    spec: TaskSpec, origin: _Origin, to_example: ExampleMaker, writer: RowWriter, max_bad_fraction: float
) -> dict[str, Any]:
    """Reads an origin into the store; what the store keeps about it."""
    running = Fingerprinter()
    columns = _Columns()
    unusable = _Unusables()
    records = 0
    for raw in origin.records():
        if origin.fingerprint is None:
            running.update(raw.data + b"\n")
        try:
            if raw.row is None:
                raise BadShape(raw.reason)
            columns.of_records.update(dict.fromkeys(raw.row))
            rows = to_example.rows(raw.row)
            columns.of_rows.update(dict.fromkeys(name for row in rows for name in row))
            examples = [to_example(row, number) for number, row in enumerate(rows)]
            records += bool(rows)
            for example in examples:
                writer.add(example, raw.line, raw.data)
        except BadShape as e:
            records += 1
            unusable.add(raw.line, str(e))
            writer.reject(raw.line, str(e), record_digest(raw.data))
    _check_columns(spec, origin, columns)
    _check_bad_share(spec, origin, records, unusable, max_bad_fraction)
    fingerprint = origin.fingerprint or running.result()
    return {"fingerprint": fingerprint.to_json(), "records": records}


@dataclass
class _Columns:
    """Columns of any record of a file, and of any row made of it, in order of appearance."""

    of_records: dict[str, None] = field(default_factory=dict)
    of_rows: dict[str, None] = field(default_factory=dict)


def _check_columns(spec: TaskSpec, origin: _Origin, columns: _Columns) -> None:
    """A column that no record has is a mistake of the recipe, not of the records."""
    if columns.of_records:
        _check_there(spec, origin, [("where", c) for c in spec.where], columns.of_records)
    if not columns.of_rows:
        return
    wanted = [("prompt", c) for c in template_columns(spec.prompt)]
    wanted += [("target", c) for c in template_columns(spec.target)]
    wanted += [("choices", spec.choices)] if spec.choices else []
    wanted += [("id", spec.id)] if spec.id else []
    wanted += [("image", spec.image)] if spec.image else []
    _check_there(spec, origin, wanted, columns.of_rows)


def _check_there(
    spec: TaskSpec, origin: _Origin, wanted: Sequence[tuple[str, str]], columns: Iterable[str]
) -> None:
    for key, column in wanted:
        if column not in columns:
            there = _shown_columns(columns)
            raise DataError(f"{spec.path}: {key}: column {column!r} is not in {origin.name}; {there}")


def _shown_columns(columns: Iterable[str], limit: int = 20) -> str:
    """Column names, save those that may be text: a CSV without a header makes its first record the names."""
    names = list(columns)
    plain = [name for name in names if re.fullmatch(r"[\w.-]{1,40}", name)][:limit]
    hidden = len(names) - len(plain)
    more = f" and {hidden} more" if plain else f"{hidden}, none of them a plain word"
    return f"columns there: {', '.join(plain)}{more if hidden else ''}"


def _check_bad_share(
    spec: TaskSpec, origin: _Origin, total: int, unusable: _Unusables, max_bad_fraction: float
) -> None:
    if total == 0:
        matching = " that matches where" if spec.where else ""
        raise DataError(f"{spec.path}: {origin.key}: {origin.name} holds no record{matching}.")
    bad = unusable.reasons.total()
    if bad <= max_bad_fraction * total:
        return
    counts = ", ".join(f"{n} x {why}" for why, n in unusable.reasons.most_common())
    raise DataError(
        f"{spec.path}: {origin.key}: {bad} of {total} records of {origin.name} cannot be used "
        f"({counts}), more than data.max_bad_fraction ({max_bad_fraction:g}) allows. "
        f"The first is at line {unusable.first_line}."
    )
