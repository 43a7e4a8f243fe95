"""Sums of the tasks' losses: each reader has its own, over all ranks, the same bits after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import on_ranks

from moe_medical.distributed.topology import Topology
from moe_medical.training.callbacks.step_log import loss_series
from moe_medical.training.callbacks.task_losses import TaskLosses
from moe_medical.training.step import StepCounts, StepResult

COUNTS = StepCounts(np.zeros(2), np.zeros(2), 0, 0, 0, False)


def _result(step: int, sums_3T: list[list[float]]) -> StepResult:
    return StepResult(step, np.array(sums_3T), COUNTS, 0.0, 0.0, np.ones(2))


def test_each_reader_has_what_it_has_not_taken_yet() -> None:
    losses = TaskLosses(2, ("log", "guard"), Topology(0, 1, torch.device("cpu"), "test"))
    losses.after_step(_result(0, [[6.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
    assert losses.take("log").tolist() == [[6, 0], [2, 0], [1, 0]]
    losses.after_step(_result(1, [[2.0, 5.0], [2.0, 5.0], [1.0, 2.0]]))
    assert losses.take("log").tolist() == [[2, 5], [2, 5], [1, 2]]
    assert losses.take_mean("guard").tolist() == [2, 1]
    assert losses.take("guard").tolist() == [[0, 0], [0, 0], [0, 0]]


def test_a_task_without_a_token_has_no_mean() -> None:
    losses = TaskLosses(2, ("log",), Topology(0, 1, torch.device("cpu"), "test"))
    losses.after_step(_result(0, [[6.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
    first, second = losses.take_mean("log")
    assert first == 3
    assert np.isnan(second)


def _sums_on_a_rank() -> dict[str, Any]:
    from moe_medical.config.schema import ParallelSection
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    topology = start_distributed(ParallelSection(device="cpu"))

    def step(losses: TaskLosses, number: int) -> None:
        share = (topology.rank + 1) / (
            3.0 + number
        )  # no short binary fraction: who adds it shows in the bits
        losses.after_step(_result(number, [[share, 0.1], [2.0, 1.0], [1.0, 1.0]]))

    whole = TaskLosses(2, ("log", "guard"), topology)
    for number in range(3):
        step(whole, number)
    whole.take("log")
    state = whole.state(3)
    rest = TaskLosses(2, ("log", "guard"), topology)
    rest.load_state(state)
    for number in range(3, 6):
        step(whole, number)
        step(rest, number)
    found = {
        name: {reader: losses.take(reader).tolist() for reader in ("log", "guard")}
        for name, losses in {"whole": whole, "resumed": rest}.items()
    }
    stop_distributed()
    return {**found, "state": state}


def test_sums_are_those_of_all_ranks_and_of_a_run_without_a_stop(tmp_path: Path) -> None:
    ranks = on_ranks(2, _sums_on_a_rank, tmp_path)
    for found in ranks:
        assert found["resumed"] == found["whole"] == ranks[0]["whole"]
        assert found["whole"]["log"][1:] == [[12, 6], [6, 6]]
        assert found["whole"]["guard"][1:] == [[24, 12], [12, 12]]
        assert found["state"]["log"] == [[0, 0]] * 3
        assert found["state"]["guard"][0] == pytest.approx([3 / 3 + 3 / 4 + 3 / 5, 0.6])


def test_the_loss_of_a_step_weighs_each_task_by_its_samples() -> None:
    series = loss_series(["a", "b", "absent"], np.array([[6.0, 5.0, 0.0], [2.0, 5.0, 0.0], [1.0, 3.0, 0.0]]))
    assert series == {"train_loss/a": 3.0, "train_loss/b": 1.0, "loss": 1.5}
    assert loss_series(["a"], np.zeros((3, 1))) == {}


def test_a_loss_that_is_not_finite_stays_with_its_task() -> None:
    series = loss_series(["a", "b"], np.array([[np.nan, 3.0], [1.0, 2.0], [1.0, 1.0]]))
    assert np.isnan(series["train_loss/a"])
    assert series["train_loss/b"] == 1.5
