"""A record -> the rows that fill a task's templates: its records, their format, derived columns.

Decisions: a derived column (`{options_lettered}`, `{entity_lines}`, ...) is made only where a template
uses it and the record does not have it; its text is in the form that the metrics read. `where` looks at
the record as it is, before its format. A record that does not match is not of the task and is no bad
record.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from moe_medical.data.published import (
    LETTERS,
    BadShape,
    RecordFormat,
    Row,
    letters_of,
    record_format,
    text_of,
)

if TYPE_CHECKING:
    from moe_medical.data.recipe import TaskSpec

_YES_NO = {
    **dict.fromkeys(("yes", "true", "1", "是", "是的"), 0),
    **dict.fromkeys(("no", "false", "0", "否", "不是"), 1),
    **dict.fromkeys(("maybe", "不确定"), 2),
}


def row_maker(spec: TaskSpec, used: Sequence[str]) -> RecordFormat:
    """What turns one record into rows: none where it is not of the task, several for a conversation.

    Args:
        spec: The task.
        used: Columns that its templates use.

    Returns:
        A function that raises BadShape for a record that cannot be used.
    """
    reshape = record_format(spec.format) if spec.format else None
    wanted = {column: _as_texts(value) for column, value in spec.where.items()}
    derived = [column for column in used if column in DERIVED]

    def rows(record: Row) -> list[Row]:
        if not all(str(record.get(column)) in texts for column, texts in wanted.items()):
            return []
        found = reshape(record) if reshape else [record]
        if spec.id and len(found) > 1:
            found = [{**row, spec.id: f"{row.get(spec.id)}#{i}"} for i, row in enumerate(found, start=1)]
        return [_with_derived(spec, row, derived) for row in found]

    return rows


def image_finder(spec: TaskSpec) -> Callable[[Row], str | None]:
    """What finds a row's image: None where the task has none, else its path or `archive.zip/member`.

    Returns:
        A function that raises BadShape where the column is empty, leads out of `spec.images`, or names no
        file.
    """
    return _Images(spec.images, spec.image).find if spec.image and spec.images else _no_image


def image_content(spec: TaskSpec) -> str | None:
    """Hash that tells which images `image_finder` would find, from names alone; None where it needs none."""
    if not spec.image or spec.images is None:
        return None
    running = hashlib.sha256()
    for folder, files in _folders(spec.images):
        archives = [_state(os.path.join(folder, name)) for name in files if name.endswith(".zip")]
        running.update(json.dumps([os.path.relpath(folder, spec.images), files, archives]).encode())
    return running.hexdigest()


def _as_texts(value: object) -> frozenset[str]:
    return frozenset(map(str, value if isinstance(value, (list, tuple)) else [value]))


def _with_derived(spec: TaskSpec, row: Row, derived: Sequence[str]) -> Row:
    made = {column: DERIVED[column](row, spec) for column in derived if column not in row}
    return {**row, **made} if made else row


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    """The column as a list; a CSV cell holds it as JSON."""
    if column not in row:
        raise BadShape(f"missing column {column!r}")
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, (list, tuple)):
        raise BadShape(f"column {column!r} is not a list")
    return list(value)


def _texts(values: Sequence[Any], column: str) -> list[str]:
    return [text_of({column: value}, column) for value in values]


# --- derived columns ---


def _options(row: Row, spec: TaskSpec) -> list[tuple[str, str]]:
    column = spec.choices or "choices"
    texts = _texts(_list(row, column), column)
    letters = row.get("choice_letters") or LETTERS[: len(texts)]
    if len(letters) != len(texts):
        raise BadShape(f"column {column!r} has more than {len(LETTERS)} options")
    return list(zip(letters, texts, strict=True))


def _options_lettered(row: Row, spec: TaskSpec) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in _options(row, spec))


def _options_listed(row: Row, spec: TaskSpec) -> str:
    return ("，" if _is_chinese(spec) else ", ").join(text for _, text in _options(row, spec))


def _answer_letters(row: Row, spec: TaskSpec) -> str:
    """The answer's letters, from letters or from the text of an option; a number would be ambiguous."""
    answer = text_of(row, "answer")
    options = _options(row, spec)
    letters = letters_of(answer)
    if letters and set(letters) <= {letter for letter, _ in options}:
        return letters
    for letter, text in options:
        if text == answer:
            return letter
    raise BadShape("column 'answer' is neither the letter nor the text of an option")


def _yes_no(row: Row, spec: TaskSpec) -> str:
    value = row.get("answer")
    said = str(value).strip().casefold() if isinstance(value, (str, bool, int)) else ""
    if said not in _YES_NO:
        raise BadShape("column 'answer' is not yes, no or maybe")
    return (("是", "否", "不确定") if _is_chinese(spec) else ("yes", "no", "maybe"))[_YES_NO[said]]


def _entity_lines(row: Row, spec: TaskSpec) -> str:
    """`type: mention; mention` per type, types and mentions in order of appearance."""
    colon, semicolon = ("：", "；") if _is_chinese(spec) else (": ", "; ")
    mentions: dict[str, dict[str, None]] = {}
    for entity in _list(row, "entities"):
        kind, mention = _fields(entity, ("type", "mention"), "entities")
        mentions.setdefault(kind, {})[mention] = None
    return _lines([kind + colon + semicolon.join(found) for kind, found in mentions.items()], spec)


def _relation_lines(row: Row, spec: TaskSpec) -> str:
    relations = [_fields(r, ("head", "relation", "tail"), "relations") for r in _list(row, "relations")]
    return _lines([" | ".join(relation) for relation in dict.fromkeys(relations)], spec)


def _event_lines(row: Row, spec: TaskSpec) -> str:
    """`field: value, value | field: value` per event; an empty field is left out."""
    colon, comma = ("：", "，") if _is_chinese(spec) else (": ", ", ")
    lines = []
    for event in _list(row, "events"):
        if not isinstance(event, dict):
            raise BadShape("column 'events' holds something that is not an object")
        fields = {key: _texts(v if isinstance(v, list) else [v], "events") for key, v in event.items()}
        lines.append(" | ".join(key + colon + comma.join(v) for key, v in fields.items() if any(v)))
    return _lines([line for line in lines if line], spec)


def _dialogue_lines(row: Row, spec: TaskSpec) -> str:
    if isinstance(row.get("dialogue"), str):
        return text_of(row, "dialogue")
    turns = [_fields(turn, ("role", "text"), "dialogue") for turn in _list(row, "dialogue")]
    colon = "：" if _is_chinese(spec) else ": "
    return "\n".join(f"{role}{colon}{text}" for role, text in turns)


def _fields(value: Any, names: tuple[str, ...], column: str) -> tuple[str, ...]:
    """The named values of an object, or of a list in that order."""
    if isinstance(value, dict) and all(name in value for name in names):
        value = [value[name] for name in names]
    if not isinstance(value, (list, tuple)) or len(value) != len(names):
        raise BadShape(f"column {column!r} needs {', '.join(names)} in every entry")
    return tuple(_texts(value, column))


def _lines(lines: list[str], spec: TaskSpec) -> str:
    return "\n".join(lines) or ("无" if _is_chinese(spec) else "none")


def _is_chinese(spec: TaskSpec) -> bool:
    return spec.language.partition("-")[0] == "zh"


DERIVED: Mapping[str, Callable[[Row, TaskSpec], str]] = {
    "options_lettered": _options_lettered,
    "options_listed": _options_listed,
    "answer_letters": _answer_letters,
    "yes_no": _yes_no,
    "entity_lines": _entity_lines,
    "relation_lines": _relation_lines,
    "event_lines": _event_lines,
    "dialogue_lines": _dialogue_lines,
}
"""Column that a template may use -> how it is made."""


# --- images ---


def _no_image(row: Row) -> str | None:
    return None


def _folders(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `top` with the names of its files, in one order; behind links too."""
    seen: set[str] = set()
    for folder, inner, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        inner[:] = [] if real in seen else sorted(inner)  # a link may lead upwards
        seen.add(real)
        yield folder, sorted(files)


def _state(archive: str) -> tuple[int, int] | None:
    """Changes with the members of an archive; None where it cannot be seen."""
    with suppress(OSError):
        info = os.stat(archive)
        return info.st_size, info.st_mtime_ns
    return None


class _Images:
    """A folder of images and of zip archives of images."""

    def __init__(self, folder: Path, column: str) -> None:
        self._folder = folder
        self._column = column
        self._members: dict[Path, frozenset[str]] = {}

    def find(self, row: Row) -> str | None:
        name = PurePosixPath(text_of(row, self._column))
        if not name.name:
            raise BadShape(f"empty column {self._column!r}")
        if name.is_absolute() or ".." in name.parts:
            raise BadShape(f"column {self._column!r} leads out of the folder of images")
        if not self._holds(name):
            raise BadShape("the image is missing")
        return str(self._folder / name)

    def _holds(self, name: PurePosixPath) -> bool:
        for i, part in enumerate(name.parts[:-1], start=1):
            if part.endswith(".zip"):
                archive = self._folder.joinpath(*name.parts[:i])
                return str(PurePosixPath(*name.parts[i:])) in self._read_members(archive)
        return (self._folder / name).is_file()

    def _read_members(self, archive: Path) -> frozenset[str]:
        if archive not in self._members:
            try:
                with zipfile.ZipFile(archive) as file:
                    self._members[archive] = frozenset(file.namelist())
            except (OSError, zipfile.BadZipFile):
                raise BadShape("the archive of the image cannot be read") from None
        return self._members[archive]
