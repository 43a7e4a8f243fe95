"""What the experts of a fitted router stand for: each task of a run -> one label, labels in a fixed order.

task            each task is a label, in the recipe's order
kind, language  what the task files say, in the order in which the recipe first says it
TAG,TAG,...     these tags, in this order; each task must have exactly one of them
FILE            YAML or JSON, an object task -> label, in the order in which it first names each label
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_medical.data.recipe import TaskSpec
from moe_medical.errors import ConfigError, DataError, Problem

_FIELDS = ("kind", "language")
_SUFFIXES = (".yaml", ".yml", ".json")


def label_tasks(labels: str, specs: Sequence[TaskSpec]) -> tuple[dict[str, str], list[str]]:
    """Task -> label, and the labels in their order.

    Args:
        labels: One of the four forms.
        specs: The run's tasks, in the recipe's order.

    Raises:
        ConfigError: a task has no label or several, or the file names a task that the run does not have.
        DataError: the file cannot be read.
    """
    if labels.endswith(_SUFFIXES):
        return _from_file(Path(labels), specs)
    if labels == "task":
        of_task = {spec.name: spec.name for spec in specs}
    elif labels in _FIELDS:
        of_task = {spec.name: str(getattr(spec, labels)) for spec in specs}
    else:
        return _from_tags(labels.split(","), specs)
    return of_task, _in_order(of_task.values())


def _from_tags(tags: Sequence[str], specs: Sequence[TaskSpec]) -> tuple[dict[str, str], list[str]]:
    problems = []
    of_task = {}
    for spec in specs:
        found = [tag for tag in tags if tag in spec.tags]
        if len(found) == 1:
            of_task[spec.name] = found[0]
        else:
            rule = f"must have exactly one of the tags {', '.join(tags)}"
            problems.append(Problem(f"{spec.path}: tags", rule, list(spec.tags)))
    if problems:
        raise ConfigError("--labels", problems)
    return of_task, _in_order(tags)


def _from_file(path: Path, specs: Sequence[TaskSpec]) -> tuple[dict[str, str], list[str]]:
    given = _read(path)
    names = [spec.name for spec in specs]
    problems = [Problem(name, "must have a label") for name in names if name not in given]
    fix = f"Tasks there: {', '.join(names)}."
    problems += [
        Problem(str(name), "is not a task of the run", fix=fix) for name in given if name not in names
    ]
    problems += [
        Problem(str(name), "must have a label that is a name", label)
        for name, label in given.items()
        if name in names and not (isinstance(label, str) and label)
    ]
    if problems:
        raise ConfigError(str(path), problems)
    return {name: given[name] for name in names}, _in_order(given.values())


def _read(path: Path) -> Mapping[Any, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or "not text"
        raise DataError(f"{path}: is not readable YAML or JSON ({reason}).") from None
    if not isinstance(given, dict):
        raise ConfigError(str(path), [Problem(str(path), "must be an object task -> label")])
    return given


def _in_order(labels: Any) -> list[str]:
    return list(dict.fromkeys(labels))
