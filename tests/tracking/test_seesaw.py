"""Hand-made curves with known answers: who gains, who pays, and what is no more than noise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_medical.config.schema import SeesawSection
from moe_medical.tracking.reference import Reference, TaskReference
from moe_medical.tracking.seesaw import Balance, SeesawStep, SeesawTracker
from moe_medical.tracking.task_track import ProbeLosses, paired_error

ROWS = 64


def names(count: int) -> list[str]:
    return [f"t{i}" for i in range(count)]


def flat(losses: Sequence[float]) -> dict[str, ProbeLosses]:
    """Two rows of 10 tokens each, which always move alike: no noise."""
    return {f"t{i}": ProbeLosses((10 * loss, 10 * loss), 20) for i, loss in enumerate(losses)}


def watched(curve: Sequence[Sequence[float]], **section: Any) -> list[SeesawStep]:
    """Evaluations without noise, each the loss of every task."""
    tracker = SeesawTracker(names(len(curve[0])), SeesawSection(**section))
    return [tracker.update(flat(losses)) for losses in curve]


def noisy(level: np.ndarray, error: float, seed: int = 0, **section: Any) -> list[SeesawStep]:
    """(evaluations, tasks) true losses, seen through rows that jitter: `error` for the change of any two."""
    rng, (evaluations, tasks) = np.random.default_rng(seed), level.shape
    rows = level[:, :, None] + rng.normal(0, error * math.sqrt(ROWS / 2), (evaluations, tasks, ROWS))
    tracker = SeesawTracker(names(tasks), SeesawSection(**section))
    return [
        tracker.update({f"t{i}": ProbeLosses(tuple(rows[e, i]), ROWS) for i in range(tasks)})
        for e in range(evaluations)
    ]


# --- the noise of a change --------------------------------------------------------------------------------


def test_paired_error_is_the_noise_of_the_change_and_not_of_the_rows() -> None:
    before = ProbeLosses((10.0, 2.0, 30.0, 4.0), 20)
    assert before.loss == 2.3
    assert paired_error(before, ProbeLosses((9.0, 1.0, 29.0, 3.0), 20)) == 0.0  # all alike: certain
    after = ProbeLosses((9.0, 2.0, 28.0, 4.0), 20)  # changes -1 0 -2 0, standard deviation sqrt(11 / 12)
    assert paired_error(before, after) == pytest.approx(2 * (11 / 12) ** 0.5 / 20)
    assert paired_error(ProbeLosses((1.0,), 20), ProbeLosses((2.0,), 20)) == 0.0


def test_rows_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="the same"):
        paired_error(ProbeLosses((1.0,), 20), ProbeLosses((1.0, 2.0), 20))


# --- index and paid share ---------------------------------------------------------------------------------

ONE_AGAINST_ALL = [0.2] + [-0.005] * 23
CASES = {
    "all improve": ([0.03] * 24, 0.03, 0, 0, 0),
    "half up, half down": ([0.03, -0.03] * 12, 0.015, 0.015, 1, 1),
    "one gains at the cost of all": (ONE_AGAINST_ALL, 0.2 / 24, 0.005 * 23 / 24, 0.73, 0.575),
    "more lost than gained": ([0.01, -0.03] * 12, 0.005, 0.015, 0.5, 1),
    "all worse": ([-0.03] * 24, 0, 0.03, 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_table_of_the_design(case: str) -> None:
    better, gain, regress, index, paid = CASES[case]
    step = watched([[2.0] * 24, [2.0 * (1 - b) for b in better]], gate=0.0)[-1]
    assert step.delta_T == pytest.approx(better)
    assert (step.step.gain, step.step.regress) == pytest.approx((gain, regress))
    assert (step.step.index, step.step.paid) == pytest.approx((index, paid), abs=0.002)
    # With one step behind it, the window says the same.
    assert step.window == step.step


def test_a_fixed_gate_would_hide_the_diffuse_case() -> None:
    better = [1 - b for b in ONE_AGAINST_ALL]
    assert watched([[1.0] * 24, better], gate=0.01)[-1].step.index == 0
    assert watched([[1.0] * 24, better])[-1].step.index == pytest.approx(0.52, abs=0.01)


def test_noise_alone_is_no_seesaw() -> None:
    """24 tasks that stay, and seem to move by 0.5 %; an index of all that passes a gate would be high."""
    steps = [s for seed in range(5) for s in noisy(np.ones((30, 24)), 0.005, seed)[1:]]
    for told in ("index", "paid"):
        assert np.mean([getattr(s.step, told) for s in steps]) < 0.05
        assert np.mean([getattr(s.window, told) for s in steps]) < 0.05
    bare = [Balance(s.window.gain, s.window.regress).index for s in steps]
    assert np.mean(bare) > 0.4
    assert not any(s.alarms for s in steps)


def test_the_noise_of_a_sum_is_what_passes_gates_by_chance() -> None:
    """Mean and spread of gain and regress of noise, against what is said of them."""
    steps = [s.step for seed in range(20) for s in noisy(np.ones((20, 24)), 0.005, seed, gate=0.0)[1:]]
    sums = np.array([part for s in steps for part in (s.gain, s.regress)])
    assert steps[0].noise == pytest.approx(sums.mean() + 3 * sums.std(), rel=0.15)
    assert (sums > steps[0].noise).mean() < 0.03


def test_gates_come_from_the_rows_and_the_section() -> None:
    before = {"t0": ProbeLosses((10.0, 2.0, 30.0, 4.0), 20), "t1": ProbeLosses((4.0, 4.0), 4)}
    after = {"t0": ProbeLosses((9.0, 2.0, 28.0, 4.0), 20), "t1": ProbeLosses((3.9, 3.9), 4)}
    tracker = SeesawTracker(["t0", "t1"], SeesawSection(gate=0.01))
    tracker.update(before)
    step = tracker.update(after)
    error = 2 * (11 / 12) ** 0.5 / 20
    assert step.gate_T == pytest.approx([2 * error / 2.3, 0.01])
    assert step.gain_noise_T == pytest.approx([2 * error, 0.02])
    assert step.delta_T == pytest.approx([0.15 / 2.3, 0.1 / 4])
    assert step.step.gain == pytest.approx(((0.025 - 0.01) + max(0, 0.15 / 2.3 - 2 * error / 2.3)) / 2)


def test_a_task_that_regressed_is_named() -> None:
    steps = watched([[1, 1, 1], [1.01, 1.001, 0.9], [1.01, 1.05, 0.9]])
    assert [s.regressed for s in steps] == [(), ("t0",), ("t1",)]
    assert [s.values().get("seesaw/regressed_tasks") for s in steps] == [None, 1, 1]


# --- the window -------------------------------------------------------------------------------------------

HALVES = np.where(np.arange(24) % 2, 1, -1)


def test_slow_drift_shows_in_the_window_and_in_no_step() -> None:
    """Half of the tasks 0.1 % better and half worse per evaluation, seen through noise of 0.3 %."""
    steps = noisy(1 + 0.001 * np.arange(30)[:, None] * HALVES, 0.003)
    assert np.mean([s.step.index for s in steps]) < 0.05
    last = steps[-1].window
    assert last.index > 0.8
    assert last.gain == pytest.approx(0.0021, rel=0.25)
    assert last.regress == pytest.approx(0.0021, rel=0.25)
    sums = [np.sum([getattr(s.step, part) for s in steps[-10:]]) for part in ("gain", "regress")]
    assert max(sums) < last.noise, "summed steps alone would show nothing"


def test_a_drift_all_one_way_is_no_seesaw() -> None:
    last = noisy(1 - 0.001 * np.arange(30)[:, None] * np.ones(24), 0.003)[-1].window
    assert last.gain > 0.003
    assert last.index == 0


def test_what_swings_to_and_fro_adds_up_in_the_window() -> None:
    """After two evaluations all is as before; each of them cost half of the tasks 2 %."""
    steps = watched([[1.0, 1.0] if e % 2 else [1.02, 0.98] for e in range(9)], gate=0.0, window=4)
    each = [s.step.regress for s in steps[1:]]
    assert steps[-1].window.regress == pytest.approx(sum(each[-4:]))
    assert steps[-1].window.index > 0.95


def test_the_window_forgets() -> None:
    curve = [[1.0, 1.0]] * 3 + [[1.1, 0.9]] * 6
    index = [s.window.index for s in watched(curve, window=3)]
    assert [round(i) for i in index] == [0, 0, 0, 1, 1, 1, 0, 0, 0]


# --- regret -----------------------------------------------------------------------------------------------


def test_regret_is_against_the_best_so_far() -> None:
    steps = watched([[2.0], [1.0], [1.1], [1.05], [0.9], [0.9]])
    assert [s.regret_T[0] for s in steps] == pytest.approx([0, 0, 0.1, 0.05, 0, 0])
    assert [s.since_best_T[0] for s in steps] == [0, 0, 1, 2, 0, 1]
    assert [s.alarms for s in steps] == [(), (), ("t0",), ("t0",), (), ()]


def test_regret_is_gated_by_the_pairs_of_best_and_now() -> None:
    best, between, now = ([4.0, 2.0], 0.0), ([9.0, 1.0], 0.0), ([9.0, 1.2], 2 * 2.9 / 2)
    tracker = SeesawTracker(["t0"], SeesawSection())
    steps = [tracker.update({"t0": ProbeLosses(tuple(rows), 2)}) for rows, _ in (best, between, now)]
    # Changes from the best 5 and -0.8: standard deviation 5.8 / sqrt 2; since the last only 0 and 0.2.
    assert steps[-1].regret_T[0] == pytest.approx(2.1 / 3)
    assert steps[-1].regret_gate_T[0] == pytest.approx(2 * (5.8 / 2) / 3)
    assert steps[-1].gate_T[0] == pytest.approx(2 * (0.2 / 2) / 5)
    assert steps[-1].values()["seesaw/regret_tasks"] == 0


def test_sums_of_regret() -> None:
    values = watched([[1, 1, 1, 1], [1.1, 1.001, 0.5, 1.2]])[-1].values()
    assert values["regret/t0"] == pytest.approx(0.1)
    assert values["regret/t2"] == 0
    assert values["seesaw/regret_mean"] == pytest.approx((0.1 + 0.001 + 0.2) / 4)
    assert values["seesaw/regret_max"] == pytest.approx(0.2)
    assert values["seesaw/regret_tasks"] == 2


# --- the worst, the reference -----------------------------------------------------------------------------


@pytest.mark.parametrize(("worst", "expected"), [(0.25, 3.5), (0.01, 4.0), (1.0, 1.3125), (0.3, 3.0)])
def test_worst_loss_is_the_mean_of_a_share_of_the_tasks_and_of_one_at_least(
    worst: float, expected: float
) -> None:
    losses = [0.5, 4.0, 0.5, 3.0, 0.5, 2.0, 0.0, 0.0]
    assert watched([losses], worst=worst)[0].worst_loss == pytest.approx(expected)


def reference(**losses: float) -> Reference:
    return Reference("r", 9, {t: TaskReference(loss, None, "accuracy", 9, 1) for t, loss in losses.items()})


def test_gains_over_the_reference() -> None:
    tracker = SeesawTracker(names(4), SeesawSection(), reference(t0=2.0, t1=1.0, t2=1.0))
    step = tracker.update(flat([1.0, 1.2, 1.001, 7.0]))
    assert step.mtl_gain_T == pytest.approx([0.5, -0.2, -0.001, math.nan], nan_ok=True)
    values = step.values()
    mean = (0.5 - 0.2 - 0.001) / 3
    assert values["mtl_gain/t0"] == 0.5
    assert values["seesaw/delta_m"] == pytest.approx(mean)
    assert values["seesaw/negative_transfer"] == pytest.approx(1 / 3)  # a thousandth is below the gate
    assert values["seesaw/mtl_gain_variation"] == pytest.approx(np.std([0.5, -0.2, -0.001]) / mean)
    assert set(values) == {
        *("seesaw/worst_loss", "seesaw/delta_m", "seesaw/negative_transfer", "seesaw/mtl_gain_variation"),
        *("mtl_gain/t0", "mtl_gain/t1", "mtl_gain/t2"),
    }


SCALARS = ["index", "paid", "gain", "regress", "regressed_tasks", "regret_mean", "regret_max", "regret_tasks"]
SCALARS += ["window_index", "window_paid", "window_gain", "window_regress", "worst_loss"]


def test_the_series_of_an_evaluation() -> None:
    first, second = watched([[1.0, 2.0], [0.9, 2.1]])
    assert first.values() == {"seesaw/worst_loss": 2.0}
    assert set(second.values()) == {f"seesaw/{name}" for name in SCALARS} | {"regret/t0", "regret/t1"}


def test_the_table_has_a_row_per_task_and_no_nan() -> None:
    tracker = SeesawTracker(names(2), SeesawSection(), reference(t0=2.0))
    columns, rows = tracker.update(flat([1.0, math.nan])).table()
    assert rows[0][:2] == ["t0", 1.0]
    assert dict(zip(columns, rows[0], strict=True))["mtl_gain"] == 0.5
    assert rows[1] == ["t1", *[None] * (len(columns) - 1)]
    columns, rows = tracker.update(flat([0.9, 1.0])).table()
    told = dict(zip(columns, rows[0], strict=True))
    assert told["before"] == 1.0
    assert told["delta"] == pytest.approx(0.1)
    json.dumps(rows, allow_nan=False)


# --- what must not change anything ------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> list[list[list[float]]]:
    """Evaluations x tasks x rows."""
    tasks, rows = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    loss = st.floats(1, 8)
    row = st.lists(loss, min_size=rows, max_size=rows)
    return draw(st.lists(st.lists(row, min_size=tasks, max_size=tasks), min_size=2, max_size=6))


def fed(tracker: SeesawTracker, run: list[list[list[float]]], order: Sequence[int] = ()) -> list[SeesawStep]:
    steps = []
    for evaluation in run:
        probes = {f"t{i}": ProbeLosses(tuple(rows), len(rows)) for i, rows in enumerate(evaluation)}
        steps.append(tracker.update({f"t{i}": probes[f"t{i}"] for i in order} if order else probes))
    return steps


def told(steps: list[SeesawStep]) -> list[Mapping[str, float]]:
    return [pytest.approx(s.values(), rel=1e-6, abs=1e-9) for s in steps]


@settings(max_examples=60, deadline=None)
@given(runs(), st.randoms(use_true_random=False))
def test_the_order_of_the_tasks_changes_nothing(run: list, random: Any) -> None:
    order = list(range(len(run[0])))
    random.shuffle(order)
    straight = fed(SeesawTracker(names(len(order)), SeesawSection()), run)
    shuffled = fed(SeesawTracker([f"t{i}" for i in order], SeesawSection()), run, order)
    assert [s.values() for s in shuffled] == told(straight)


@settings(max_examples=60, deadline=None)
@given(runs(), st.floats(0.1, 100))
def test_the_unit_of_the_losses_changes_nothing(run: list, unit: float) -> None:
    tasks = names(len(run[0]))
    scaled = [[[unit * loss for loss in rows] for rows in evaluation] for evaluation in run]
    steps, others = (fed(SeesawTracker(tasks, SeesawSection()), r) for r in (run, scaled))
    for step, other in zip(steps, others, strict=True):
        assert other.delta_T == pytest.approx(step.delta_T, rel=1e-6, abs=1e-9, nan_ok=True)
        assert other.regret_T == pytest.approx(step.regret_T, rel=1e-6, abs=1e-9, nan_ok=True)
        assert other.step.gain == pytest.approx(step.step.gain, rel=1e-6, abs=1e-9)
        assert other.window.regress == pytest.approx(step.window.regress, rel=1e-6, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(0, 5), st.integers(1, 4))
def test_a_run_that_went_on_elsewhere_tells_the_same(run: list, cut: int, window: int) -> None:
    """By feeding what is on disk again, and by a state."""
    tasks, section = names(len(run[0])), SeesawSection(window=window)
    live, again, restored = (SeesawTracker(tasks, section) for _ in range(3))
    steps = [s.values() for s in fed(live, run)]
    fed(again, run[:cut])
    assert [s.values() for s in fed(again, run[cut:])] == steps[cut:]
    before = SeesawTracker(tasks, section)
    fed(before, run[:cut])
    restored.load_state(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert [s.values() for s in fed(restored, run[cut:])] == steps[cut:]
    assert restored.state() == live.state()


# --- losses that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_task_is_left_out_and_comes_back(bad: float) -> None:
    steps = watched([[1.0, 1.0], [0.9, bad], [0.9, 1.1]])
    assert [s.broken for s in steps] == [(), ("t1",), ()]
    assert steps[1].step.gain == pytest.approx(0.1 - 0.002)  # the mean of the one that could be compared
    assert steps[1].worst_loss == 0.9
    assert all(math.isfinite(v) for s in steps for v in s.values().values())
    assert "regret/t1" not in steps[1].values()
    assert "seesaw/gain" in steps[1].values()
    assert steps[2].delta_T == pytest.approx([0, -0.1])
    assert steps[2].regret_T[1] == pytest.approx(0.1)


def test_an_evaluation_of_nothing_but_nan_tells_nothing() -> None:
    steps = watched([[1.0, 1.0], [math.nan, math.nan], [1.0, 0.5]])
    assert steps[1].values() == {}
    assert steps[2].delta_T == pytest.approx([0, 0.5])


def test_a_solved_task_has_not_lost_everything() -> None:
    """From 0.0001 to 0.0005 nats is no fivefold loss of what it had."""
    step = watched([[1.0, 0.0001], [1.0, 0.0005]])[-1]
    assert step.delta_T[1] == pytest.approx(-0.04)
    assert step.regret_T[1] == pytest.approx(0.04)


def test_another_probe_set_starts_a_task_anew() -> None:
    tracker = SeesawTracker(["t0", "t1"], SeesawSection())
    tracker.update(flat([1.0, 1.0]))
    step = tracker.update(flat([1.1]) | {"t1": ProbeLosses((9.0, 9.0, 9.0), 3)})
    assert step.delta_T == pytest.approx([-0.1, math.nan], nan_ok=True)
    assert step.regret_T == pytest.approx([0.1, 0])
    assert step.broken == ()


def test_a_task_that_is_not_evaluated_is_not_broken() -> None:
    step = SeesawTracker(["t0", "t1"], SeesawSection()).update(flat([1.0]))
    assert step.broken == ()
    assert math.isnan(step.loss_T[1])
