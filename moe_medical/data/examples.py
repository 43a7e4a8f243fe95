"""A task's rows of columns -> `Example`s: templates filled, choices read, images found.

Decisions: a prompt can hold texts, finite numbers, true and false, and lists of them; a record with anything
else cannot be used. Why it cannot is told by column and type, never by its text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from moe_medical.data.columns import image_finder, row_maker
from moe_medical.data.published import BadShape
from moe_medical.data.recipe import TaskSpec, parse_template, template_columns
from moe_medical.data.rows import Example

LIST_SEPARATOR = "; "


class ExampleMaker:
    """Fills a task's templates from rows."""

    def __init__(self, spec: TaskSpec) -> None:
        self._task = spec.name
        self._id = spec.id
        self._choices = spec.choices
        self._prompt = parse_template(spec.prompt)
        self._target = parse_template(spec.target)
        self.rows = row_maker(spec, [*template_columns(spec.prompt), *template_columns(spec.target)])
        """Record -> the rows that fill the templates, none where it is not of the task."""
        self._image = image_finder(spec)

    def __call__(self, row: dict[str, Any], number: int) -> Example:
        """The example of a record's row; its id is "" where the task names no column for it."""
        prompt = _fill(self._prompt, row)
        target = _fill(self._target, row)
        if not prompt:
            raise BadShape("empty prompt")
        if not target:
            raise BadShape("empty target")
        choices = _choices(row, self._choices)
        image = self._image(row)
        return Example(self._task, self._identity(row, number), prompt, target, choices, image)

    def _identity(self, row: dict[str, Any], number: int) -> str:
        if self._id is None:
            return ""
        identity = _text(row, self._id)
        if not identity:
            raise BadShape(f"empty column {self._id!r}")
        return f"{identity}#{number}" if number else identity


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
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadShape(f"invalid Unicode in column {column!r}")
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
        raise BadShape(f"column {column!r} is not a list")
    return tuple(_scalar(item, column) for item in value)
