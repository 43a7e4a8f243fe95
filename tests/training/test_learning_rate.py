"""Learning rates computed by hand."""

from __future__ import annotations

import math

import pytest

from moe_medical.config.schema import TrainingSection
from moe_medical.training.step import learning_rate


def _rates(schedule: str, steps: int, warmup_ratio: float) -> list[float]:
    section = TrainingSection(
        steps=steps,
        learning_rate=0.8,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_ratio=warmup_ratio,
    )
    return [learning_rate(section, step) for step in range(steps)]


HALF_ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.4, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.4, 0.8, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.4, 0.8, 0.8, 0.4 * (1 + HALF_ROOT), 0.4, 0.4 * (1 - HALF_ROOT)]),
    ],
)
def test_two_steps_of_warm_up_then_four_of_the_schedule(schedule: str, wanted: list[float]) -> None:
    assert _rates(schedule, steps=6, warmup_ratio=0.25) == pytest.approx(wanted)  # ceil(1.5) = 2


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("constant", [0.8] * 4), ("linear", [0.8, 0.6, 0.4, 0.2])],
)
def test_without_warm_up_the_first_step_has_the_full_rate(schedule: str, wanted: list[float]) -> None:
    assert _rates(schedule, steps=4, warmup_ratio=0.0) == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_short_runs_have_a_positive_rate_everywhere(schedule: str) -> None:
    for steps in (1, 2, 3):
        for warmup_ratio in (0.0, 0.03, 0.99):
            rates = _rates(schedule, steps, warmup_ratio)
            assert all(0 < rate < 0.8001 for rate in rates), (steps, warmup_ratio)
