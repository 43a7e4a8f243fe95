"""What each task reaches by itself: the file that `moe-medical baseline` writes and the tracker reads.

Decisions:
- JSON of format 1 and nothing else, checked to the last field before a run starts, every problem at once.
- It may lack tasks of the run, which then have no gain to show, but not all of them.
- A gain is relative and positive where the run is better, for losses (lower is better) and scores alike, so
  that the mean of the gains is the delta m of Maninis et al. 2019 and Vandenhende et al. 2021.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moe_medical.errors import ConfigError, Problem

_LOG = logging.getLogger(__name__)

FORMAT = 1
SOLVED = 0.01
"""Nats per token. Smaller losses count as this one in the divisor of a relative change: a solved task whose
loss doubles from next to nothing has not lost all that it had."""
_MAKE_ANEW = "Make the file anew with moe-medical baseline."


def relative_gain(now: float, before: float, higher_is_better: bool = False) -> float:
    """How much better `now` is than `before`, relative to `before`; positive is better.

    Losses are in nats per token. For scores, the sign is the other one, and NaN where `before` is 0.
    """
    if higher_is_better:
        return (now - before) / abs(before) if before else math.nan
    return (before - now) / max(before, SOLVED)


@dataclass(frozen=True)
class TaskReference:
    """One task of a control run, evaluated on the probe rows of the run that it is a reference of."""

    loss: float
    """Nats per target token."""
    score: float | None
    """None where scores were not made."""
    metric: str
    tokens: int
    """Tokens of the samples that it was trained on."""
    steps: int


@dataclass(frozen=True)
class Reference:
    """The control arms of a run."""

    run: str
    """Name of the run that they are the reference of."""
    tokens: int
    """Tokens of samples that each arm may use."""
    single: dict[str, TaskReference]
    """Each task trained by itself."""
    multi: dict[str, TaskReference] | None = None
    """All tasks with one LoRA of as many trainable parameters as the run has."""
    trainable_parameters: dict[str, int | None] = field(default_factory=dict)
    """Of `run`, `single` and `multi`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How they were trained."""

    def loss_gain(self, task: str, loss: float) -> float:
        """MTL gain of a task's evaluation loss over its single-task loss; NaN without a reference."""
        mine = self.single.get(task)
        return relative_gain(loss, mine.loss) if mine else math.nan

    def score_gain(self, task: str, score: float | None) -> float:
        """The same for its score, of which higher is better; NaN where one is missing or the reference 0."""
        mine = self.single.get(task)
        if mine is None or mine.score is None or score is None:
            return math.nan
        return relative_gain(score, mine.score, higher_is_better=True)

    def to_json(self) -> dict[str, Any]:
        """For the file: `json.dumps(reference.to_json(), allow_nan=False)`."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, source: str = "the reference") -> Reference:
        """Check and take over what `to_json` gave.

        Args:
            data: Anything that `json.loads` gives.
            source: Where it comes from, for errors.

        Raises:
            ConfigError: with every problem.
        """
        problems = _Checks()
        made = problems.reference(data)
        if problems.found or made is None:
            raise ConfigError(source, problems.found)
        return made


def load_reference(path: Path | str, tasks: Sequence[str]) -> Reference:
    """Read a reference file for a run of these tasks; one log line names those that it lacks.

    Raises:
        ConfigError: the file cannot be read, is not of this format, or holds none of the tasks.
    """
    path = Path(path)
    reference = Reference.from_json(_read(path), str(path))
    missing = [task for task in tasks if task not in reference.single]
    if len(missing) == len(tasks):
        found = ", ".join(sorted(reference.single)) or "none"
        raise ConfigError(str(path), [Problem("single", "must hold a task of this run", found, _MAKE_ANEW)])
    if missing:
        _LOG.warning("%s has no reference for %d tasks: %s", path, len(missing), ", ".join(missing))
    return reference


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        problem = Problem(str(path), "must be a readable file", e.strerror, _MAKE_ANEW)
    except (ValueError, RecursionError):
        problem = Problem(str(path), "must be JSON", fix=_MAKE_ANEW)
    raise ConfigError(str(path), [problem])


_Numbers = (int, float)
_PARTS: Mapping[str, tuple[type, ...]] = {
    "run": (str,),
    "tokens": (int,),
    "single": (dict,),
    "multi": (dict, type(None)),
    "trainable_parameters": (dict,),
    "settings": (dict,),
}
_TASK_PARTS: Mapping[str, tuple[type, ...]] = {
    "loss": _Numbers,
    "score": (*_Numbers, type(None)),
    "metric": (str,),
    "tokens": (int,),
    "steps": (int,),
}
_NAMES = {dict: "a table", str: "a string", int: "a whole number", float: "a number", type(None): "null"}
assert {f.name for f in fields(TaskReference)} == set(_TASK_PARTS)


class _Checks:
    """Collects what is wrong with a reference."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def reference(self, data: Any) -> Reference | None:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            version = data.get("format") if isinstance(data, dict) else None
            self._add("format", f"must be {FORMAT}", version)
            return None
        parts = self._parts("", {k: v for k, v in data.items() if k != "format"}, _PARTS)
        if parts is None:
            return None
        for name, count in parts["trainable_parameters"].items():
            if count is not None and (type(count) is not int or count < 0):
                self._add(f"trainable_parameters.{name}", "must be a whole number or null", count)
        parts["single"] = self._tasks("single", parts["single"])
        if parts["multi"] is not None:
            parts["multi"] = self._tasks("multi", parts["multi"])
        return Reference(**parts)

    def _tasks(self, where: str, tasks: dict[str, Any]) -> dict[str, TaskReference]:
        made = {name: self._task(f"{where}.{name}", task) for name, task in tasks.items()}
        return {name: task for name, task in made.items() if task is not None}

    def _task(self, where: str, data: Any) -> TaskReference | None:
        if not isinstance(data, dict):
            self._add(where, "must be a table", type(data).__name__)
            return None
        parts = self._parts(f"{where}.", data, _TASK_PARTS)
        return TaskReference(**parts) if parts else None

    def _parts(self, where: str, data: dict, known: Mapping[str, tuple[type, ...]]) -> dict[str, Any] | None:
        """The parts of a table, or None where one of them is wrong."""
        before = len(self.found)
        for name in data.keys() - known.keys():
            self._add(f"{where}{name}", "is not known")
        for name, kinds in known.items():
            if name not in data:
                self._add(f"{where}{name}", "must be given")
            elif type(data[name]) not in kinds:
                wanted = " or ".join(dict.fromkeys(_NAMES[kind] for kind in kinds))
                self._add(f"{where}{name}", f"must be {wanted}", type(data[name]).__name__)
            elif isinstance(data[name], _Numbers) and not _sound(name, data[name]):
                self._add(f"{where}{name}", "must be finite and, but for a score, not negative", data[name])
        return dict(data) if len(self.found) == before else None

    def _add(self, where: str, rule: str, actual: object = None) -> None:
        self.found.append(Problem(where, rule, actual, _MAKE_ANEW))


def _sound(name: str, value: float) -> bool:
    return math.isfinite(value) and (name == "score" or value >= 0)
