"""Sums, their reduction over pretended ranks, and speed on a pretended clock."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_medical.tracking.meters import SpeedMeter, TaskMeter, TaskRow

samples = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 100), st.integers(1, 50)), max_size=20)


def filled(rows: list[tuple[int, int, int]]) -> TaskMeter:
    meter = TaskMeter(["ner", "qa", "icd"])
    meter.add([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    return meter


def test_rows_are_token_means_of_the_tasks_seen() -> None:
    meter = filled([(0, 6, 2), (2, 5, 5), (0, 4, 3)])
    assert meter.rows == {"ner": TaskRow(2.0, 5, 2), "icd": TaskRow(1.0, 5, 1)}
    assert meter.total == TaskRow(1.5, 10, 3)


def test_repeated_ids_in_one_call_all_count() -> None:
    assert filled([(1, 1, 1)] * 3).rows["qa"].samples == 3


def test_reset_forgets() -> None:
    meter = filled([(0, 6, 2)])
    meter.reset()
    assert meter.rows == {}
    assert np.isnan(meter.total.loss)


def test_a_nan_stays_with_its_task() -> None:
    meter = TaskMeter(["ner", "qa"])
    meter.add([0, 1], [float("nan"), 3.0], [1, 2])
    assert np.isnan(meter.rows["ner"].loss)
    assert meter.rows["qa"].loss == 1.5


@given(st.lists(samples, min_size=1, max_size=4))
def test_reduced_ranks_equal_one_rank_that_saw_everything(ranks: list[list[tuple[int, int, int]]]) -> None:
    meters = [filled(rows) for rows in ranks]
    together = sum(meter.sums for meter in meters)
    assert meters[0].reduce(lambda _: together).rows == filled([row for rows in ranks for row in rows]).rows


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_id_without_a_task_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=r"task ids must be in \[0, 3\)"):
        filled([(bad, 1, 1)])


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one value per sample"):
        TaskMeter(["ner"]).add([0, 0], [1.0], [1, 1])


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
