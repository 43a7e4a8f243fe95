"""What a run has left in its folder, as numbers and names.

Decisions: a run that still goes, was killed or never looked at conflicts has less to show and still gives
a record; a file that cannot be read is named in `unreadable` and left out. Of the config only the sections
below are read, paths as their last part: nothing of the machine and no secret gets into a report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from moe_medical.config.schema import SeesawSection
from moe_medical.errors import DataError
from moe_medical.tracking.conflict import Conflict
from moe_medical.tracking.privacy import redact
from moe_medical.tracking.routing_stats import RoutingStats
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.tracking.seesaw import SeesawStep, SeesawTracker
from moe_medical.tracking.sinks import read_metrics

Floats = NDArray[np.float64]
T = TypeVar("T")

_SHOWN_SECTIONS = ("model", "adapters", "data", "training", "parallel", "evaluation")
_HIDDEN_SETTINGS = ("data.system_prompt", "parallel.timeout_seconds", "parallel.device")


class Curve(NamedTuple):
    """One series of `metrics.jsonl`; arrays of one length."""

    steps: Floats
    tokens: Floats
    values: Floats
    """May hold NaN and infinities."""

    @property
    def last(self) -> float:
        """NaN for a series without a value."""
        return float(self.values[-1]) if len(self.values) else float("nan")


@dataclass(frozen=True)
class TaskPoint:
    """One task at one evaluation."""

    loss: float
    tokens: int
    row_losses: tuple[float, ...]
    """Nats, summed over the target tokens of each row."""
    metric: str
    score: float | None
    low: float | None
    """Ends of the score's 95 % interval."""
    high: float | None


@dataclass(frozen=True)
class EvaluationPoint:
    """All tasks after `step` steps."""

    step: int
    tasks: dict[str, TaskPoint]


@dataclass(frozen=True)
class Decision:
    """Something that the run did about a task or its mixture."""

    step: int
    action: str
    task: str | None
    cause: str


@dataclass(frozen=True)
class RunRecord:
    """A run as far as it has come. `name` is unique in a report."""

    name: str
    settings: dict[str, str]
    """Dotted key -> value, of the sections that are shown."""
    seesaw: SeesawSection
    total_steps: int | None
    metrics: list[dict[str, float]]
    evaluations: list[EvaluationPoint]
    conflicts: dict[int, Conflict]
    """By step."""
    routings: dict[int, RoutingStats]
    """By the step that they counted."""
    decisions: list[Decision]
    rows: dict[str, int]
    """Training rows of each task, of a run that has ended."""
    unreadable: list[str] = field(default_factory=list)

    @cached_property
    def tasks(self) -> list[str]:
        """By their share of the run, the largest first."""
        names = list(self.evaluations[-1].tasks) if self.evaluations else self.names("train_loss")
        shares = {name: self.curve(f"mix/{name}").last for name in names}
        return sorted(names, key=lambda name: -np.nan_to_num(shares[name]))

    @cached_property
    def last_step(self) -> int:
        seen = [row["step"] for row in self.metrics[-1:]] + [e.step for e in self.evaluations[-1:]]
        return int(max(seen, default=0))

    @property
    def ended(self) -> bool:
        """Whether it has left its results, or has done all its steps."""
        return bool(self.rows) or (self.total_steps is not None and self.last_step >= self.total_steps)

    @cached_property
    def seesaw_steps(self) -> list[SeesawStep]:
        """The seesaw at each evaluation, from the probe rows; the tasks in the order of `tasks`."""
        tracker = SeesawTracker(self.tasks, self.seesaw)
        return [tracker.update(evaluation.tasks) for evaluation in self.evaluations]

    @cached_property
    def _curves(self) -> dict[str, Curve]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.metrics:
            for name, value in row.items():
                found.setdefault(name, []).append((row["step"], value))
        at = np.array(found.get("tokens", [(0.0, 0.0)]), dtype=float).T
        return {name: _curve(np.array(points, dtype=float).T, at) for name, points in found.items()}

    def curve(self, name: str) -> Curve:
        """A series of the metrics, empty where the run has none of that name."""
        return self._curves.get(name, Curve(*np.zeros((3, 0))))

    def names(self, namespace: str) -> list[str]:
        """The second parts of the series of a namespace."""
        return [name.partition("/")[2] for name in self._curves if name.startswith(f"{namespace}/")]

    def tokens_at(self, step: float) -> float:
        tokens = self.curve("tokens")
        return float(np.interp(step, tokens.steps, tokens.values)) if len(tokens.steps) else float("nan")

    @property
    def seconds(self) -> float:
        """Spent in training steps, as far as they were logged."""
        took = self.curve("step_seconds")
        return float(np.nansum(took.values * np.diff(took.steps, prepend=0.0))) if len(took.steps) else 0.0


def _curve(points: Floats, tokens_at: Floats) -> Curve:
    return Curve(points[0], np.interp(points[0], *tokens_at), points[1])


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The records of several runs, each with a name of its own.

    Raises:
        DataError: a folder is no run's, or its metrics are damaged.
    """
    names: list[str] = []
    for folder in folders:
        name = folder.resolve().name
        count = sum(known == name or known.startswith(f"{name} (") for known in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read_run(folder: Path, name: str) -> RunRecord:
    paths = RunPaths(folder)
    bad = _Unreadable(folder)
    if not (paths.config.is_file() or paths.metrics.is_file()):
        raise DataError(f"{folder} is no run folder: it has neither config.yaml nor metrics.jsonl.")
    config = bad.read(paths.config, lambda text: dict(yaml.safe_load(text))) or {}
    results = bad.read(paths.results, lambda text: dict(json.loads(text))) or {}
    metrics = read_metrics(paths.metrics) if paths.metrics.is_file() else []
    return RunRecord(
        name=name,
        settings=_settings(config),
        seesaw=_seesaw(config),
        total_steps=_section(config, "training").get("steps"),
        metrics=metrics,
        evaluations=bad.read_steps(paths, paths.evaluation(0), _evaluation) or _logged_evaluations(metrics),
        conflicts=dict(bad.read_steps(paths, paths.conflict(0), _conflict)),
        routings=dict(bad.read_steps(paths, paths.routing(0), _routing)),
        decisions=bad.read(paths.decisions, _decisions) or [],
        rows={task["task"]: int(task["rows"]) for task in results.get("tasks", [])},
        unreadable=bad.names,
    )


class _Unreadable:
    """Reads files of a run, and remembers those that it could not."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names: list[str] = []

    def read(self, path: Path, parse: Callable[[str], T]) -> T | None:
        """What the file says; None where there is none or it is damaged."""
        try:
            return parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            self.names.append(path.relative_to(self._root).as_posix())
            return None

    def read_steps(self, paths: RunPaths, first: Path, parse: Callable[[Mapping[str, Any]], T]) -> list[T]:
        read = (self.read(path, lambda text: parse(json.loads(text))) for path in paths.of_each_step(first))
        return [found for found in read if found is not None]


def _evaluation(data: Mapping[str, Any]) -> EvaluationPoint:
    return EvaluationPoint(int(data["step"]), {name: _task(t) for name, t in data["tasks"].items()})


def _task(data: Mapping[str, Any]) -> TaskPoint:
    scores = (_optional(data.get(key)) for key in ("score", "score_low", "score_high"))
    rows = tuple(float(loss) for loss in data.get("row_losses", ()))
    return TaskPoint(float(data["loss"]), int(data["tokens"]), rows, str(data["metric"]), *scores)


def _logged_evaluations(metrics: Sequence[Mapping[str, float]]) -> list[EvaluationPoint]:
    """What the metrics alone tell of the evaluations: losses and scores without rows or intervals."""
    found = []
    for row in metrics:
        losses = {k.partition("/")[2]: v for k, v in row.items() if k.startswith("eval_loss/")}
        scores = {t: row.get(f"eval_score/{t}") for t in losses}
        tasks = {t: TaskPoint(v, 1, (v,), "", scores[t], None, None) for t, v in losses.items()}
        if tasks:
            found.append(EvaluationPoint(int(row["step"]), tasks))
    return found


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _conflict(data: Mapping[str, Any]) -> tuple[int, Conflict]:
    found = Conflict.from_json(data)  # null becomes NaN
    if found.cosine_TT.shape != (len(found.tasks), len(found.tasks)):
        raise ValueError("not a square of the tasks")
    return int(data["step"]), found


def _routing(data: Mapping[str, Any]) -> tuple[int, RoutingStats]:
    found = RoutingStats.from_json(data)
    if found.counts_LTE.ndim != 3 or found.counts_LTE.shape[:2] != (len(found.layers), len(found.tasks)):
        raise ValueError("not layers x tasks x experts")
    return int(data["step"]), found


def _decisions(text: str) -> list[Decision]:
    whole = text.split("\n")[:-1]  # a running process may be in the middle of the last line
    rows = [json.loads(line) for line in whole]
    return [Decision(int(r["step"]), str(r["action"]), r.get("task"), str(r["cause"])) for r in rows]


def _section(config: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    found: Any = config
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _seesaw(config: Mapping[str, Any]) -> SeesawSection:
    found = _section(config, "tracking", "seesaw")
    known = SeesawSection()
    numbers = {key: found.get(key, getattr(known, key)) for key in ("gate", "window", "worst")}
    return SeesawSection(**numbers)


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    shown = redact({name: config[name] for name in _SHOWN_SECTIONS if name in config})
    seed = {"run.seed": str(_section(config, "run").get("seed", ""))}
    return seed | {key: text for key, text in _leaves(shown, "") if key not in _HIDDEN_SETTINGS}


def _leaves(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{key}.{k}" if key else str(k))]
    if isinstance(value, list):
        return [(key, ", ".join(_told(item) for item in value))]
    return [(key, _told(value))]


def _told(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
