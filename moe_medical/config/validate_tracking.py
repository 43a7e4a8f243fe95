"""Rules of the `tracking` and `training.guard` sections that types cannot say."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from moe_medical.config.schema import RunConfig, SeesawSection
from moe_medical.errors import Problem

SINKS = ("tensorboard", "trackio")
"""Names in `tracking.sinks`, which are those of the packages too."""


def tracking_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems of what a run tells, and of what it does about a task that overfits."""
    tracking = config.tracking
    for key in ("conflict_every_steps", "routing_every_steps"):
        if (value := getattr(tracking, key)) < 0:
            yield Problem(f"tracking.{key}", "must not be negative", value)
    if tracking.conflict_rows < 1:
        yield Problem("tracking.conflict_rows", "must be at least 1", tracking.conflict_rows)
    yield from _seesaw_problems(tracking.seesaw)
    yield from _sink_problems(tracking.sinks)
    yield from _guard_problems(config)


def _seesaw_problems(seesaw: SeesawSection) -> Iterator[Problem]:
    if not 0 <= seesaw.gate < 1:
        yield Problem("tracking.seesaw.gate", "must be in [0, 1)", seesaw.gate)
    if seesaw.window < 1:
        yield Problem("tracking.seesaw.window", "must be at least 1", seesaw.window)
    if not 0 < seesaw.worst <= 1:
        yield Problem("tracking.seesaw.worst", "must be in (0, 1]", seesaw.worst)
    if seesaw.reference and not Path(seesaw.reference).is_file():
        rule, fix = "must name a file, relative to the run file", "Make one with moe-medical baseline."
        yield Problem("tracking.seesaw.reference", rule, seesaw.reference, fix)


def _sink_problems(names: list[str]) -> Iterator[Problem]:
    for i, name in enumerate(names):
        if name not in SINKS:
            yield Problem(f"tracking.sinks[{i}]", f"must be one of {', '.join(SINKS)}", name)
        elif importlib.util.find_spec(name) is None:
            rule = "must be installed"
            yield Problem(f"tracking.sinks[{i}]", rule, name, f'Run: pip install "moe-medical[{name}]".')


def _guard_problems(config: RunConfig) -> Iterator[Problem]:
    guard = config.training.guard
    if guard.patience < 1:
        yield Problem("training.guard.patience", "must be at least 1", guard.patience)
    if not 0 < guard.factor < 1:
        yield Problem("training.guard.factor", "must be in (0, 1)", guard.factor)
    if guard.action == "none":
        return
    if config.evaluation.every_steps == 0:
        rule = "must be above 0 where training.guard is on: it looks at evaluations"
        yield Problem("evaluation.every_steps", rule, 0)
    if guard.action == "freeze" and config.data.mix.dynamic.rule != "none":
        rule = "must not be freeze beside data.mix.dynamic: both set shares"
        yield Problem("training.guard.action", rule, guard.action, "Use reweight, or dynamic.rule=none.")
    if guard.action == "freeze" and config.data.mix.temperature_from is not None:
        rule = "must not be freeze beside data.mix.temperature_from: shares are laid down until its end"
        yield Problem("training.guard.action", rule, guard.action, "Use reweight, or temperature_from=null.")
