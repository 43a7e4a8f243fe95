"""Ranges of single values, beside the field: `steps: int = field(default=1000, metadata=AT_LEAST_ONE)`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moe_medical.errors import Problem


class Range(NamedTuple):
    """What a value must be."""

    rule: str
    holds: Callable[[Any], bool]


def within(rule: str, holds: Callable[[Any], bool]) -> dict[str, Any]:
    """Metadata of a field whose values have a range; of each of its values where it is a tuple."""
    return {"range": Range(rule, holds)}


AT_LEAST_ONE = within("must be at least 1", lambda v: v >= 1)
NOT_NEGATIVE = within("must not be negative", lambda v: 0 <= v < math.inf)
POSITIVE = within("must be finite and > 0", lambda v: 0 < v < math.inf)
SHARE = within("must be in [0, 1)", lambda v: 0 <= v < 1)


def range_problems(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Values of a dataclass, and of those within it, that are out of their range. None has no range."""
    for field in dataclasses.fields(section):
        key = f"{prefix}{field.name}"
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from range_problems(value, f"{key}.")
        elif isinstance(value, dict):
            for name, inner in value.items():
                if dataclasses.is_dataclass(inner):
                    yield from range_problems(inner, f"{key}.{name}.")
        elif "range" in field.metadata and value is not None:
            rule, holds = field.metadata["range"]
            if not (all(map(holds, value)) if isinstance(value, tuple) else holds(value)):
                yield Problem(key, rule, list(value) if isinstance(value, tuple) else value)
