"""Task weights: hand-computed values, toy problems with two tasks, absent tasks, resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moe_medical.config.schema import LossSection, TaskWeighting
from moe_medical.training.task_weights import SOLVED, Famo, task_weighting

RULES: list[TaskWeighting] = ["none", "dwa", "uncertainty", "famo"]
ABSENT = math.nan


def _section(rule: TaskWeighting) -> LossSection:
    return LossSection(task_weights=rule, window=2)


def _losses(steps: int, tasks: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Losses before and after each step, some absent."""
    rng = np.random.default_rng(0)
    before = rng.uniform(0.005, 4, (steps, tasks))
    after = before * rng.uniform(0.9, 1.02, (steps, tasks))
    before[rng.random((steps, tasks)) < 0.3] = ABSENT
    after[np.isnan(before)] = ABSENT
    return list(zip(before, after, strict=True))


# All rules


@pytest.mark.parametrize("rule", RULES)
def test_weights_start_equal_and_keep_a_mean_of_one(rule: TaskWeighting) -> None:
    weighting = task_weighting(_section(rule), 3)
    assert weighting.weights() == pytest.approx(np.ones(3))
    for before, after in _losses(40):
        weighting.observe(before, after)
        assert weighting.weights().mean() == pytest.approx(1)
        assert (weighting.weights() > 0).all()
    moved = np.abs(weighting.weights() - 1).max()
    assert (moved == 0) if rule == "none" else (moved > 0.01)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_rule_goes_on_bit_for_bit(rule: TaskWeighting) -> None:
    losses = _losses(30)
    whole = task_weighting(_section(rule), 3)
    first = task_weighting(_section(rule), 3)
    for before, after in losses[:13]:
        whole.observe(before, after)
        first.observe(before, after)
    resumed = task_weighting(_section(rule), 3)
    resumed.restore(json.loads(json.dumps(first.state())))
    for before, after in losses[13:]:
        whole.observe(before, after)
        resumed.observe(before, after)
        assert resumed.weights().tobytes() == whole.weights().tobytes()
    assert resumed.state() == whole.state()


@pytest.mark.parametrize("rule", RULES)
def test_a_task_that_never_comes_changes_nothing_for_the_others(rule: TaskWeighting) -> None:
    """Its weight follows from the mean of 1, not from anything learnt about it."""
    with_absent, alone = task_weighting(_section(rule), 3), task_weighting(_section(rule), 2)
    for before, after in _losses(30, tasks=2):
        alone.observe(before, after)
        with_absent.observe(np.append(before, ABSENT), np.append(after, ABSENT))
    ratio = with_absent.weights()[:2] / alone.weights()
    assert ratio[0] == pytest.approx(ratio[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_loss_leaves_weights_finite(rule: TaskWeighting) -> None:
    weighting = task_weighting(_section(rule), 2)
    for _ in range(3):
        weighting.observe(np.array([math.inf, 0.0]), np.array([1.0, 0.0]))
    assert np.isfinite(weighting.weights()).all()


# DWA


def test_dwa_by_hand() -> None:
    """Windows of two steps: task 0 from 3 to 2.4, task 1 from 2 to 1; temperature 2."""
    weighting = task_weighting(_section("dwa"), 2)
    for losses in ([4, 2], [2, ABSENT], [2.4, 1.5], [2.4, 0.5]):
        assert weighting.weights().tolist() == [1, 1]
        weighting.observe(np.array(losses))
    powers = [math.exp(0.8 / 2), math.exp(0.5 / 2)]
    assert weighting.weights() == pytest.approx([2 * power / sum(powers) for power in powers])


def test_dwa_keeps_the_ratio_of_a_task_that_a_window_did_not_have() -> None:
    weighting = task_weighting(_section("dwa"), 2)
    for losses in ([4, 2], [4, 2], [2, 2], [2, 2], [ABSENT, 2], [ABSENT, 2]):
        weighting.observe(np.array(losses))
    powers = [math.exp(0.5 / 2), math.exp(1 / 2)]
    assert weighting.weights() == pytest.approx([2 * power / sum(powers) for power in powers])


# Uncertainty


def test_uncertainty_by_hand() -> None:
    """s = -rate (1 - l exp(0)) / 2 after the first step."""
    weighting = task_weighting(LossSection(task_weights="uncertainty", rate=0.1), 2)
    weighting.observe(np.array([3.0, 0.5]))
    s = [-0.1 * (1 - 3.0) / 2, -0.1 * (1 - 0.5) / 2]
    powers = [math.exp(-value) for value in s]
    assert weighting.weights() == pytest.approx([2 * power / sum(powers) for power in powers])


def test_uncertainty_settles_at_inverse_losses() -> None:
    weighting = task_weighting(LossSection(task_weights="uncertainty", rate=0.5), 3)
    losses = np.array([4.0, 1.0, 0.25])
    for _ in range(200):
        weighting.observe(losses)
    assert weighting.weights() == pytest.approx(3 / losses / (1 / losses).sum())


def test_a_solved_task_does_not_take_it_all() -> None:
    weighting = task_weighting(LossSection(task_weights="uncertainty", rate=1.0), 2)
    for _ in range(500):
        weighting.observe(np.array([1.0, 0.0]))
    assert weighting.weights() == pytest.approx([2 * SOLVED / (1 + SOLVED), 2 / (1 + SOLVED)])


# FAMO


def test_famo_by_hand() -> None:
    """From equal z, Adam's first step is the sign of the gradient: the task that fell less gains."""
    weighting = task_weighting(LossSection(task_weights="famo", rate=0.1), 2)
    weighting.observe(np.array([2.0, 1.0]), np.array([1.8, 0.5]))
    powers = [math.exp(0.1) / 1.8, math.exp(-0.1) / 0.5]
    assert weighting.weights() == pytest.approx([2 * power / sum(powers) for power in powers])


def test_famo_moves_its_logits_as_torchjd_does() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    other, ours = scalarization.FAMO(3, lr=0.1), Famo(3, 0.1)
    rng = np.random.default_rng(1)
    for before in rng.uniform(0.5, 4, (20, 3)):
        after = before * rng.uniform(0.9, 1.02, 3)
        other(torch.tensor(before))
        other.update(torch.tensor(after, dtype=torch.float32))
        ours.observe(before, after)
    assert ours.state()["_xi"] == pytest.approx(other._w.tolist(), abs=1e-4)


def test_famo_leaves_a_task_alone_in_its_step_as_it_was() -> None:
    weighting = Famo(2, 0.1)
    weighting.observe(np.array([2.0, 1.0]), np.array([1.8, 0.5]))
    logits = weighting.state()["_xi"]
    weighting.observe(np.array([1.0, ABSENT]), np.array([0.5, ABSENT]))
    assert weighting.state()["_xi"] == logits


def test_famo_says_when_it_lacks_the_second_look() -> None:
    with pytest.raises(ValueError, match="after the step"):
        Famo(2, 0.1).observe(np.array([2.0, 1.0]))


# Two quadratic losses of different scale that want the same parameter elsewhere

SCALES = np.array([50.0, 0.5])


def _losses_at(x: np.ndarray) -> np.ndarray:
    """Task i pulls coordinate i to 0, and the shared third one to +1 or -1 a little."""
    return SCALES * (x[:2] ** 2 + 0.1 * (x[2] - np.array([1.0, -1.0])) ** 2 + 0.01)


def _gradient(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    own = 2 * weights * SCALES * x[:2]
    shared = (0.2 * weights * SCALES * (x[2] - np.array([1.0, -1.0]))).sum()
    return np.append(own, shared)


def _descend(rule: TaskWeighting, steps: int, speed: Callable[[np.ndarray], float]) -> np.ndarray:
    """log loss before minus after, of each task."""
    weighting, x = task_weighting(LossSection(task_weights=rule, window=5), 2), np.array([2.0, 2.0, 0.0])
    start = _losses_at(x)
    for _ in range(steps):
        before, gradient = _losses_at(x), _gradient(x, weighting.weights())
        x = x - speed(gradient) * gradient
        weighting.observe(before, _losses_at(x))
    fell: np.ndarray = np.log(start) - np.log(_losses_at(x))
    return fell


def _of_one_length(gradient: np.ndarray) -> float:
    return 0.01 / float(np.linalg.norm(gradient))


def test_famo_balances_how_log_losses_fall() -> None:
    plain, famo = (_descend(rule, 150, _of_one_length) for rule in ("none", "famo"))
    assert abs(plain[0] - plain[1]) > 1
    assert abs(famo[0] - famo[1]) < 0.2
    assert famo.min() > plain.min() + 0.3


def test_dwa_lifts_the_task_that_falls_slower() -> None:
    weighting, x = task_weighting(_section("dwa"), 2), np.array([2.0, 2.0, 0.0])
    for _ in range(8):
        weighting.observe(_losses_at(x))
        x = x - 0.002 * _gradient(x, weighting.weights())
    slow, fast = weighting.weights()[1], weighting.weights()[0]
    assert slow > 1.05 > 0.95 > fast
