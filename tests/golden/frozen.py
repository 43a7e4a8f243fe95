"""What others rely on by name: run-file keys, presets, metrics, exit codes, files of a run's folder.

`frozen.json` is the list. `current` makes it anew from the package and from a record of the golden runs.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).with_name("frozen.json")
TASKS = ("last_word", "even")
HOW_TO_ANNOUNCE = (
    "If this is meant: `make golden-names` rewrites tests/golden/frozen.json; "
    "add a line to CHANGELOG.md that says what users have to change."
)


def current(record: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Kind of name -> name -> what it stands for."""
    from moe_medical.config import load_config
    from moe_medical.config.adapters import PRESETS

    config_class = typing.get_type_hints(load_config)["return"]
    return {
        "run file keys": dict(sorted(_keys_of_section(config_class, ""))),
        "presets": dict.fromkeys(sorted(PRESETS)),
        "exit codes": _exit_codes(),
        "metrics": dict.fromkeys(_metrics(record)),
        "files": _files(record),
    }


def _keys_of_section(section: type, prefix: str) -> Iterator[tuple[str, str]]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if "derived" in field.metadata:
            continue
        if dataclasses.is_dataclass(hint):
            yield from _keys_of_section(typing.cast(type, hint), f"{prefix}{field.name}.")
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            yield from _keys_of_section(typing.get_args(hint)[1], f"{prefix}{field.name}.<name>.")
        else:
            has_factory = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if has_factory else field.default  # type: ignore[misc]
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            yield f"{prefix}{field.name}", f"{kind} = {default!r}"


def _exit_codes() -> dict[str, int]:
    from moe_medical import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and hasattr(c, "exit_code")]
    return {c.__name__: c.exit_code for c in sorted(classes, key=lambda c: (c.exit_code, c.__name__))}


def _metrics(record: dict[str, dict[str, Any]]) -> list[str]:
    return sorted({_without_tasks(name) for one in record.values() for name in one["series"]})


def _files(record: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    files: dict[str, set[str]] = {}
    for one in record.values():
        for kind, keys in one["keys"].items():
            files.setdefault(kind, set()).update(_without_tasks(key) for key in keys)
    return {kind: sorted(files[kind]) for kind in sorted(files)}


def _without_tasks(name: str) -> str:
    return re.sub(rf"(?<![a-z_])({'|'.join(TASKS)})(?![a-z_])", "<task>", name)
