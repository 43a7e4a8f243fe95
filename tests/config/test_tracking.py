"""The tracking and guard sections: ranges, and what cannot be had together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_medical.config import load_config
from moe_medical.errors import ConfigError


def _problems(folder: Path, *overrides: str) -> list[str]:
    (folder / "mixture.yaml").write_text("name: any\n")
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    run = folder / "run.yaml"
    run.write_text("data: {recipe: mixture.yaml}\nparallel: {deepspeed: zero.json, ranks: 2}\n")
    try:
        load_config(run, overrides)
    except ConfigError as e:
        return [str(problem) for problem in e.problems]
    return []


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
    (problem,) = _problems(tmp_path, override)
    assert problem.startswith(override.partition("=")[0])
    assert wanted in problem


def test_a_reference_is_relative_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text("{}")
    assert _problems(tmp_path, "tracking.seesaw.reference=reference.json") == []


@pytest.mark.parametrize("other", ["data.mix.dynamic.rule=regret", "data.mix.temperature_from=1"])
def test_only_one_may_set_shares(tmp_path: Path, other: str) -> None:
    (problem,) = _problems(tmp_path, "training.guard.action=freeze", other)
    assert problem.startswith("training.guard.action must not be freeze beside data.mix.")
    assert _problems(tmp_path, "training.guard.action=reweight", other) == []


def test_a_guard_needs_evaluations(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path, "training.guard.action=stop", "evaluation.every_steps=0")
    assert problem.startswith("evaluation.every_steps must be above 0")
