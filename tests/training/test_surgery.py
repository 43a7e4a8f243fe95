"""Gradient surgery: combinations by hand; steps on ranks against the plain step and a hand computation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, start, write_zero_settings

from moe_medical.training.surgery import combination

if TYPE_CHECKING:
    from moe_medical.training.trainer import Trainer

pytest.importorskip("torchjd")
SOLVERS = {"upgrad": "quadprog", "cagrad": "cvxpy", "nash_mtl": "ecos"}
RULES = [
    pytest.param(
        rule,
        marks=pytest.mark.skipif(
            rule in SOLVERS and importlib.util.find_spec(SOLVERS[rule]) is None, reason="solver not installed"
        ),
    )
    for rule in ("pcgrad", "upgrad", "imtl_g", "mgda", "aligned_mtl", "cagrad", "nash_mtl")
]
CONFLICT = np.array([[1.0, 0.0], [-1.0, 1.0]])
"""Gradients of two tasks, 135 degrees apart."""


def _gram(gradients: np.ndarray) -> np.ndarray:
    return np.asarray(gradients @ gradients.T)


# Combinations


def test_pcgrad_by_hand() -> None:
    """Each is freed of its part along the other: (1, 0) -> (0.5, 0.5), and (-1, 1) -> (0, 1)."""
    numbers = combination("pcgrad", _gram(CONFLICT), 0)
    assert numbers @ CONFLICT == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize(
    ("rule", "gradients", "wanted"),
    [
        # The shortest point between the two ends, (0.2, 0.4), times two tasks.
        ("mgda", CONFLICT, [0.4, 0.8]),
        # The same projection on both directions; weights sum to the number of tasks.
        ("imtl_g", np.diag([1.0, 2.0]), [4 / 3, 4 / 3]),
        # Principal components brought to the length of the smallest one.
        ("aligned_mtl", np.diag([1.0, 2.0]), [1.0, 1.0]),
    ],
)
def test_other_rules_by_hand(rule: str, gradients: np.ndarray, wanted: list[float]) -> None:
    assert combination(rule, _gram(gradients), 0) @ gradients == pytest.approx(wanted, rel=1e-3)


def _conflicting() -> np.ndarray:
    """Four gradients; along the second one their sum goes up."""
    gradients = np.random.default_rng(3).normal(size=(4, 50))
    gradients[1] = 0.2 * gradients[1] - 0.5 * gradients[0]
    assert (_gram(gradients).sum(1) < 0).tolist() == [False, True, False, False]
    return gradients


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.values[0] in ("upgrad", "mgda", "nash_mtl")])
def test_rules_that_promise_it_make_no_task_worse(rule: str) -> None:
    gram = _gram(_conflicting())
    assert (gram @ combination(rule, gram, 0) > -1e-2).all()


def test_imtl_g_projects_alike_on_all_directions() -> None:
    gradients = _conflicting()
    along = _gram(gradients) @ combination("imtl_g", _gram(gradients), 0) / np.linalg.norm(gradients, axis=1)
    assert along == pytest.approx(np.full(4, along[0]))


@pytest.mark.parametrize("rule", RULES)
def test_a_combination_does_not_depend_on_the_size_of_gradients(rule: str) -> None:
    large = combination(rule, _gram(CONFLICT), 0)
    assert combination(rule, _gram(1e-4 * CONFLICT), 0) == pytest.approx(large, rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_absent_tasks_are_left_out(rule: str) -> None:
    with_absent = combination(rule, _gram(np.insert(CONFLICT, 1, 0.0, axis=0)), 0)
    assert with_absent[[0, 2]] == pytest.approx(combination(rule, _gram(CONFLICT), 0))
    assert with_absent[1] == 1
    assert combination(rule, np.zeros((3, 3)), 0).tolist() == [1, 1, 1]
    assert combination(rule, np.diag([0.0, 2.0]), 0).tolist() == [1, 1]


@pytest.mark.parametrize("rule", ["pcgrad", "upgrad"])
def test_tasks_in_nobodys_way_make_the_plain_step(rule: str) -> None:
    if rule in SOLVERS and importlib.util.find_spec(SOLVERS[rule]) is None:
        pytest.skip("solver not installed")
    assert combination(rule, np.array([[2.0, 0.5], [0.5, 1.0]]), 0) == pytest.approx([1, 1], rel=1e-3)


def test_only_the_seed_decides_the_order_of_pcgrad() -> None:
    gradients = np.random.default_rng(0).normal(size=(5, 6))
    orders = {combination("pcgrad", _gram(gradients), seed).tobytes() for seed in range(8)}
    assert len(orders) > 1
    assert combination("pcgrad", _gram(gradients), 3).tobytes() in orders
