"""The JSON settings of a foreign folder: read as data, each key asked for by type."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moe_medical.errors import ConfigError, DataError, Problem

_T = TypeVar("_T", int, float, str, bool)
LARGE = 1e30
END_OF_NAME = r"(.*\.)?({})$"
"""How PEFT matches the keys of `rank_pattern` and `alpha_pattern`."""
_MISSING = object()
MOST = 65_536
"""Of any count; more is a mistake, or meant to fill the memory."""


@dataclass
class Settings:
    """One JSON object, with the mistakes found in it."""

    path: Path
    values: Mapping[str, Any]
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Settings:
        """From a file.

        Raises:
            DataError: Unreadable, or no JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not readable JSON ({error}).") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}: must hold a JSON object.")
        return cls(path, values)

    def whole(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number of at least 1."""
        rule = f"must be a whole number from 1 to {most}"
        return self._of(key, int, lambda v: _is_int(v) and 1 <= v <= most, rule, default, 1)

    def number(self, key: str, default: float | None = None, zero: bool = True) -> float:
        """A number that is not negative, nor 0 unless it may be."""
        rule = "must be a number, not below 0" if zero else "must be a number above 0"
        return self._of(key, float, lambda v: _is_number(v) and (v > 0 or zero), rule, default, 1.0)

    def share(self, key: str) -> float:
        """A number from 0 to below 1; 0 where it is not given or null."""
        rule = "must be a number from 0 to below 1"
        return self._of(key, float, lambda v: _is_number(v) and v < 1, rule, 0.0, 0.0)

    def patterns(self, key: str) -> None:
        """Refuse what is neither a regular expression nor names: a list, or an object of name -> whether."""
        value = self.values.get(key)
        if isinstance(value, str):
            self._compiles(key, value, value)
        elif value is not None and not (
            isinstance(value, list | dict) and all(type(v) is str for v in value)
        ):
            self.complain(key, "must be a pattern or names", value)

    def names(self, key: str) -> list[str]:
        """The names of a list, or those of an object of name -> whether that are chosen."""
        value = self.values.get(key)
        if isinstance(value, dict):
            return [name for name, chosen in value.items() if chosen]
        return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []

    def by_pattern(self, key: str) -> Settings:
        """An object whose keys are patterns of the ends of modules' names; its mistakes count as ours."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            self.complain(key, "must be an object", value)
            value = {}
        for pattern in value:
            self._compiles(key, pattern, END_OF_NAME.format(pattern))
        return Settings(self.path, value, self.problems)

    def flag(self, key: str) -> bool:
        """True or false; false where it is not given or null."""
        return self._of(key, bool, lambda v: isinstance(v, bool), "must be true or false", False, False)

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        return self._of(key, str, lambda v: isinstance(v, str), "must be a text", default, "")

    def must_be(self, key: str, *allowed: object, fix: str = "") -> None:
        """Refuse any other value; a key that is not given or null counts as the first of them."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            rule = f"must be {' or '.join(map(repr, allowed))}"
            self.complain(key, rule, value, fix)

    def must_be_unset(self, *keys: str) -> None:
        """Refuse whatever would change the numbers in a way that is not known here."""
        for key in keys:
            if self.values.get(key) not in (None, False, [], {}, ""):
                self.complain(key, "is not supported", self.values[key])

    def complain(self, key: str, rule: str, value: object = None, fix: str = "") -> None:
        """Add a mistake."""
        self.problems.append(Problem(f"{self.path.name}: {key}", rule, value, fix))

    def refuse(self) -> None:
        """Raise if anything was wrong.

        Raises:
            ConfigError: Every mistake.
        """
        if self.problems:
            raise ConfigError(str(self.path.parent), self.problems)

    def _compiles(self, key: str, shown: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error:
            self.complain(key, "must be a regular expression", shown)

    def _of(
        self,
        key: str,
        kind: Callable[[Any], _T],
        ok: Callable[[Any], bool],
        rule: str,
        default: Any,
        wrong: _T,
    ) -> _T:
        value = self.values.get(key, _MISSING)
        if value is _MISSING or (value is None and default is not None):
            if default is not None:
                return kind(default)
            self.complain(key, "is missing")
            return wrong
        if not ok(value):
            self.complain(key, rule, value)
            return wrong
        return kind(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    real = _is_int(value) or isinstance(value, float)
    return real and 0 <= value < LARGE  # type: ignore[operator]
