"""The loss section: ranges, and what surgery cannot be combined with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.configs import config_problems

KEY = "training.loss.surgery"


@pytest.mark.parametrize("rule", ["dwa", "uncertainty", "famo"])
def test_task_weights_fit_every_layout(tmp_path: Path, rule: str) -> None:
    layout = ["parallel.ep_size=2", "training.compile=true", "training.activation_checkpointing=reentrant"]
    assert config_problems(tmp_path, f"training.loss.task_weights={rule}", *layout, stage=3) == []


def test_ranges(tmp_path: Path) -> None:
    keys = ["training.loss.temperature=0", "training.loss.rate=1.5", "training.loss.window=0"]
    assert config_problems(tmp_path, *keys) == [
        "training.loss.temperature must be finite and > 0, got 0.0.",
        "training.loss.window must be at least 1, got 0.",
        "training.loss.rate must be in (0, 1], got 1.5.",
    ]


def test_surgery_alone_is_accepted(tmp_path: Path) -> None:
    checkpointing = "training.activation_checkpointing=non_reentrant"
    for stage in (0, 1, 2):
        assert config_problems(tmp_path, f"{KEY}=pcgrad", checkpointing, stage=stage) == []


@pytest.mark.parametrize(
    ("override", "stage", "wanted"),
    [
        ("parallel.ep_size=2", 2, "parallel.ep_size > 1: ranks with other tasks would wait for each other"),
        ("parallel.ranks=2", 3, "ZeRO-3: gradients of partitioned parameters come back empty"),
        ("training.compile=true", 2, "training.compile: compiled blocks have one backward pass only"),
        ("training.loss.task_weights=dwa", 2, "training.loss.task_weights: both scale the tasks' gradients"),
        (
            "training.activation_checkpointing=reentrant",
            2,
            "reentrant activation checkpointing: it hides the adapters from autograd",
        ),
    ],
)
def test_surgery_is_refused_with_the_reason(tmp_path: Path, override: str, stage: int, wanted: str) -> None:
    (problem,) = config_problems(tmp_path, f"{KEY}=pcgrad", override, stage=stage)
    assert problem.startswith(f"{KEY} must not be used with {wanted}, got 'pcgrad'. ")


def test_mixing_by_gradients_has_the_same_limits(tmp_path: Path) -> None:
    doge = "data.mix.dynamic.rule=doge"
    assert config_problems(tmp_path, doge, stage=2) == []
    (problem,) = config_problems(tmp_path, doge, stage=3)
    assert problem.startswith("data.mix.dynamic.rule must not be used with ZeRO-3")


@pytest.mark.parametrize(
    ("rule", "solvers", "extra"),
    [
        ("upgrad", ["qpsolvers", "quadprog"], "quadprog_projector"),
        ("cagrad", ["cvxpy", "clarabel"], "cagrad"),
        ("nash_mtl", ["cvxpy", "ecos"], "nash_mtl"),
    ],
)
def test_a_missing_solver_is_named_with_its_command(
    tmp_path: Path, rule: str, solvers: list[str], extra: str
) -> None:
    missing = [name for name in solvers if importlib.util.find_spec(name) is None]
    wanted = [
        f"{KEY} must find the packages that it needs; missing: {', '.join(missing)}, got {rule!r}. "
        f'Run: pip install "torchjd[{extra}]==0.18.0".'
    ]
    assert config_problems(tmp_path, f"{KEY}={rule}") == (wanted if missing else [])


def test_a_deepspeed_json_that_cannot_be_read_is_told_once(tmp_path: Path) -> None:
    problems = config_problems(tmp_path, f"{KEY}=pcgrad", f"parallel.deepspeed={tmp_path}/none.json")
    assert [p for p in problems if "none.json" in p] == problems
    assert len(problems) == 1
