"""The tracking and guard sections: ranges, and what cannot be had together."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.configs import config_problems


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("tracking.conflict_every_steps=-1", "must not be negative"),
        ("tracking.routing_every_steps=-1", "must not be negative"),
        ("tracking.conflict_rows=0", "must be at least 1"),
        ("tracking.seesaw.gate=1", "must be in [0, 1)"),
        ("tracking.seesaw.window=0", "must be at least 1"),
        ("tracking.seesaw.worst=0", "must be in (0, 1]"),
        ("tracking.seesaw.reference=nowhere.json", "must name a file, relative to the run file"),
        ("tracking.sinks=[stdout]", "must be one of tensorboard, trackio"),
        ("training.guard.patience=0", "must be at least 1"),
        ("training.guard.factor=1", "must be in (0, 1)"),
        ("evaluation.resamples=-1", "must not be negative"),
    ],
)
def test_ranges(tmp_path: Path, override: str, wanted: str) -> None:
    (problem,) = config_problems(tmp_path, override)
    assert problem.startswith(override.partition("=")[0])
    assert wanted in problem


def test_a_reference_is_relative_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text("{}")
    assert config_problems(tmp_path, "tracking.seesaw.reference=reference.json") == []


@pytest.mark.parametrize("other", ["data.mix.dynamic.rule=regret", "data.mix.temperature_from=1"])
def test_only_one_may_set_shares(tmp_path: Path, other: str) -> None:
    (problem,) = config_problems(tmp_path, "training.guard.action=freeze", other)
    assert problem.startswith("training.guard.action must not be freeze beside data.mix.")
    assert config_problems(tmp_path, "training.guard.action=reweight", other) == []


def test_a_guard_needs_evaluations(tmp_path: Path) -> None:
    (problem,) = config_problems(tmp_path, "training.guard.action=stop", "evaluation.every_steps=0")
    assert problem.startswith("evaluation.every_steps must be above 0")
