"""Task YAMLs and mixture YAMLs -> `TaskSpec`s, with every mistake of every file reported at once.

Decisions: one YAML per task, one YAML per mixture that names tasks by path or glob. Paths in a task YAML
are relative to that YAML. A glob must match something and no two tasks share a name. Rows come from exactly
one of files, hub and builder. Templates know `{column}` and nothing else: no attributes, indices or format
specs, so a recipe from elsewhere cannot reach into Python objects. Prompt, target and metric may be left out
and are then the kind's (`kinds.py`).
Does not look at the data: whether files and columns exist is found by `sources.load_split`.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_medical.data.kinds import KINDS, KNOWN_METRICS, Kind
from moe_medical.data.published import FORMATS
from moe_medical.data.readers import READERS
from moe_medical.data.yaml_keys import Problems, read_keys, suggest

SPLITS = ("train", "validation", "test")
DUPLICATES = ("keep", "drop")
YAML_SUFFIXES = (".yaml", ".yml")


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


@dataclass(frozen=True)
class TaskSpec:
    """One task, as its YAML describes it."""

    name: str
    kind: str
    metric: str
    path: Path
    """The YAML file."""
    source: Source
    prompt: str
    target: str
    choices: str | None = None
    """Column with the list of options, or the label set."""
    id: str | None = None
    """Column with the record's identity; None numbers the records."""
    format: str | None = None
    """The published format of the records, a name in `published.FORMATS`; None takes them as they are."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Column -> the value, or list of values, of the records that are of this task."""
    image: str | None = None
    """Column with the name of the record's image; None is a task of text."""
    images: Path | None = None
    """Folder of the images, absolute; None where there are none."""
    licence: str = ""
    citation: str = ""
    attribution: str = ""
    language: str = "en"
    tags: tuple[str, ...] = ()
    phi: bool = False
    """Whether records may hold protected health information."""
    weight: float = 1.0
    """Multiplies the task's share after the mixing rule."""
    max_repeats: float | None = None
    """Epochs of the task at most; None takes the mixture's."""


@dataclass
class HygieneSettings:
    """What a mixture does about rows that are there more than once. The default changes nothing."""

    duplicates: str = "keep"
    """Training rows equal to an earlier row of the task: keep or drop."""
    near_duplicates: str = "keep"
    overlap: str = "keep"
    """Training rows that an evaluation split has as well: keep or drop."""
    threshold: float = 0.8
    """Least Jaccard similarity of near-duplicates, in (0, 1]."""


@dataclass(frozen=True)
class Mixture:
    """A mixture YAML with its tasks."""

    name: str
    tasks: list[TaskSpec]
    hygiene: HygieneSettings


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
class _SourceKeys:
    """The keys as the YAML has them."""

    builder: str | None = None
    files: _FilesKeys | None = None
    hub: _HubKeys | None = None


@dataclass
class _TaskKeys:
    name: str = ""
    kind: str = ""
    metric: str = ""
    source: _SourceKeys = field(default_factory=_SourceKeys)
    prompt: str = ""
    target: str = ""
    choices: str | None = None
    id: str | None = None
    format: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    images: str | None = None
    licence: str = ""
    citation: str = ""
    attribution: str = ""
    language: str = "en"
    tags: list[str] = field(default_factory=list)
    phi: bool = False
    weight: float = 1.0
    max_repeats: float | None = None


@dataclass
class _MixtureKeys:
    name: str = ""
    tasks: list[str] = field(default_factory=list)
    hygiene: HygieneSettings = field(default_factory=HygieneSettings)


def load_mixture(path: Path) -> Mixture:
    """A mixture YAML and its tasks, in its order, each file once.

    Raises:
        ConfigError: with every problem of the mixture and of all its task files; the path of a problem
            is `file: key`.
    """
    found = Problems()
    keys = read_keys(path, _MixtureKeys, found)
    files = _task_files(path, keys, found) if keys else []
    specs = [spec for file in files if (spec := _load_task(file, found)) is not None]
    _check_names_differ(specs, found)
    if keys:
        _check_hygiene(keys.hygiene, path, found)
    found.raise_if_any(path)
    assert keys is not None, "a mixture that cannot be read has a problem"
    return Mixture(keys.name, specs, keys.hygiene)


def load_task(path: Path) -> TaskSpec:
    """One task YAML on its own; raises ConfigError as `load_mixture` does."""
    found = Problems()
    spec = _load_task(path, found)
    found.raise_if_any(path)
    assert spec is not None, "a task that cannot be read has a problem"
    return spec


def parse_template(text: str) -> list[tuple[str, str | None]]:
    """Splits a template into (literal text, the column after it or None).

    Raises:
        ValueError: where it breaks the rule that only `{column}` is allowed.
    """
    parts = list(string.Formatter().parse(text))
    for _, column, spec, conversion in parts:
        plain = column is None or (column.strip() and not re.search(r"[.\[\]]", column))
        if spec or conversion or not plain:
            raise ValueError("may hold only {column}: no attribute, index, conversion or format spec")
    return [(literal, column) for literal, column, _, _ in parts]


def template_columns(text: str) -> list[str]:
    """Columns that a valid template reads, in order."""
    return [column for _, column in parse_template(text) if column is not None]


def _task_files(path: Path, keys: _MixtureKeys, found: Problems) -> list[Path]:
    found.check(bool(keys.name), f"{path}: name", "must be given")
    found.check(bool(keys.tasks), f"{path}: tasks", "must name at least one task YAML")
    files = {}
    for i, entry in enumerate(keys.tasks):
        pattern = entry if entry.endswith(YAML_SUFFIXES) else f"{entry}.yaml"
        matches = sorted(path.parent.glob(pattern)) if not Path(pattern).is_absolute() else [Path(pattern)]
        if not matches:
            near = [str(f.relative_to(path.parent)) for f in sorted(path.parent.rglob("*.yaml")) if f != path]
            found.add(f"{path}: tasks[{i}]", "matches no file", entry, suggest(pattern, near) if near else "")
        files.update({f.resolve(): f for f in matches})
    return list(files.values())


def _check_names_differ(specs: list[TaskSpec], found: Problems) -> None:
    first: dict[str, Path] = {}
    for spec in specs:
        other = first.setdefault(spec.name, spec.path)
        if spec.name and other != spec.path:
            found.add(f"{spec.path}: name", f"must be unique in a mixture, but {other} has it too", spec.name)


def _load_task(path: Path, found: Problems) -> TaskSpec | None:
    keys = read_keys(path, _TaskKeys, found)
    if keys is None:
        return None
    _take_defaults(keys, path, found)
    _check_words(keys, path, found)
    _check_numbers(keys, path, found)
    _check_templates(keys, path, found)
    source = _source(keys.source, path, found)
    given = {f: getattr(keys, f) for f in _TaskKeys.__dataclass_fields__}
    images = path.parent.absolute() / Path(keys.images or ".").expanduser() if keys.image else None
    given |= {"path": path, "source": source, "tags": tuple(keys.tags), "images": images}
    return TaskSpec(**given)


def _take_defaults(keys: _TaskKeys, path: Path, found: Problems) -> None:
    """Fills prompt, target, metric and choices from the kind where they are left out."""
    kind = KINDS.get(keys.kind)
    if kind is None:
        found.check_known(keys.kind, tuple(KINDS), f"{path}: kind")
        kind = Kind({}, "", ())
    elif not keys.prompt and kind.prompt(keys.language, keys.choices is not None) is None:
        rule = f"must be given: kind {keys.kind} has prompts in {', '.join(kind.prompts)} only"
        found.add(f"{path}: prompt", rule, keys.language)
    keys.prompt = keys.prompt or kind.prompt(keys.language, keys.choices is not None) or ""
    keys.target = keys.target or kind.target
    if not keys.metric and kind.metrics:
        keys.metric = kind.metric(keys.language)
    if keys.choices is None and "{options_" in keys.prompt:
        keys.choices = "choices"


def _check_words(keys: _TaskKeys, path: Path, found: Problems) -> None:
    found.check(bool(keys.name), f"{path}: name", "must be given")
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", keys.name or "x")
    found.check(bool(plain), f"{path}: name", "may hold only letters, digits, '_' and '-'", keys.name)
    suited = KINDS[keys.kind].metrics if keys.kind in KINDS else KNOWN_METRICS
    if keys.metric in KNOWN_METRICS and keys.metric not in suited:
        rule = f"must be one that suits kind {keys.kind}"
        found.add(f"{path}: metric", rule, keys.metric, f"One of: {', '.join(suited)}.")
    else:
        found.check_known(keys.metric, KNOWN_METRICS, f"{path}: metric")
    if keys.format is not None:
        found.check_known(keys.format, tuple(FORMATS), f"{path}: format")
    found.check(
        keys.images is None or keys.image is not None,
        f"{path}: images",
        "needs image, the column of their names",
    )
    tag = re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", keys.language)
    found.check(bool(tag), f"{path}: language", "must be a language tag such as en or zh", keys.language)


def _check_numbers(keys: _TaskKeys, path: Path, found: Problems) -> None:
    for key, value in (("weight", keys.weight), ("max_repeats", keys.max_repeats)):
        holds = value is None or (math.isfinite(value) and value > 0)
        found.check(holds, f"{path}: {key}", "must be a finite number > 0", value)


def _check_templates(keys: _TaskKeys, path: Path, found: Problems) -> None:
    for key, text in (("prompt", keys.prompt), ("target", keys.target)):
        where = f"{path}: {key}"
        try:
            columns = template_columns(text)
        except ValueError as e:
            found.add(where, f"is not a template ({e})", text, "Write literal braces as {{ and }}.")
            continue
        found.check(bool(text), where, "must be given", fix='For example "{instruction}\\n{input}".')
        found.check(bool(columns), where, "must use at least one {column}", text)


def _check_hygiene(keys: HygieneSettings, path: Path, found: Problems) -> None:
    for key in ("duplicates", "near_duplicates", "overlap"):
        found.check_known(getattr(keys, key), DUPLICATES, f"{path}: hygiene.{key}")
    rule = "must be a number above 0 and at most 1"
    found.check(0 < keys.threshold <= 1, f"{path}: hygiene.threshold", rule, keys.threshold)


def _source(keys: _SourceKeys, path: Path, found: Problems) -> Source:
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
            found.check(entry.endswith(tuple(READERS)), place, f"must end in {', '.join(READERS)}", entry)
        patterns[split] = tuple(str(path.parent.absolute() / Path(e).expanduser()) for e in entries)
    return patterns
