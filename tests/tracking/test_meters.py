"""Speed on a pretended clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_medical.tracking.meters import SpeedMeter


def clock(*times: float) -> Iterator[float]:
    return iter(times)


def test_speed_of_equal_steps_is_exact_from_the_first_step_on() -> None:
    meter = SpeedMeter(clock(0.0, 2.0, 4.0).__next__)
    for _ in range(2):
        meter.step(100, 125, 0.5)
        assert meter.step_seconds == pytest.approx(2.0)
        assert meter.tokens_per_second == pytest.approx(50.0)
        assert meter.useful_positions == pytest.approx(0.8)
        assert meter.data_wait_seconds == pytest.approx(0.5)


def test_speed_weighs_the_present_more() -> None:
    meter = SpeedMeter(clock(0.0, 1.0, 4.0).__next__, decay=0.5)
    meter.step(10, 10, 0.0)
    meter.step(60, 120, 0.3)
    # weights 1/3 and 2/3: seconds (1 + 2*3)/3, tokens (10 + 2*60)/3
    assert meter.step_seconds == pytest.approx(7 / 3)
    assert meter.tokens_per_second == pytest.approx(130 / 7)
    assert meter.useful_positions == pytest.approx(130 / 250)
    assert meter.data_wait_seconds == pytest.approx(0.2)


def test_restart_leaves_an_evaluation_out() -> None:
    meter = SpeedMeter(clock(0.0, 1.0, 101.0, 102.0).__next__)
    meter.step(8, 8, 0.0)
    meter.restart()
    meter.step(8, 8, 0.0)
    assert meter.step_seconds == pytest.approx(1.0)


def test_speed_before_the_first_step_is_zero() -> None:
    meter = SpeedMeter(clock(0.0).__next__)
    assert (meter.step_seconds, meter.tokens_per_second) == (0.0, 0.0)
    assert (meter.useful_positions, meter.data_wait_seconds) == (0.0, 0.0)


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    whole = SpeedMeter(clock(0.0, 1.0, 4.0).__next__)
    whole.step(10, 16, 0.5)
    resumed = SpeedMeter(clock(1.0, 4.0).__next__)
    resumed.load_state(whole.state())
    for meter in (whole, resumed):
        meter.step(60, 120, 0.0)
    assert resumed.state() == whole.state()
    assert resumed.useful_positions == whole.useful_positions
