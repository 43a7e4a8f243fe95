"""A record -> the `Example`s of a task: its format, derived columns, templates filled, images found.

Decisions: `where` looks at the record as it is, before its format; a record that does not match is not of the
task and is no bad record. A derived column (`{options_lettered}`, `{entity_lines}`, ...) is made only where a
template uses it and the record does not have it; its text is in the form that the metrics read. A prompt can
hold texts, finite numbers, true and false, and lists of them; a record with anything else cannot be used. Why
it cannot is told by column and type, never by its text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from moe_medical.data.published import FORMATS, LETTERS, BadShape, Row, letters_of, text_of
from moe_medical.data.recipe import TaskSpec, parse_template, template_columns
from moe_medical.data.rows import Example

LIST_SEPARATOR = "; "
_YES_NO = {
    **dict.fromkeys(("yes", "true", "1", "是", "是的"), 0),
    **dict.fromkeys(("no", "false", "0", "否", "不是"), 1),
    **dict.fromkeys(("maybe", "不确定"), 2),
}


class ExampleMaker:
    """What turns the records of a task into examples, in two steps.

    `rows` gives the rows of columns, a call fills the templates from one of them: so the caller can say which
    columns there were where a template finds none. Both raise BadShape for a record that cannot be used.
    """

    def __init__(self, spec: TaskSpec) -> None:
        self._spec = spec
        self._prompt = parse_template(spec.prompt)
        self._target = parse_template(spec.target)
        self._format = FORMATS[spec.format] if spec.format else None
        # Compared as texts: a CSV holds no numbers, and a YAML holds 1 where it means "1".
        self._where = {
            column: frozenset(map(str, value if isinstance(value, (list, tuple)) else [value]))
            for column, value in spec.where.items()
        }
        used = [*template_columns(spec.prompt), *template_columns(spec.target)]
        self._derived = [column for column in used if column in DERIVED]
        self._images = _Images(spec.images, spec.image) if spec.image and spec.images else None

    def rows(self, record: Row) -> list[Row]:
        """The rows of one record: none where it is not of the task, several for a conversation."""
        if not all(str(record.get(column)) in texts for column, texts in self._where.items()):
            return []
        rows = self._format(record) if self._format else [record]
        id = self._spec.id
        if id and len(rows) > 1:
            rows = [{**row, id: f"{row.get(id)}#{i}"} for i, row in enumerate(rows, start=1)]
        return [
            row | {column: DERIVED[column](row, self._spec) for column in self._derived if column not in row}
            for row in rows
        ]

    def __call__(self, row: Row, number: int) -> Example:
        """The example of the row with this number of a record; "" is its id where the task has none."""
        prompt = _fill(self._prompt, row)
        target = _fill(self._target, row)
        if not prompt:
            raise BadShape("empty prompt")
        if not target:
            raise BadShape("empty target")
        column = self._spec.choices
        choices: tuple[str, ...] = ()
        if column is not None:
            choices = tuple(_scalar(item, column) for item in _as_list(_value(row, column), column))
        image = self._images(row) if self._images else None
        return Example(self._spec.name, self._identity(row, number), prompt, target, choices, image)

    def _identity(self, row: Row, number: int) -> str:
        column = self._spec.id
        if column is None:
            return ""
        identity = _text(row, column)
        if not identity:
            raise BadShape(f"empty column {column!r}")
        return f"{identity}#{number}" if number else identity


# --- values of a row ---


def _fill(template: Sequence[tuple[str, str | None]], row: Row) -> str:
    parts = (literal + (_text(row, column) if column is not None else "") for literal, column in template)
    return "".join(parts).strip()


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    if isinstance(value, (list, tuple)):
        return LIST_SEPARATOR.join(_scalar(item, column) for item in value)
    return _scalar(value, column)


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise BadShape(f"missing column {column!r}")
    if row[column] is None:
        raise BadShape(f"column {column!r} is null")
    return row[column]


def _scalar(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise BadShape(f"column {column!r} is not a finite number")
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise BadShape(f"column {column!r} is of type {type(value).__name__}")
    if "\0" in value:
        raise BadShape(f"NUL character in column {column!r}")
    # JSON may spell half of a character; neither Arrow nor a tokenizer takes it.
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadShape(f"invalid Unicode in column {column!r}")
    return value


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    if column not in row:
        raise BadShape(f"missing column {column!r}")
    return _as_list(row[column], column)


def _as_list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str):  # CSV has no lists: a JSON list in the cell
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


def image_content(spec: TaskSpec) -> str | None:
    """Hash that tells which images a task's rows would find, from names alone; None where it has none."""
    if not spec.image or spec.images is None:
        return None
    running = hashlib.sha256()
    for folder, files in _folders(spec.images):
        archives = [_state(os.path.join(folder, name)) for name in files if name.endswith(".zip")]
        running.update(json.dumps([os.path.relpath(folder, spec.images), files, archives]).encode())
    return running.hexdigest()


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
    """A folder of images and of zip archives of images.

    Called with a row it gives the path of the row's image, or `archive.zip/member`; BadShape where the column
    is empty, leads out of the folder, or names no file.
    """

    def __init__(self, folder: Path, column: str) -> None:
        self._folder = folder
        self._column = column
        self._members: dict[Path, frozenset[str]] = {}

    def __call__(self, row: Row) -> str:
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
